"""Which rows stand in which effective batch: exact shares, drawn by counter, so that nothing needs saving.

An epoch is a count of task rows, not a border: batches run across it, so every one is full and holds
exactly its shares. Row numbers follow from (seed, source, pass, step) alone; a resumed stage skips ahead.
"""

import hashlib
import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from cpt.data.stage_data import TASK


def steps_for(epochs: float, task_rows: int, task_rows_per_batch: int) -> int:
    """Optimizer steps in which every task row is seen `epochs` times (the last batch may see some once more)."""
    return max(1, math.ceil(epochs * task_rows / task_rows_per_batch))


class MixedSampler(Sampler[int]):
    """Rows of concatenated sources, `batch` at a time, each block with its quota of every added source.

    sizes:  rows per source, in concatenation order; the task first.
    quotas: rows per block of each other source; the task takes the rest.
    batch:  effective batch over devices, accumulation and ranks. Accelerate hands out consecutive
            micro-batches of it, so the block is the same on any number of ranks.
    """

    def __init__(self, sizes: dict[str, int], quotas: dict[str, int], batch: int, steps: int, seed: int) -> None:
        self.sizes, self.batch, self.steps, self.seed = sizes, batch, steps, seed
        self.shares = {name: quotas.get(name, batch - sum(quotas.values())) for name in sizes}
        if self.shares[TASK] < 1 or sum(self.shares.values()) != batch:
            raise ValueError(f"quotas {quotas} leave no room for task rows in a batch of {batch}")

    def __len__(self) -> int:
        return self.steps * self.batch

    def __iter__(self) -> Iterator[int]:
        streams = {name: self._endless(name) for name in self.sizes}
        for step in range(self.steps):
            block = [next(streams[name]) for name, share in self.shares.items() for _ in range(share)]
            if len(self.shares) > 1:  # rows of one origin must not gather in one micro-batch
                block = [block[i] for i in _generator(self.seed, "block", step).permutation(self.batch)]
            yield from block

    def _endless(self, name: str) -> Iterator[int]:
        """One permutation of the source after another, as numbers of the concatenated dataset."""
        names = list(self.sizes)
        start = sum(self.sizes[other] for other in names[: names.index(name)])
        turn = 0
        while True:
            yield from (_generator(self.seed, name, turn).permutation(self.sizes[name]) + start).tolist()
            turn += 1


def _generator(seed: int, name: str, count: int) -> np.random.Generator:
    """Counter-based: the same draw for the same key, whatever was drawn before."""
    key = hashlib.sha256(f"{seed}/{name}/{count}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key[:16], dtype=np.uint64)))
