"""A certificate: what a ledger says of one verified request, with the head it stood at, for whoever asked.

It proves nothing by itself. Held against the ledger it shows whether that still says the same, and the head in it,
kept where the run's owner cannot write, is what a ledger that was shortened or written anew fails against.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt.checkpoints import write_json
from cpt.errors import ConfigError, DataError
from cpt.ledger import Head, Ledger
from cpt.ledger.chain import Entry
from cpt.ledger.requests import Request, advance

KIND = "certificate of a cpt ledger"
NOT_SAID = "Models and files made before `model`, and copies of them, still hold what was forgotten."


@dataclass(frozen=True)
class Found:
    """A certificate held against a ledger: what does not agree, and what the request's state is today."""

    problems: list[str]
    request: Request | None = None
    is_outdated: bool = False


def issue(ledger: Ledger, id: str) -> dict[str, Any]:
    """The certificate of a verified request, JSON. Raises ConfigError for any other, with what is missing."""
    request = ledger.get(id)
    if request.state != "verified":
        why = f": {request.reason}" if request.reason else ""
        lacks = f"; missing: {', '.join(request.missing)}" if request.missing else ""
        raise ConfigError(f"{id}: is {request.state}{why}{lacks}. A certificate is given of a verified request.")
    return _said(request, ledger.entries())


def write(ledger: Ledger, id: str, to: Path, *, force: bool = False) -> None:
    """Write a request's certificate. Raises ConfigError for a file that is there (unless force), as `issue` does."""
    found = issue(ledger, id)
    if to.exists() and not force:
        raise ConfigError(f"{to}: is there already. Name another file, or use --force.")
    try:
        write_json(to, found)
    except OSError as error:
        raise ConfigError(f"{to}: cannot be written ({error.strerror}). Name another file.") from error


def read(file: Path) -> dict[str, Any]:
    """A certificate's content. Raises DataError for a file that is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file}: cannot be read as JSON ({error}). Name a file that cpt ledger certificate wrote."
        ) from error
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise DataError(f"{file}: is no certificate of a ledger. Name a file that cpt ledger certificate wrote.")
    return found


def head_of(file: Path) -> Head:
    """The head that a certificate names. Raises DataError."""
    try:
        head = read(file)["head"]
        return Head(int(head["number"]), str(head["hash"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}: names no head ({error}). Ask for the certificate as it was given.") from error


def compare(ledger: Ledger, file: Path) -> Found:
    """What a certificate says beside what the ledger said at its head. Raises DataError for a file that is none."""
    said, head = read(file), head_of(file)
    entries = ledger.entries()[: head.number]
    if ledger.head() is None or head != Head(len(entries), entries[-1].hash if entries else ""):
        return Found([f"{file}: names head {head.number} {head.hash[:12]}, which is not on this ledger"])
    then = _as_of(entries)
    id = str(said.get("request", {}).get("id") if isinstance(said.get("request"), dict) else None)
    if id not in then or then[id].state != "verified":
        return Found([f"{file}: at entry {head.number} the ledger has no verified request {id!r}"])
    expected = _said(then[id], entries)
    wrong = [name for name in {**expected, **said} if said.get(name) != expected.get(name)]
    problems = [f"{file}: what it says of {name} is not what the ledger says" for name in wrong]
    today = ledger.get(id)
    return Found(problems, today, is_outdated=today.entries != then[id].entries)


def _as_of(entries: list[Entry]) -> dict[str, Request]:
    """Requests as these entries leave them."""
    requests: dict[str, Request] = {}
    for entry in entries:
        requests |= advance(requests, entry)
    return requests


def _said(request: Request, entries: list[Entry]) -> dict[str, Any]:
    """The certificate: every part of it follows from these entries, so equal ones give equal bytes."""
    content = request.to_json()
    head, verdict = entries[-1], entries[request.entries[-1] - 1]
    asked = ("id", "who", "asked", "note", "rows")
    return {
        "kind": KIND,
        "schema": 1,
        "head": {"number": head.number, "hash": head.hash},
        "request": {name: content[name] for name in asked} | {"row_hash": "HMAC-SHA256 under the run's key"},
        "verified": request.since,
        "entry": {"number": verdict.number, "hash": verdict.hash},
        **{name: content[name] for name in ("stage", "method", "model_before", "model", "measurements", "checks")},
        "versions": content["versions"],
        "not_said": NOT_SAID,
    }
