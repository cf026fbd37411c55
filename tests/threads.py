"""Ranks of a launch as threads of this process: what they gather is a table between two barriers."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any


class Threads:
    """So many ranks; a rank that waits for ever fails at its barrier after a minute."""

    def __init__(self, world: int) -> None:
        self.world, self.table, self.barrier = world, [None] * world, Barrier(world, timeout=60)

    def run(self, work: Callable[[ThreadShard], Any]) -> list[Any]:
        """What each rank's work returned or raised, by rank."""
        with ThreadPoolExecutor(self.world) as pool:
            ranks = [pool.submit(work, ThreadShard(self, rank)) for rank in range(self.world)]
            return [one.exception() or one.result() for one in ranks]


class ThreadShard:
    """One rank as `eval_harness.sharding.Shard` has it."""

    def __init__(self, threads: Threads, rank: int) -> None:
        self.threads, self.rank, self.world = threads, rank, threads.world

    def gather(self, part: Any) -> list[Any]:
        """What every rank gives, by rank."""
        self.threads.table[self.rank] = part
        self.threads.barrier.wait()
        parts = list(self.threads.table)
        self.threads.barrier.wait()
        return parts
