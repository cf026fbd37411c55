"""Work spread over ranks: every job once, all results everywhere, an error of one on all. Ranks are threads here."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from eval_harness import sharding
from eval_harness.errors import Interrupted, ScoringError
from eval_harness.measure import EvalSet, measure
from eval_harness.rows import canonical
from eval_harness.sharding import spread
from tests.threads import Threads, ThreadShard


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("jobs", [0, 1, 2, 7, 100])
def test_every_job_is_done_once_and_known_to_all(jobs: int, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "ROUND", 4)  # 100 jobs are several rounds, the last one short
    did: list[list[int]] = [[] for _ in range(world)]

    def work(shard: ThreadShard) -> list[tuple[int, int]]:
        return list(spread(range(jobs), lambda job: did[shard.rank].append(job) or job**2, shard))

    assert Threads(world).run(work) == [[(job, job**2) for job in range(jobs)]] * world
    assert sorted(job for own in did for job in own) == list(range(jobs))
    counts = [len(own) for own in did]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("error", [Interrupted("asked to"), ScoringError("NaN"), KeyError("x")])
def test_an_error_of_one_rank_is_raised_on_all(error: Exception) -> None:
    def fail(job: int) -> int:
        if job == 3:  # rank 1 of 2
            raise error
        return job

    zero, one = Threads(2).run(lambda shard: list(spread(range(10), fail, shard)))
    assert one is error
    if isinstance(error, KeyError):
        assert type(zero) is RuntimeError
        assert str(zero) == "process 1 of the measurement: KeyError: 'x'"
    else:
        assert (type(zero), str(zero)) == (type(error), str(error))


def test_the_lowest_ranks_error_wins_everywhere() -> None:
    def fail(job: int) -> int:
        raise ScoringError(f"job {job}")

    found = Threads(3).run(lambda shard: list(spread(range(6), fail, shard)))
    assert [str(one) for one in found] == ["job 0"] * 3


def test_measures_of_several_ranks_equal_those_of_one(
    half_taught: Any, tokenizer: Any, word_rows: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "ROUND", 2)
    choices = [
        canonical({"question": f"Word {i}?", "choices": ["river", "x", "a market"], "answer_index": i % 3})
        for i in range(20)
    ]
    texts = [canonical({"text": text}) for text in ("river, harbour " * 60, "Paris", "é 12")]
    long = canonical({"prompt": "river " * 200, "completion": "x"})
    sets = [
        EvalSet("words", [*word_rows, long]),
        EvalSet("choices", choices),
        EvalSet("texts", texts),
        EvalSet("written", word_rows[:40], ("exact_match",), exact_match="generate"),
    ]
    alone = measure(half_taught, tokenizer, sets)
    seen: list[list[int]] = [[], []]

    def work(shard: ThreadShard) -> Any:
        own = copy.deepcopy(half_taught)
        record = own.base_model.register_forward_hook(
            lambda module, args, kwargs, out: seen[shard.rank].append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        try:
            return measure(own, tokenizer, sets, batch_tokens=256, shard=shard)
        finally:
            record.remove()

    for both in Threads(2).run(work):
        assert both.keys() == alone.keys()
        for name, measures in alone.items():
            for key, one in measures.items():
                two = both[name][key]
                assert list(two.per_item) == list(one.per_item)  # in input order
                assert list(two.per_item.values()) == pytest.approx(list(one.per_item.values()), abs=1e-5)
                assert (two.n, two.excluded, two.definition) == (one.n, one.excluded, one.definition)
                assert two.value == pytest.approx(one.value, abs=1e-5)
    assert alone["words"]["answer_loss"].excluded == {"longer_than_context": 1}
    assert 0.7 < sum(seen[0]) / sum(seen[1]) < 1.4  # the work is even


def test_a_small_set_is_shared_too(half_taught: Any, tokenizer: Any, word_rows: list[Any]) -> None:
    """All rows fit in one batch: the ranks get batches of their own all the same."""
    batches: list[int] = [0, 0]

    def work(shard: ThreadShard) -> Any:
        def count() -> bool:
            batches[shard.rank] += 1
            return False

        return measure(half_taught, tokenizer, [EvalSet("s", word_rows[:40])], should_stop=count, shard=shard)

    assert not any(isinstance(found, Exception) for found in Threads(2).run(work))
    assert min(batches) >= 4


def test_one_rank_that_is_asked_to_stop_stops_all(half_taught: Any, tokenizer: Any, word_rows: list[Any]) -> None:
    def work(shard: ThreadShard) -> Any:
        return measure(
            half_taught, tokenizer, [EvalSet("s", word_rows)], should_stop=lambda: shard.rank == 1, shard=shard
        )

    assert [type(found) for found in Threads(2).run(work)] == [Interrupted, Interrupted]
