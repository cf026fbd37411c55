"""Which rows stand in which effective batch: exact shares, drawn by counter, so that nothing needs saving.

An epoch is a count of task rows, not a border: batches run across it, so every one is full and holds
exactly its shares. Row numbers follow from (seed, source, pass, step) alone; a resumed stage skips ahead.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

import numpy as np
from torch.utils.data import Sampler

from cpt.data.stage_data import TASK


def steps_for(epochs: float, task_rows: int, task_rows_per_batch: float) -> int:
    """Optimizer steps in which every task row is seen `epochs` times (the last batch may see some once more)."""
    return max(1, math.ceil(epochs * task_rows / task_rows_per_batch))


class MixedSampler(Sampler[int]):
    """Rows of concatenated sources, `batch` at a time, each block with its quota of every added source.

    sizes:  rows per source, in concatenation order; the task first.
    copies: how often the task's rows stand one behind the other: pass n draws from copy n, and so round.
    quotas: rows per block of sources that have a fixed share, floor(n x quota) in n blocks; the others are one pool,
            which takes the rest.
    batch:  effective batch over devices, accumulation and ranks. Accelerate hands out consecutive
            micro-batches of it, so the block is the same on any number of ranks.
    """

    def __init__(
        self,
        sizes: dict[str, int],
        quotas: Mapping[str, float],
        batch: int,
        steps: int,
        seed: int,
        copies: int = 1,
    ) -> None:
        self.copies = {TASK: copies}
        sizes = sizes | {TASK: sizes[TASK] * copies}
        self.sizes, self.batch, self.steps, self.seed, self.quotas = sizes, batch, steps, seed, dict(quotas)
        if batch - sum(map(math.ceil, quotas.values())) < 1 or TASK in quotas:
            raise ValueError(f"quotas {quotas} leave no room for task rows in a batch of {batch}")

    def __len__(self) -> int:
        return self.steps * self.batch

    def __iter__(self) -> Iterator[int]:
        places = self._places()
        rows = {name: Turns(len(places[name]), self.seed, name, self.copies.get(name, 1)) for name in places}
        for step in range(self.steps):
            spans = zip(self._taken(step).items(), self._taken(step + 1).values(), strict=True)
            block = [places[name][rows[name][place]] for (name, first), end in spans for place in range(first, end)]
            if len(self.sizes) > 1:  # rows of one origin must not gather in one micro-batch
                block = [block[i] for i in generator(self.seed, "block", step).permutation(self.batch)]
            yield from block

    def _taken(self, steps: int) -> dict[str, int]:
        """Rows of each share in so many blocks; the pool's under the task's name."""
        added = {name: math.floor(steps * quota + 1e-9) for name, quota in self.quotas.items()}
        return {TASK: steps * self.batch - sum(added.values())} | added

    def _places(self) -> dict[str, Sequence[int]]:
        """Where the rows of each share stand in the concatenation; the pool under the task's name."""
        ends = dict(zip(self.sizes, accumulate(self.sizes.values()), strict=True))
        places = {name: range(ends[name] - size, ends[name]) for name, size in self.sizes.items()}
        pool = [place for name in self.sizes if name not in self.quotas for place in places[name]]
        return {TASK: pool} | {name: places[name] for name in self.quotas}


class GroupSampler(Sampler[int]):
    """Prompts of a rewarded stage: every prompt `group` times in a row, every generation batch `repeats` times.

    size:    prompts.
    group:   completions per prompt.
    at_once: completions generated at a time, over all ranks; a multiple of `group`.
    repeats: micro-batches that one generation serves; TRL takes the batch anew for each and splits it itself.
    rounds:  generations in the stage.
    As in `MixedSampler` an epoch is a count of prompts, not a border, and nothing needs saving.
    """

    def __init__(self, size: int, group: int, at_once: int, repeats: int, rounds: int, seed: int) -> None:
        self.size, self.group, self.at_once = size, group, at_once
        self.repeats, self.rounds, self.seed = repeats, rounds, seed

    def __len__(self) -> int:
        return self.rounds * self.repeats * self.at_once

    def __iter__(self) -> Iterator[int]:
        rows = Turns(self.size, self.seed, TASK)
        prompts = self.at_once // self.group
        for number in range(self.rounds):
            drawn = [rows[number * prompts + i] for i in range(prompts)]
            block = [row for row in drawn for _ in range(self.group)]
            for _ in range(self.repeats):
                yield from block


class Turns:
    """One permutation of a source after another, as a function of (seed, name, place): place n is row `turns[n]`.

    copies: how often the source's rows stand one behind the other; each permutation is of the next copy.
    """

    def __init__(self, size: int, seed: int, name: str, copies: int = 1) -> None:
        self.size, self.seed, self.name, self.copies = size // copies, seed, name, copies
        self._turn, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, place: int) -> int:
        turn, at = divmod(place, self.size)
        if turn != self._turn:
            self._turn, self._order = turn, generator(self.seed, self.name, turn).permutation(self.size)
        return turn % self.copies * self.size + int(self._order[at])


def generator(seed: int, name: str, count: int) -> np.random.Generator:
    """Counter-based: the same draw for the same key, whatever was drawn before."""
    key = hashlib.sha256(f"{seed}/{name}/{count}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key[:16], dtype=np.uint64)))
