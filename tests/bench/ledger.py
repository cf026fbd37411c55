"""What a ledger costs: 10,000 requests imported in one transaction and verified, and one entry flushed to the disk."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from cpt.ledger import Asked, Ledger
from eval_harness.rows import Row
from tests.bench.figures import Figure, median_of

REQUESTS = 10_000
WORDS = " ".join(f"word{i}" for i in range(60))


def ledger(repeats: int) -> list[Figure]:
    """Each repeat makes a ledger of its own; entries are added to one of 10,000 requests."""
    asked = [
        Asked([Row("completion", prompt=f"{i}?", completion=f"{WORDS} {i}")], f"ticket {i}") for i in range(REQUESTS)
    ]
    whole, one = list[float](), list[float]()
    for _ in range(repeats):
        with TemporaryDirectory(dir=Path.cwd()) as folder, Ledger.open(folder) as made:
            with timed(whole):
                made.request_many(asked)
                problems = made.verify()
            if problems or len(made.requests()) != REQUESTS:
                raise RuntimeError(f"the ledger does not hold what was imported: {problems[:1]}")
            for i in range(20):
                with timed(one):
                    made.fail(f"R{i + 1}", "a gate")
    return [
        median_of("ledger, 10,000 requests imported and verified", whole, "s", 1.0),
        median_of("ledger, one durable entry", [1000 * seconds for seconds in one], "ms", 20.0),
    ]


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    """Add what the block took."""
    began = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - began)
