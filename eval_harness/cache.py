"""Records that were scored before, by what decides them: one sqlite file that several runs may share.

A key is the digest of the weights' identity, the tokenizer, the item, the settings and the library versions. A
record is there whole or not at all: a killed writer leaves no entry, sqlite rolls its transaction back.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache as once
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

VERSION = 2  # of what a record means
LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes")
FLAGS = ("add_bos_token", "add_eos_token", "eos_token_id", "clean_up_tokenization_spaces", "split_special_tokens")
WAIT = 60.0  # seconds for another writer to finish
AT_ONCE = 500  # keys of one query; sqlite's limit is 999 in old builds


class CacheError(ValueError):
    """A cache that cannot be used; names the file and the next step."""


class Cache:
    """Records by key. Only one process of a launch should hold it."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def get(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The records that are there, by key.

        Raises:
            CacheError: the file is damaged, or cannot be opened.
        """
        wanted = list(dict.fromkeys(keys))
        if not self.path.exists():
            return {}
        found: dict[str, dict[str, Any]] = {}
        with self._open() as database:
            for at in range(0, len(wanted), AT_ONCE):
                part = wanted[at : at + AT_ONCE]
                marks = ",".join("?" * len(part))
                rows = database.execute(f"SELECT key, record FROM records WHERE key IN ({marks})", part)
                found |= {key: json.loads(record) for key, record in rows}
        return found

    def put(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep records, all of them or none.

        Raises:
            CacheError: the file is damaged, cannot be written, or another process holds it for a minute.
        """
        if not records:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [(key, json.dumps(record, separators=(",", ":"))) for key, record in records.items()]
        with self._open() as database, database:
            database.executemany("INSERT OR REPLACE INTO records VALUES (?, ?)", rows)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            database = sqlite3.connect(self.path, timeout=WAIT)
            try:
                with database:
                    database.execute("CREATE TABLE IF NOT EXISTS records (key TEXT PRIMARY KEY, record TEXT NOT NULL)")
                yield database
            finally:
                database.close()
        except sqlite3.OperationalError as error:  # held, not to be written, no room: what is in it is not lost
            step = f"Has another process held it for {WAIT:.0f} s? Else look at its folder's rights and room."
            raise CacheError(f"{self.path}: cannot be read or written ({error}). {step}") from error
        except (sqlite3.DatabaseError, ValueError) as error:
            step = "Delete it: what it held is measured again."
            raise CacheError(f"{self.path}: cannot be used ({error}). {step}") from error


def digest(*parts: Any) -> str:
    """SHA-256 (hex) of the parts as canonical JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 over what decides a tokenizer's ids and texts: its state, special tokens, chat template and flags."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    else:  # what stands before the added tokens is the padding and truncation that the last call asked for
        state = backend.to_str()
        state = state[state.index('"added_tokens"') :]
    flags = {name: getattr(tokenizer, name, None) for name in FLAGS}
    return digest(type(tokenizer).__name__, state, tokenizer.chat_template, tokenizer.special_tokens_map, flags)


@once
def versions() -> dict[str, str]:
    """Versions of the libraries that scores depend on, of those that are installed."""
    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
