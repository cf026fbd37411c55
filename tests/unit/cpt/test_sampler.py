"""Exact shares in every effective batch, through epoch ends, resume, ranks and packing."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.data.sampler import MixedSampler, steps_for


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
