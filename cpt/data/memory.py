"""What outlives a stage, in RUN/memory: replayed rows, and what was computed of rows; each says which rows it holds.

An entry is a folder with an `about.json`, written last:

    of         what it holds: rows, regions, features, top_k, fisher, ...
    rows       ids of the rows that it holds or was computed of
    aggregate  true where no single row can be taken out of it

A forgotten row leaves every entry. Rows are cut out of their file; what was computed of them goes whole, and is
computed again, without them, where a later stage needs it. `forgotten.json` keeps digests of the ids alone, so that no
file here tells which rows they were.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cpt.data.sources import Loaded, part_of
from cpt.errors import DataError
from eval_harness.rows import Row
from eval_harness.sources import fingerprint

ABOUT, ROWS, FORGOTTEN = "about.json", "rows.jsonl", "forgotten.json"


@dataclass(frozen=True)
class Entry:
    """One folder of the memory that is finished, and what it says of itself."""

    folder: Path
    about: dict[str, Any]

    @property
    def rows(self) -> list[str]:
        """Ids of the rows it holds or was computed of."""
        return list(self.about.get("rows", []))

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())


@dataclass(frozen=True)
class Memory:
    """A run's folder `memory`; it need not be there."""

    folder: Path

    def entries(self) -> Iterator[Entry]:
        """Every finished one, by name."""
        for file in sorted(self.folder.glob(f"*/{ABOUT}")):
            yield Entry(file.parent, json.loads(file.read_text(encoding="utf-8")))

    def keep_rows(self, name: str, loaded: Loaded, about: dict[str, Any]) -> Loaded:
        """The rows as they are kept here: written as NAME-hash/rows.jsonl, with source, licence and hash.

        about: further words for the manifest, JSON. What is there already is read instead.
        """
        folder = entry(self.folder, name, {**about, "sha256": loaded.fingerprint})
        if not (folder / ABOUT).is_file():
            self.write_rows(folder, loaded, about)
        return replace(loaded, rows=read_rows(folder / ROWS))

    def write_rows(self, folder: Path, loaded: Loaded, about: dict[str, Any]) -> None:
        """Write an entry of rows: rows.jsonl, then what it says of itself."""
        folder.mkdir(parents=True, exist_ok=True)
        self._write(folder, loaded.rows)
        said = {"of": "rows", "aggregate": False, "rows": [row.id for row in loaded.rows]}
        said |= {"source": loaded.label, "licences": list(loaded.licences), "sha256": loaded.fingerprint}
        write_about(folder, said | about)

    def forget(self, ids: Iterable[str]) -> list[str]:
        """Take rows out of every entry; a sentence for each that changed. Interrupted, it is done again from the start.

        Rows files are cut, every other entry that was computed of one of the rows is removed, and what a stopped stage
        left unfinished too.
        """
        gone = set(ids)
        self._remember(gone)
        for folder in [one for one in self.folder.iterdir() if one.is_dir() and not (one / ABOUT).is_file()]:
            shutil.rmtree(folder)
        for file in self.folder.rglob("*.partial"):
            file.unlink()
        return [self._cut(entry, gone & set(entry.rows)) for entry in list(self.entries()) if gone & set(entry.rows)]

    def without_forgotten(self, loaded: Loaded) -> Loaded:
        """The rows that nobody asked to forget."""
        marks = self.marks()
        if not marks or not any(mark(row.id) in marks for row in loaded.rows):
            return loaded
        rows = [row for row in loaded.rows if mark(row.id) not in marks]
        return part_of(loaded, rows)

    def check(self) -> None:
        """Raise DataError for every entry that holds a forgotten row still: a copied folder, a removal cut short."""
        marks = self.marks()
        found = (
            {entry.folder: sum(mark(row) in marks for row in entry.rows) for entry in self.entries()} if marks else {}
        )
        if held := {folder: n for folder, n in found.items() if n}:
            raise DataError(
                *(
                    f"{folder}: holds {n} forgotten rows; remove the folder, it is made again"
                    for folder, n in held.items()
                )
            )

    def marks(self) -> set[str]:
        """Digests of the forgotten rows' ids."""
        file = self.folder / FORGOTTEN
        return set(json.loads(file.read_text(encoding="utf-8"))["digests"]) if file.is_file() else set()

    def _remember(self, ids: set[str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_json(self.folder / FORGOTTEN, {"digests": sorted(self.marks() | {mark(row) for row in ids})})

    def _cut(self, entry: Entry, gone: set[str]) -> str:
        if entry.about["of"] != "rows":
            (entry.folder / ABOUT).unlink()  # first: half of an entry must not pass for one
            shutil.rmtree(entry.folder)
            return f"{entry.folder.name}: removed, it was computed of {len(gone)} of the rows"
        kept = [row for row in read_rows(entry.folder / ROWS) if row.id not in gone]
        self._write(entry.folder, kept)
        about = entry.about | {"rows": [row.id for row in kept], "sha256": fingerprint(kept)}
        write_about(entry.folder, about)
        return f"{entry.folder.name}: {len(gone)} rows taken out, {len(kept)} left"

    def _write(self, folder: Path, rows: Sequence[Row]) -> None:
        _replace(folder / ROWS, "".join(json.dumps(asdict(row)) + "\n" for row in rows))


def entry(memory: Path, name: str, about: dict[str, Any]) -> Path:
    """The folder of an entry: its name, and a hash of what decides its content."""
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return memory / f"{name}-{key}"


def mark(row: str) -> str:
    """What is kept of a forgotten row's id."""
    return hashlib.sha256(f"forgotten {row}".encode()).hexdigest()


def read_rows(file: Path) -> list[Row]:
    """The rows of a rows.jsonl."""
    with open(file, encoding="utf-8") as lines:
        return [_row(json.loads(line)) for line in lines]


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Say what an entry holds: from here on it is finished."""
    _write_json(folder / ABOUT, about)


def _row(fields: dict[str, Any]) -> Row:
    """A row as `asdict` wrote it: JSON has lists where a row has tuples."""
    plain: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in fields.items()}
    return Row(**plain)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    _replace(file, json.dumps(value, indent=1, sort_keys=True))


def _replace(file: Path, text: str) -> None:
    """Write by rename; several processes of a launch may write the same at once."""
    aside = file.with_name(f"{file.name}.{secrets.token_hex(4)}.partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, file)


# ---- which rows of earlier stages are kept ------------------------------------------------------------


def chosen(
    parts: Sequence[Loaded],
    select: str,
    budget: float | None,
    seed: int,
    losses: Callable[[Loaded], Sequence[float]] | None = None,
) -> list[Loaded]:
    """The rows of finished stages within a budget, stage by stage; those that keep none are left out.

    select: `reservoir` and `balanced` share out a budget of all rows; `random`, `highest_loss` and `lowest_loss` have
    one for each stage, as `per_stage` takes it.
    """
    if select in ("reservoir", "balanced"):
        share_out = reservoir if select == "reservoir" else balanced
        rows = share_out([part.rows for part in parts], int(budget or 0), seed)
    else:
        orders = [None if select == "random" else partial(_by_loss, losses, part, select) for part in parts]
        rows = [per_stage(part.rows, budget, seed, order) for part, order in zip(parts, orders, strict=True)]
    return [part_of(part, mine) for part, mine in zip(parts, rows, strict=True) if mine]


def _by_loss(losses: Callable[[Loaded], Sequence[float]] | None, part: Loaded, select: str) -> list[int]:
    assert losses is not None
    found = losses(part)
    return sorted(range(len(found)), key=lambda i: found[i], reverse=select == "highest_loss")


def per_stage(
    rows: Sequence[Row], budget: float | None, seed: int, order: Callable[[], Sequence[int]] | None
) -> list[Row]:
    """A budget of one stage's rows, in their order.

    budget: rows, a share of them below 1, or None for all. order: row numbers, the most wanted first; None draws them.
    """
    n = (
        len(rows)
        if budget is None
        else min(len(rows), max(1, round(budget * len(rows))) if budget < 1 else int(budget))
    )
    if n == len(rows):
        return list(rows)
    wanted = order() if order is not None else np.random.default_rng([seed, 1]).permutation(len(rows))
    return [rows[i] for i in sorted(int(i) for i in wanted[:n])]


def reservoir(stages: Sequence[Sequence[Row]], budget: int, seed: int) -> list[list[Row]]:
    """Each row of all stages so far with the same chance: algorithm R (Vitter 1985) over the stream.

    What is kept after a stage is what was kept before, some rows replaced by new ones.
    """
    kept: list[tuple[int, int]] = []
    draw = np.random.default_rng(seed)
    places = ((s, i) for s, rows in enumerate(stages) for i in range(len(rows)))
    for n, place in enumerate(places):
        if n < budget:
            kept.append(place)
        elif (slot := int(draw.integers(n + 1))) < budget:
            kept[slot] = place
    return [[rows[i] for i in sorted(i for at, i in kept if at == s)] for s, rows in enumerate(stages)]


def balanced(stages: Sequence[Sequence[Row]], budget: int, seed: int) -> list[list[Row]]:
    """Equally many rows of every stage; what a short stage leaves goes to the others."""
    shares, left = [0] * len(stages), budget
    by_size = sorted(range(len(stages)), key=lambda s: len(stages[s]))
    for rank, s in enumerate(by_size):
        shares[s] = min(len(stages[s]), left // (len(stages) - rank))
        left -= shares[s]
    return [
        per_stage(rows, n, seed + s, None) if n else [] for s, (rows, n) in enumerate(zip(stages, shares, strict=True))
    ]
