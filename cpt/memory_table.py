"""`cpt memory`: what a run keeps of its rows, and rows taken out of it."""

import json
from dataclasses import fields
from pathlib import Path

from cpt.data.memory import Memory
from cpt.data.sources import load
from cpt.data.spec import Source
from cpt.report.summary import aligned
from eval_harness.rows import Row


def text(folder: Path) -> str:
    """A line an entry: its name, what it holds, of how many rows, from where, its size."""
    entries = list(Memory(folder).entries())
    if not entries:
        return "nothing is kept: no method of the stages so far needs it"
    lines = [["entry", "holds", "rows", "source", "KiB"]]
    for one in entries:
        source = ", ".join([one.about.get("source", "-"), *one.about.get("licences", [])])
        lines.append([one.folder.name, one.about["of"], f"{len(one.rows):,}", source, f"{one.bytes / 1024:,.0f}"])
    forgotten = len(Memory(folder).marks())
    return aligned(lines, left=True) + (f"\n{forgotten:,} rows are forgotten" if forgotten else "")


def forget_rows(folder: Path, file: Path) -> list[str]:
    """Take the rows of a file, data or lines of a rows.jsonl, out of the memory; a sentence for each changed entry.

    Raises DataError.
    """
    ids = _kept(file) or [row.id for row in load(Source(file=str(file)), None, "--forget").rows]
    said = Memory(folder).forget(ids)
    return [*said, f"{len(ids):,} rows forgotten: no later stage of this run replays them"]


def _kept(file: Path) -> list[str]:
    """Ids of rows that were copied out of a memory, which keeps the id of a row whose answer was written anew."""
    own = {one.name for one in fields(Row)}
    try:
        with open(file, encoding="utf-8") as lines:
            found = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError):
        return []  # `load` says what is wrong with it
    return (
        [str(row["id"]) for row in found] if all(isinstance(row, dict) and row.keys() == own for row in found) else []
    )
