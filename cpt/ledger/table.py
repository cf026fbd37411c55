"""`cpt ledger list | show | verify`: a ledger as lines and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpt.ledger import Ledger, stage_heads
from cpt.ledger.certificate import Found, compare, head_of
from cpt.ledger.chain import Entry, Head
from cpt.ledger.requests import Request
from cpt.report.summary import aligned

NOBODY_ELSE = "no head was written elsewhere: a ledger that was shortened or written anew would not show"


def listed(ledger: Ledger) -> str:
    """A line a request."""
    lines = [["request", "state", "rows", "asked by", "asked", "stage", "since", "missing"]]
    for one in ledger.requests():
        gaps = str(len(one.missing)) if one.state == "applied" else "-"
        line = [one.id, one.state, f"{len(one.rows):,}", one.who, _minute(one.asked), one.stage or "-"]
        lines.append([*line, _minute(one.since), gaps])
    return aligned(lines, left=True) if len(lines) > 1 else "nobody asked to forget anything in this run"


def shown(ledger: Ledger, id: str) -> str:
    """Everything that is recorded of a request; of its rows their number."""
    one = ledger.get(id)
    facts = {
        "state": f"{one.state} since {_minute(one.since)}",
        "reason": one.reason,
        "missing": "; ".join(one.missing) if one.state == "applied" else "",
        "asked by": f"{one.who}, {_minute(one.asked)}",
        "note": one.note,
        "rows": f"{len(one.rows):,}, as keyed hashes (--json shows them)",
        "stage": one.stage,
        "method": json.dumps(one.method) if one.method else "",
        "model": f"{one.model}, before {one.model_before}" if one.model else "",
        "measured": ", ".join(f"{name} {value:g}" for name, value in one.measurements.items()),
    }
    parts = [aligned([[one.id, ""], *([name, value] for name, value in facts.items() if value)], left=True)]
    if one.checks:
        parts.append(_checks(one))
    parts.append(aligned([["entry", "at", "event", "stage", "hash"], *map(_event, _of(ledger, one))], left=True))
    return "\n\n".join(parts)


def as_json(ledger: Ledger, id: str) -> dict[str, Any]:
    """A request and its entries."""
    one = ledger.get(id)
    return {"request": one.to_json(), "history": [asdict(entry) for entry in _of(ledger, one)]}


def verified(run_dir: Path, certificates: Sequence[Path]) -> tuple[dict[str, Any], str]:
    """What verification finds, as JSON and in words; `problems` is empty where everything agrees. Raises DataError."""
    heads: dict[str, Head] = {str(file): head_of(file) for file in certificates}
    problems = Ledger.problems(run_dir, heads)
    facts: dict[str, Any] = {"problems": problems, "certificates": {}}
    if problems:
        return facts, ""
    with Ledger.open(run_dir) as ledger:
        head, found = ledger.head(), {str(file): compare(ledger, file) for file in certificates}
        facts["head"] = asdict(head) if head else None
        facts["requests"] = len(ledger.requests())
    facts["agrees_with"] = [*stage_heads(run_dir), *heads]
    facts["problems"] = [problem for one in found.values() for problem in one.problems]
    facts["certificates"] = {file: _today(one) for file, one in found.items()}
    return facts, _said(facts, found)


def _said(facts: dict[str, Any], found: dict[str, Found]) -> str:
    head = facts["head"]
    if head is None:
        return "nobody asked to forget anything in this run"
    lines = [f"verifies: {head['number']:,} entries, {facts['requests']:,} requests, head {head['hash']}"]
    heads = facts["agrees_with"]
    lines.append(f"agrees with the heads written in {', '.join(heads)}" if heads else NOBODY_ELSE)
    for file, one in found.items():
        if one.request is not None and not one.problems:
            since = f"; since then {_later(one.request)}" if one.is_outdated else ""
            lines.append(f"{file}: is what the ledger says of {one.request.id}{since}")
    return "\n".join(lines)


def _later(request: Request) -> str:
    return f"it became {request.state} ({_minute(request.since)}{f': {request.reason}' if request.reason else ''})"


def _today(found: Found) -> dict[str, Any]:
    request = found.request
    return {"request": request.id, "state": request.state, "is_outdated": found.is_outdated} if request else {}


def _checks(request: Request) -> str:
    lines = [["check", "measure", "value", "allowed", "n", "reference", "verdict"]]
    for one in request.checks:
        seeds = ", ".join(map(str, one.reference.seeds)) if one.reference else ""
        reference = f"{one.reference.kind}, seeds {seeds}" if one.reference else "-"
        value = "-" if one.value is None else f"{one.value:.4g}"
        verdict = "not measured" if one.value is None else "passed" if one.passed else "failed"
        lines.append([one.name, one.measure, value, one.allowed, f"{one.n:,}", reference, verdict])
    return aligned(lines, left=True)


def _of(ledger: Ledger, request: Request) -> list[Entry]:
    entries = ledger.entries()
    return [entries[number - 1] for number in request.entries]


def _event(entry: Entry) -> list[str]:
    return [str(entry.number), _minute(entry.at), entry.event, entry.body.get("stage") or "-", entry.hash[:12]]


def _minute(at: str) -> str:
    return at[:16].replace("T", " ") + " UTC"
