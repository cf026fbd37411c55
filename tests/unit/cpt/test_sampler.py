"""Exact shares in every effective batch, through epoch ends, resume, ranks and packing."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.data.sampler import MixedSampler, steps_for
from cpt.data.stage_data import StageData
from cpt.data.tokens import TokenRows
from cpt.errors import DataError


def blocks(sampler: MixedSampler) -> list[list[int]]:
    numbers = list(sampler)
    return [numbers[i : i + sampler.batch] for i in range(0, len(numbers), sampler.batch)]


@given(
    task=st.integers(1, 40),
    general=st.integers(1, 9),
    batch=st.integers(2, 12),
    steps=st.integers(1, 12),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_every_block_holds_exactly_its_quota(task, general, batch, steps, seed, data) -> None:
    quota = data.draw(st.integers(1, batch - 1))
    sampler = MixedSampler({"task": task, "general": general}, {"general": quota}, batch, steps, seed)
    found = blocks(sampler)
    assert len(sampler) == batch * steps
    assert [sum(n >= task for n in block) for block in found] == [quota] * steps
    assert all(0 <= n < task + general for block in found for n in block)


@given(task=st.integers(1, 30), batch=st.integers(1, 8), passes=st.integers(1, 4))
def test_every_task_row_is_seen_once_per_pass(task: int, batch: int, passes: int) -> None:
    steps = steps_for(passes, task, batch)
    seen = Counter(list(MixedSampler({"task": task}, {}, batch, steps, seed=1))[: passes * task])
    assert set(seen.values()) == {passes}
    assert len(seen) == task
    assert (steps - 1) * batch < passes * task <= steps * batch


def test_task_rows_come_in_the_same_order_with_and_without_replay() -> None:
    plain = MixedSampler({"task": 20}, {}, 4, 6, seed=3)
    mixed = MixedSampler({"task": 20, "replay": 5}, {"replay": 2}, 6, 6, seed=3)
    for a, b in zip(blocks(plain), blocks(mixed), strict=True):
        assert sorted(a) == sorted(n for n in b if n < 20)


def test_a_draw_depends_on_the_seed_and_on_nothing_before_it() -> None:
    def make(seed: int) -> MixedSampler:
        return MixedSampler({"task": 50, "replay": 7}, {"replay": 1}, 8, 20, seed)

    assert list(make(1)) == list(make(1))
    assert list(make(1)) != list(make(2))
    again = make(1)
    first = list(islice(again, 40))
    assert list(again)[:40] == first  # iterating twice starts again


def test_rows_without_a_share_are_shuffled_in_once_an_epoch() -> None:
    sizes = {"task": 21, "replay": 5, "general": 9}
    seen = [n for block in blocks(MixedSampler(sizes, {"replay": 2}, 7, 12, seed=4)) for n in block]
    pool = [n for n in seen if not 21 <= n < 26]
    assert set(Counter(pool[:30]).values()) == {1}
    assert set(Counter(pool[30:60]).values()) == {1}
    assert sum(21 <= n < 26 for n in seen) == 2 * 12
    assert pool[:30] != sorted(pool[:30])


def test_no_room_for_the_task_is_refused() -> None:
    with pytest.raises(ValueError, match="leave no room"):
        MixedSampler({"task": 5, "replay": 5}, {"replay": 4}, 4, 1, seed=0)


def test_a_share_that_is_not_whole_is_held_over_blocks() -> None:
    found = blocks(MixedSampler({"task": 40, "replay": 9}, {"replay": 1.3}, 8, 100, seed=0))
    counts = [sum(n >= 40 for n in block) for block in found]
    assert set(counts) == {1, 2}
    assert all(abs(sum(counts[:n]) - 1.3 * n) < 1 for n in range(101))
    assert all(len(block) == 8 for block in found)


def test_a_share_of_tokens_is_that_of_the_tokens_drawn() -> None:
    """Rows of unequal length, a fixed share beside it: within three standard errors, at as many rows a batch."""
    make = np.random.default_rng(0)
    lengths = {"task": make.integers(5, 60, 500), "fixed": make.integers(5, 9, 50), "old": make.integers(2, 20, 300)}
    data = StageData(lambda *_: None)  # type: ignore[arg-type, return-value]
    data.sources["task"] = of_lengths(lengths["task"])
    data.add("fixed", of_lengths(lengths["fixed"]), 2)
    data.add("old", of_lengths(lengths["old"]), None, share_of_tokens=0.3)
    shares = data.rows_per_batch(32)
    assert shares["fixed"] == 2
    every, starts = np.concatenate(list(lengths.values())), {"task": 0, "fixed": 500, "old": 550}
    tokens = [
        (sum(every[n] for n in block if n >= starts["old"]), sum(every[n] for n in block))
        for block in blocks(MixedSampler(data.sizes, shares, 32, 400, seed=0))
    ]
    old, whole = np.array(tokens).T
    share = old.sum() / whole.sum()
    error = np.std(old - 0.3 * whole) / np.sqrt(len(whole)) / whole.mean()
    assert abs(share - 0.3) < 3 * error
    assert error < 0.01


@pytest.mark.parametrize(
    ("share", "rows", "said"), [(0.999, 300, "leave no room for task rows"), (0.5, 4, "holds 4 rows, fewer than the")]
)
def test_a_share_of_tokens_that_cannot_be_is_refused(share: float, rows: int, said: str) -> None:
    data = StageData(lambda *_: None)  # type: ignore[arg-type, return-value]
    data.sources["task"] = of_lengths(np.full(50, 10))
    data.add("old", of_lengths(np.full(rows, 10)), None, share_of_tokens=share)
    with pytest.raises(DataError, match=said):
        data.rows_per_batch(16)


def of_lengths(lengths: Any) -> TokenRows:
    return TokenRows(datasets.Dataset.from_dict({"input_ids": [[1] * int(n) for n in lengths]}))
