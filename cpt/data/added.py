"""Rows that methods add to a stage whose own rows are completions: drawn by counter, in exact shares."""

from typing import Any

import torch

from cpt.data.collator import Collator
from cpt.data.sampler import Turns, generator
from cpt.data.stage_data import TASK, StageData
from cpt.data.tokens import IGNORED


class AddedRows:
    """Each micro-batch's part of the rows that an effective batch adds.

    Which rows follows from (seed, step, micro-batch, rank) alone. Every rank gets equally many rows, so that all
    make the same number of forward passes; where the rows do not go round, copies without labels fill up.
    """

    def __init__(self, data: StageData, seed: int, accumulation: int, world: int, collator: Collator) -> None:
        self.quotas = {name: n for name, n in data.quotas.items() if n}
        self._origins = {name: number for number, name in enumerate(data.names)}
        self._rows = {name: data.sources[name].dataset for name in self.quotas}
        self._turns = {name: Turns(len(rows), seed, name) for name, rows in self._rows.items()}
        self._seed, self._world, self._collator = seed, world, collator
        self._total = sum(self.quotas.values())
        self._each = -(-self._total // (accumulation * world))
        self._step, self._block, self._window = -1, list[dict[str, Any]](), dict[str, float]()

    def window(self, step: int) -> dict[str, float]:
        """Counts over the effective batch: "<origin>_tokens", "<origin>_rows", and their sums "tokens", "rows"."""
        self._at(step)
        return dict(self._window)

    def batch(self, step: int, micro: int, rank: int) -> dict[str, torch.Tensor] | None:
        """The rows of one rank's micro-batch, collated; None where no rank has any."""
        first = micro * self._world * self._each
        if first >= self._total:
            return None
        block, start = self._at(step), first + rank * self._each
        mine = block[start : start + self._each]
        filler = block[0] | {"labels": [IGNORED] * len(block[0]["labels"])}
        return self._collator(mine + [filler] * (self._each - len(mine)))

    def _at(self, step: int) -> list[dict[str, Any]]:
        if step != self._step:
            drawn = [
                self._rows[name][row := self._turns[name][step * n + i]] | {"origin": self._origins[name], "row": row}
                for name, n in self.quotas.items()
                for i in range(n)
            ]
            order = generator(self._seed, "added", step).permutation(len(drawn))
            self._step, self._block, self._window = step, [drawn[i] for i in order], self._counted(drawn)
        return self._block

    def _counted(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        counts = {f"{name}_rows": float(n) for name, n in self.quotas.items()}
        for name in self.quotas:
            mine = [row for row in rows if row["origin"] == self._origins[name]]
            counts[f"{name}_tokens"] = float(sum(_learned(row) for row in mine))
        tokens = sum(count for key, count in counts.items() if key.endswith("_tokens"))
        batches = -(-self._total // self._each)
        return counts | {"tokens": tokens, "rows": float(self._total), "batches": float(batches)}


def _learned(row: dict[str, Any]) -> int:
    return sum(label != IGNORED for label in row["labels"][1:])


def added_rows(data: StageData, seed: int, accumulation: int, world: int, collator: Collator) -> AddedRows | None:
    """The rows that methods added to the stage, or None where none did."""
    some = any(n for name, n in data.quotas.items() if name != TASK)
    return AddedRows(data, seed, accumulation, world, collator) if some else None
