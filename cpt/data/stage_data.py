"""Named sources of token rows and their exact share of every effective batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets

from cpt.data.sources import Loaded
from cpt.data.tokens import TokenRows
from cpt.errors import DataError

TASK = "task"


@dataclass
class StageData:
    """What a stage trains on. The task rows are the primary source and take what quotas leave over.

    load:   (rows, place for errors, most rows or None) -> token rows, under the stage's settings. The rows are
            the sources that a method names in its fields, or an entry of `StageInfo.earlier`: both were read and
            hashed before the first stage began.
    quotas: rows of each added source in every effective batch, exact through epoch ends and resume.
    """

    load: Callable[[Sequence[Any] | Loaded, str, int | None], TokenRows]
    sources: dict[str, TokenRows] = field(default_factory=dict)
    quotas: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, rows: TokenRows, rows_per_batch: int) -> None:
        """Add a source with exactly `rows_per_batch` of its rows in every effective batch."""
        if name in self.sources:
            raise DataError(f"two methods of one stage add a source called {name!r}; list the method once")
        self.sources[name] = rows
        self.quotas[name] = rows_per_batch

    @property
    def names(self) -> list[str]:
        """Origins by number: a row's `origin` is its place in this list; 0 is the task."""
        return list(self.sources)

    @property
    def sizes(self) -> dict[str, int]:
        """Rows of each source, in the order of the concatenated dataset."""
        return {name: len(rows.dataset) for name, rows in self.sources.items()}

    def dataset(self) -> datasets.Dataset:
        """All sources one behind the other, each row with its `origin` and `row` number."""
        parts = []
        for number, rows in enumerate(self.sources.values()):
            n = len(rows.dataset)
            part = rows.dataset.add_column("origin", [number] * n)
            parts.append(part.add_column("row", list(range(n))))
        return datasets.concatenate_datasets(parts)
