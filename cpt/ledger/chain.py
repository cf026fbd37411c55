"""Entries that are added and never changed: one sqlite file, each entry's hash over the one before it.

    entries: number, at, request, event, body, previous, hash

An entry's hash is the SHA-256 of the canonical JSON (keys sorted, no spaces, ASCII) of its other six fields, where
`body` is an object and `previous` the hash of the entry before. Triggers refuse what is not an addition at the end.
Whoever may write the file can take the triggers away and compute every hash anew: that shows against a head that was
written down elsewhere, and only there.
"""

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from json.encoder import encode_basestring_ascii as quoted
from pathlib import Path
from typing import Any

from cpt.errors import RunDirError

BEGINNING = "0" * 64  # what the first entry names as the hash before it
WAIT = 60.0  # seconds for another writer to finish
FIELDS = "number, at, request, event, body, previous, hash"

_REFUSE = "CREATE TRIGGER {name} BEFORE {what} ON entries {when}BEGIN SELECT RAISE(ABORT, '{why}'); END"
SCHEMA = {
    "entries": "CREATE TABLE entries (number INTEGER PRIMARY KEY, at TEXT NOT NULL, request TEXT NOT NULL, "
    "event TEXT NOT NULL, body TEXT NOT NULL, previous TEXT NOT NULL, hash TEXT NOT NULL)",
    "no_update": _REFUSE.format(name="no_update", what="UPDATE", when="", why="an entry is never changed"),
    "no_delete": _REFUSE.format(name="no_delete", what="DELETE", when="", why="an entry is never removed"),
    # INSERT OR REPLACE deletes without asking a DELETE trigger.
    "only_at_the_end": _REFUSE.format(
        name="only_at_the_end",
        what="INSERT",
        when="WHEN NEW.number IS NOT (SELECT coalesce(max(number), 0) + 1 FROM entries) ",
        why="an entry is added at the end only",
    ),
}
Stored = tuple[int, str, str, str, str, str, str]  # a row of the table, as FIELDS names it


@dataclass(frozen=True)
class Head:
    """Where a chain ends: how many entries it has, and the hash of the last."""

    number: int
    hash: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One event. at: UTC, ISO 8601; request: the id that it is about, or "" for an event of the whole ledger."""

    number: int
    at: str
    request: str
    event: str
    body: dict[str, Any]
    previous: str
    hash: str


Append = Callable[[str, str, Mapping[str, Any]], Entry]  # request, event, body


def canonical(content: Any) -> str:
    """JSON with sorted keys, no spaces, ASCII. Raises ValueError for what is not finite, TypeError for no JSON."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def entry_hash(number: int, at: str, request: str, event: str, body: str, previous: str) -> str:
    """SHA-256 (hex) of an entry. body: canonical JSON, put in as it stands."""
    text = (
        f'{{"at":{quoted(at)},"body":{body},"event":{quoted(event)},"number":{number},'
        f'"previous":{quoted(previous)},"request":{quoted(request)}}}'
    )
    return hashlib.sha256(text.encode()).hexdigest()


