"""Work spread over the ranks of a launch: each job is done once, and every rank gets what all of them made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from eval_harness.errors import Interrupted, ScoringError

ROUND = 16  # jobs that a rank does between two exchanges: how soon a stop or an error of one reaches all

Job = TypeVar("Job")
Made = TypeVar("Made")


class Shard(Protocol):
    """This process among those that share a measurement; every one holds the whole model.

    gather   a list of what each rank gives, by rank and the same on every one; all ranks call it equally often
    """

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def gather(self, part: Any) -> list[Any]: ...


def spread(jobs: Sequence[Job], work: Callable[[Job], Made], shard: Shard | None = None) -> Iterator[tuple[Job, Made]]:
    """Every job with what came of it, in order; the ranks take jobs in turn and exchange every few.

    All ranks pass the same jobs, and take from this iterator to its end. What `work` raises on one rank is raised
    on all of them after the round, so none waits for another that is gone: the rank's own error there, elsewhere
    the same Interrupted or ScoringError, or a RuntimeError that quotes it.
    """
    if shard is None:
        yield from ((job, work(job)) for job in jobs)
        return
    for at in range(0, len(jobs), ROUND * shard.world):
        part = jobs[at : at + ROUND * shard.world]
        made = _exchange(shard, work, part[shard.rank :: shard.world])
        for number, job in enumerate(part):
            yield job, made[number % shard.world][number // shard.world]


def _exchange(shard: Shard, work: Callable[[Job], Made], own: Sequence[Job]) -> list[list[Made]]:
    made: list[Made] = []
    problem: Exception | None = None
    try:
        made += [work(job) for job in own]
    except Exception as error:  # raised below, on every rank
        problem = error
    said = None if problem is None else (type(problem).__name__, str(problem))
    parts, problems = zip(*shard.gather((made, said)), strict=True)
    first = next((rank for rank, one in enumerate(problems) if one is not None), None)
    if first is None:
        return list(parts)
    if first == shard.rank and problem is not None:
        raise problem
    name, text = problems[first]
    known = {kind.__name__: kind for kind in (Interrupted, ScoringError)}
    raise known[name](text) if name in known else RuntimeError(f"process {first} of the measurement: {name}: {text}")
