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
    quotas: rows of each added source in every effective batch, exact through epoch ends and resume. A source
            without one is shuffled in among the task's rows.
    """

    load: Callable[[Sequence[Any] | Loaded, str, int | None], TokenRows]
    sources: dict[str, TokenRows] = field(default_factory=dict)
    quotas: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, rows: TokenRows, rows_per_batch: int | None) -> None:
        """Add a source with exactly `rows_per_batch` of its rows in every effective batch; None: shuffled in.

        Raises DataError for a second source of the name, and for fewer rows than a batch is to hold.
        """
        if name in self.sources:
            raise DataError(f"two methods of one stage add a source called {name!r}; list the method once")
        if rows_per_batch is not None and rows_per_batch > len(rows.dataset):
            raise DataError(
                f"{name}: holds {len(rows.dataset)} rows, fewer than the {rows_per_batch} of every effective batch: "
                "give more rows, or a smaller ratio"
            )
        self.sources[name] = rows
        if rows_per_batch is not None:
            self.quotas[name] = rows_per_batch

    @property
    def names(self) -> list[str]:
        """Origins by number: a row's `origin` is its place in this list; 0 is the task."""
        return list(self.sources)

    @property
    def sizes(self) -> dict[str, int]:
        """Rows of each source, in the order of the concatenated dataset."""
        return {name: len(rows.dataset) for name, rows in self.sources.items()}

    @property
    def pool(self) -> int:
        """Rows that an epoch goes through once: the task's, and what is shuffled in among them."""
        return sum(size for name, size in self.sizes.items() if name not in self.quotas)

    def dataset(self) -> datasets.Dataset:
        """All sources one behind the other, each row with its `origin` and `row` number."""
        parts = []
        for number, rows in enumerate(self.sources.values()):
            n = len(rows.dataset)
            part = rows.dataset.add_column("origin", [number] * n)
            parts.append(part.add_column("row", list(range(n))))
        return datasets.concatenate_datasets(parts)