class Chain:
    """The entries of a file that need not be there yet: it is made with the first entry.

    `entries` holds what was read on `load`, and what was written since.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[Entry] = []
        self._connection: sqlite3.Connection | None = None
        self._version: int | None = None  # changes when another connection writes
        self._file: tuple[int, int] | None = None

    def head(self) -> Head | None:
        """Where the chain ends, or None while it is empty."""
        return Head(self.entries[-1].number, self.entries[-1].hash) if self.entries else None

    def load(self, known_heads: Mapping[str, Head]) -> list[str]:
        """Read the file; gives every problem of its entries, or of a head that was written elsewhere.

        known_heads: where a head was written -> the head. Raises RunDirError where the file is no such database.
        """
        stored, objects = self._stored() if self.path.is_file() else ([], {})
        self.entries, found = examine(stored)
        return [*(_altered(objects) if objects else []), *found, *strangers(self.entries, known_heads)]

    @contextmanager
    def writing(self) -> Iterator[Append]:
        """One transaction: everything appended in it is on the disk when it ends, or nothing of it is.

        What another process appended meanwhile is read first. Raises RunDirError where the chain is broken, the file
        was put aside or cannot be written.
        """
        with self._spoken():
            connection = self._connected()
            try:
                connection.execute("BEGIN IMMEDIATE")
                self._refresh(connection)
                new: list[Entry] = []
                yield partial(self._append, connection, new)
                connection.execute("COMMIT")
                self.entries += new
            except BaseException:
                self._version = None  # read again: nobody knows how far it came
                if connection.in_transaction:
                    connection.rollback()
                raise

    def close(self) -> None:
        """Let the file go."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _append(
        self, connection: sqlite3.Connection, new: list[Entry], request: str, event: str, body: Mapping[str, Any]
    ) -> Entry:
        last = new[-1] if new else self.entries[-1] if self.entries else None
        number, previous = (last.number + 1, last.hash) if last else (1, BEGINNING)
        at, text = datetime.now(UTC).isoformat(timespec="milliseconds"), canonical(body)
        found = entry_hash(number, at, request, event, text, previous)
        row = (number, at, request, event, text, previous, found)
        connection.execute(f"INSERT INTO entries ({FIELDS}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        new.append(Entry(number, at, request, event, json.loads(text), previous, found))
        return new[-1]

    def _refresh(self, connection: sqlite3.Connection) -> None:
        """Inside a transaction: what others wrote since, and a table where there is none."""
        (version,) = connection.execute("PRAGMA data_version").fetchone()
        if version == self._version:
            return
        stored, objects = _contents(connection)
        if not objects:
            for statement in SCHEMA.values():
                connection.execute(statement)
            objects = SCHEMA
        entries, found = examine(stored)
        own = {"what this process read": head} if (head := self.head()) else {}
        if problems := [*_altered(objects), *found, *strangers(entries, own)]:
            raise RunDirError(*(f"{self.path}: {problem}" for problem in problems))
        self.entries, self._version = entries, version

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = _durable(self.path)
            self._file, self._version = _identity(self.path), None
        if _identity(self.path) != self._file:
            raise RunDirError(
                f"{self.path}: was put aside or replaced while it was in use; put it back, then run again"
            )
        return self._connection

    def _stored(self) -> tuple[list[Stored], dict[str, str]]:
        # Reading makes files beside a write-ahead log; where none can be made nobody writes, and none is needed.
        is_still = (
            not os.access(self.path.parent, os.W_OK) and not self.path.with_name(f"{self.path.name}-wal").exists()
        )
        place = f"{self.path.resolve().as_uri()}?{'immutable=1' if is_still else 'mode=rw'}"
        with self._spoken(), closing(sqlite3.connect(place, timeout=WAIT, uri=True)) as connection:
            return _contents(connection)

    @contextmanager
    def _spoken(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:  # held, not to be written, no room: what is in it is not lost
            step = f"Has another process held it for {WAIT:.0f} s? Else look at its folder's rights and room."
            raise RunDirError(f"{self.path}: cannot be read or written ({error}). {step}") from error
        except sqlite3.DatabaseError as error:
            raise RunDirError(f"{self.path}: cannot be used ({error}). Restore it from a copy.") from error


def _durable(path: Path) -> sqlite3.Connection:
    """A connection whose commits are on the disk when they return; the file is made where there is none."""
    connection = sqlite3.connect(path, timeout=WAIT, isolation_level=None)
    try:
        connection.execute("PRAGMA synchronous = FULL")
        end = time.monotonic() + WAIT
        while True:
            try:  # sqlite does not wait here for another process that makes the file at the same moment
                connection.execute("PRAGMA journal_mode = WAL")
                return connection
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                    raise
                time.sleep(0.02)
    except BaseException:
        connection.close()
        raise


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode: a file put in the place of another has others."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _contents(connection: sqlite3.Connection) -> tuple[list[Stored], dict[str, str]]:
    """Rows by number, and the statements that made what is in the file."""
    objects = dict(connection.execute("SELECT name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"))
    rows = connection.execute(f"SELECT {FIELDS} FROM entries ORDER BY number") if "entries" in objects else []
    return list(rows), objects


# ---- what verification finds --------------------------------------------------------------------------


def examine(stored: Sequence[Stored]) -> tuple[list[Entry], list[str]]:
    """Entries, and what is wrong with them: one changed, gone, or out of its place. One sentence an entry."""
    entries, problems = list[Entry](), list[str]()
    number, previous = 0, BEGINNING
    for row in stored:
        entry, problem = _read(row, number, previous)
        entries += [entry] if entry else []
        problems += [problem] if problem else []
        number, previous = row[0], row[6]
    return entries, problems


def _read(row: Stored, number: int, previous: str) -> tuple[Entry | None, str | None]:
    at = f"entry {row[0]}"
    try:
        entry = Entry(*row[:4], json.loads(row[4]), *row[5:])
        found = entry_hash(*row[:6])
    except (TypeError, ValueError):
        return None, f"{at} was changed: it is no entry of a ledger"
    if found != entry.hash or not isinstance(entry.body, dict):
        return entry, f"{at} was changed: its hash is not that of its content"
    if entry.number != number + 1:
        return entry, f"{at} stands behind entry {number}: what was between them was removed"
    if entry.previous != previous:
        return entry, f"{at} does not follow the entry before it: one of them was changed, removed or moved"
    return entry, None


def _altered(objects: Mapping[str, str]) -> list[str]:
    """A missing trigger, a changed table: somebody made room for changes."""
    names = [name for name in {**SCHEMA, **objects} if SCHEMA.get(name) != objects.get(name)]
    return [f"its table or triggers were changed ({', '.join(sorted(names))})"] if names else []


def strangers(entries: Sequence[Entry], known_heads: Mapping[str, Head]) -> list[str]:
    """Heads that are not on this chain: it was shortened, or written anew with other content."""
    hashes = {entry.number: entry.hash for entry in entries}
    end, problems = max(hashes, default=0), list[str]()
    for where, head in known_heads.items():
        if head.number > end:
            problems.append(f"was shortened: it ends at entry {end}, {where} names entry {head.number}")
        elif hashes.get(head.number) != head.hash:
            problems.append(f"was written anew: entry {head.number} is not the one that {where} names")
    return problems
