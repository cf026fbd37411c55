"""Named sources of token rows and their exact share of every effective batch."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets

from cpt.data.sources import Loaded
from cpt.data.tokens import TokenRows, joined
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
    token_shares: of added sources that have a share of the tokens instead.
    place: of the stage's methods, for errors.
    """

    load: Callable[[Sequence[Any] | Loaded, str, int | None], TokenRows]
    sources: dict[str, TokenRows] = field(default_factory=dict)
    quotas: dict[str, int] = field(default_factory=dict)
    token_shares: dict[str, float] = field(default_factory=dict)
    place: str = "methods"

    def add(self, name: str, rows: TokenRows, rows_per_batch: int | None, share_of_tokens: float | None = None) -> None:
        """Add a source with exactly `rows_per_batch` of its rows in every effective batch; None: shuffled in.

        share_of_tokens: instead, so many rows that they hold this share of all tokens of a batch, on average over
        rows and batches. Raises DataError for a second source of the name, and for fewer rows than a batch is to hold.
        """
        if name in self.sources:
            raise DataError(f"two methods of one stage add a source called {name!r}; list the method once")
        self.sources[name] = rows
        if rows_per_batch is not None:
            self._refuse_short(name, rows_per_batch)
            self.quotas[name] = rows_per_batch
        if share_of_tokens is not None:
            self.token_shares[name] = share_of_tokens

    def gather(
        self,
        general: Sequence[Any] | None,
        earlier: Mapping[str, Loaded],
        place: str,
        of_general: int | None = None,
        of_each: int | None = None,
    ) -> TokenRows | None:
        """General rows and those of earlier stages as one source, which a method reads and adds to nothing.

        of_general, of_each: at most so many, of the general ones and of each stage. None where there are none.
        """
        parts = [self.load(rows, f"{place}.earlier.{name}", of_each) for name, rows in earlier.items()]
        parts += [self.load(general, f"{place}.general", of_general)] if general else []
        return joined(parts) if parts else None

    def _refuse_short(self, name: str, rows_per_batch: float) -> None:
        if rows_per_batch > (held := len(self.sources[name].dataset)):
            raise DataError(
                f"{self.place}.{name}: holds {held} rows, fewer than the {rows_per_batch:.4g} of every effective "
                "batch: give more rows, or a smaller ratio"
            )

    def rows_per_batch(self, batch: int) -> dict[str, float]:
        """Rows of each source with a share, in an effective batch of so many; not whole where the share is of tokens.

        Raises DataError where they leave no room for the task.
        """
        if not self.token_shares:
            return dict(self.quotas)
        fixed, free = sum(self.quotas.values()), 1 - sum(self.token_shares.values())
        if free <= 0:
            raise self._no_room(batch)
        mean = {name: float(rows.lengths().mean()) for name, rows in self.sources.items()}
        in_pool = {name: size for name, size in self.sizes.items() if self._in_pool(name)}
        pool = sum(mean[name] * size for name, size in in_pool.items()) / self.pool
        # With T tokens in a batch: share x T of each, the pool what is left; rows are tokens over their mean length.
        taken = sum(mean[name] * quota for name, quota in self.quotas.items())
        rows_per_token = sum(share / mean[name] for name, share in self.token_shares.items()) + free / pool
        tokens = (batch - fixed + taken / pool) / rows_per_token
        found = self.quotas | {name: share * tokens / mean[name] for name, share in self.token_shares.items()}
        if batch - sum(map(math.ceil, found.values())) < 1:
            raise self._no_room(batch)
        for name, rows in found.items():
            self._refuse_short(name, rows)
        return found

    def _no_room(self, batch: int) -> DataError:
        said = ", ".join(f"{name} {share:.2f}" for name, share in self.token_shares.items())
        return DataError(
            f"{said} of the tokens leave no room for task rows in an effective batch of {batch}: "
            "lower their ratios, or take a larger batch"
        )

    @property
    def origins(self) -> list[str]:
        """What methods call the origins, by number."""
        return self.names

    @property
    def copies(self) -> int:
        """How often the task's rows stand in the dataset."""
        return 1

    @property
    def beside(self) -> int | None:
        """Number of the origin of rows that stand beside the task's."""
        return None

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
        return sum(size for name, size in self.sizes.items() if self._in_pool(name))

    def _in_pool(self, name: str) -> bool:
        return name not in self.quotas and name not in self.token_shares

    def dataset(self) -> datasets.Dataset:
        """All sources one behind the other, each row with its `origin` and `row` number."""
        parts = [self._part(name) for name in self.sources]
        return datasets.concatenate_datasets(
            [part.add_column("origin", [number] * len(part)) for number, part in enumerate(parts)]
        )

    def _part(self, name: str) -> datasets.Dataset:
        rows = self.sources[name].dataset
        return rows.add_column("row", list(range(len(rows))))
