"""Ledgers to test with: a run folder with requests in every state, and hands that edit its file past its triggers."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpt.ledger import HEAD_FACT, Check, Ledger, Reference
from cpt.ledger.chain import SCHEMA
from eval_harness.rows import Row

STAGE, BEFORE, AFTER, LATER = "01_forget", "model-before", "model-after", "model-later"
NAMES = ("forget_quality", "extraction", "relearning", "four_bit", "paraphrase")
REFERENCE = Reference(seeds=(0, 1, 2), n=40)
COLUMNS = ("number", "at", "request", "event", "body", "previous", "hash")


def row(i: int) -> Row:
    return Row("completion", prompt=f"Where does person {i} live?", completion=f"In the village number {i}.")


def check(name: str, value: float | None = 0.1, **other: Any) -> Check:
    return Check(name, f"{name} v1", value, 40, **{"high": 0.2, "reference": REFERENCE} | other)


def checks(**values: float | None) -> list[Check]:
    """All that a verified request needs, passed but where a value says otherwise."""
    return [check(name, values.get(name, 0.1)) for name in NAMES]


def apply(ledger: Ledger, id: str, **other: Any) -> None:
    said: dict[str, Any] = {"stage": STAGE, "method": {"type": "flat", "divergence": "tv"}}
    said |= {"model_before": BEFORE, "model_after": AFTER, "measurements": {"kl_nats": 0.01}}
    ledger.apply(id, **said | other)


def verified(ledger: Ledger, i: int) -> str:
    id = ledger.request([row(i)], f"ticket {i}")
    apply(ledger, id)
    ledger.verify_request(id, checks(), stage=STAGE, model=AFTER)
    return id


def written(folder: Path) -> Path:
    """Seven entries: R1 verified, R2 applied, R3 requested."""
    with Ledger.open(folder) as ledger:
        verified(ledger, 1)
        apply(ledger, ledger.request([row(2), row(3)], "ticket 2"))
        ledger.request([row(4)], "ticket 3")
    return folder


def done(folder: Path, stage: str, **head: Any) -> None:
    """A stage's DONE with the ledger's head, or another."""
    with Ledger.open(folder) as ledger:
        found = ledger.head()
    assert found is not None
    file = folder / "stages" / stage / "DONE"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"identity": "x", "facts": {HEAD_FACT: asdict(found) | head}}))


def stored(folder: Path) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(folder / "ledger.sqlite")) as connection:
        return [dict(zip(COLUMNS, one, strict=True)) for one in connection.execute("SELECT * FROM entries")]


def edit(folder: Path, *statements: str) -> None:
    """What somebody with the file can do: triggers away, changes, triggers as they were."""
    with closing(sqlite3.connect(folder / "ledger.sqlite", isolation_level=None)) as connection:
        triggers = [name for name in SCHEMA if name != "entries"]
        for statement in (*(f"DROP TRIGGER {name}" for name in triggers), *statements):
            connection.execute(statement)
        for name in triggers:
            connection.execute(SCHEMA[name])


def hash_of(entry: dict[str, Any]) -> str:
    """As docs/ledger.md says it, with nothing of cpt's."""
    content = {name: value for name, value in entry.items() if name != "hash"}
    content["body"] = json.loads(entry["body"])
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def rehash(folder: Path) -> None:
    """Number the entries anew and give each the hash that follows from the one before: a chain without a seam."""
    previous, statements = "0" * 64, ["UPDATE entries SET number = -number"]
    for number, entry in enumerate(stored(folder), start=1):
        found = hash_of(entry | {"number": number, "previous": previous})
        statements.append(
            f"UPDATE entries SET number = {number}, previous = '{previous}', hash = '{found}' "
            f"WHERE number = -{entry['number']}"
        )
        previous = found
    edit(folder, *statements)
