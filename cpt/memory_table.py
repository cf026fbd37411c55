"""`cpt memory`: what a run keeps of its rows, and rows taken out of it."""

from pathlib import Path

from cpt.data.memory import Memory
from cpt.data.sources import load
from cpt.data.spec import Source
from cpt.report.summary import aligned


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
    """Take the rows of a file out of the memory; a sentence for each entry that changed. Raises DataError."""
    rows = load(Source(file=str(file)), None, "--forget").rows
    said = Memory(folder).forget(row.id for row in rows)
    return [*said, f"{len(rows):,} rows forgotten: no later stage of this run replays them"]
