"""What a stage changed: every set's score now, against the stage before and against the base, a line each."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from cpt.report.read import points
from cpt.report.summary import cell, forget, is_percent, primary
from cpt.terminal import Marked

MOST = 24  # lines; of more sets, those that changed most
SURE = 1.96  # standard errors of a difference
TO_FORGET = "to forget"
WIDTH = 80


class Line(NamedTuple):
    """One set after a stage. size: of its change in standard errors, which decides what is shown of many."""

    name: str
    part: str  # learned, earlier, general
    measure: str
    now: str
    change: str
    verdict: str  # better, worse, ~, or nothing where no error is known
    since_base: str
    size: float


HEAD = Line("", "", "", "now", "change", "", "since base", 0.0)


def changes(matrix: dict[str, Any], index: int) -> list[Marked]:
    """A header and a line per set for the stage of this index; nothing for one that was not measured.

    A change within 1.96 standard errors of a difference (of independent scores: cautious, for the items are the same)
    is marked `~`. Tests of later stages are left out.
    """
    rows = {row["index"]: row for row in matrix["rows"]}
    if index not in rows:
        return []
    here, base = rows[index], rows.get(0)
    lines = [
        _line(matrix, name, part, here, rows.get(index - 1), base)
        for name, part in _sets(matrix, here)
        if (measure := primary(matrix, name)) and measure in here["scores"].get(name, {})
    ]
    shown = sorted(lines, key=lambda line: -line.size)[:MOST]
    table = [HEAD._replace(name=f"after {here['stage']}"), *(line for line in lines if line in shown)]
    said = _aligned(table)
    if len(lines) > MOST:
        said.append(Marked(f"    {len(lines) - MOST} more sets changed less: matrix.json, or `cpt report`"))
    if index == 1 and any(line.verdict == "~" for line in lines):
        said.append(Marked(f"    ~: within {SURE} standard errors of the difference"))
    return said


def _sets(matrix: dict[str, Any], here: dict[str, Any]) -> list[tuple[str, str]]:
    """The stage's own test, those of earlier stages, the general sets; all of them for the base."""
    tasks, general = matrix["tasks"], [(name, "general") for name in matrix["general"]]
    if here["index"] == 0:
        return [*((name, "to learn") for name in tasks), *((name, TO_FORGET) for name in forget(matrix)), *general]
    trained = {row["stage"] for row in matrix["rows"] if row["index"] < here["index"]}
    own = [(name, "learned") for name in tasks if name == here["stage"]]
    known = [name for name in forget(matrix) if name in trained | {here["stage"]}]
    earlier = [(name, "earlier") for name in tasks if name in trained]
    return [*own, *((name, TO_FORGET) for name in known), *earlier, *general]


def _line(
    matrix: dict[str, Any],
    name: str,
    part: str,
    here: dict[str, Any],
    before: dict[str, Any] | None,
    base: dict[str, Any] | None,
) -> Line:
    measure = primary(matrix, name) or ""
    now = here["scores"][name][measure]
    earlier, first = (
        row["scores"].get(name, {}).get(measure) if row is not None and row is not here else None
        for row in (before, base)
    )
    change, size = _difference(now, earlier), _size(now, earlier)
    verdict = ""
    if change and size is not None and (part != TO_FORGET or abs(size) <= SURE):  # less is meant, and may be too much
        verdict = "~" if abs(size) <= SURE else "better" if (size > 0) == now["higher_is_better"] else "worse"
    percent = is_percent(now)
    return Line(
        name,
        part,
        measure,
        cell(now),
        _signed(change, percent),
        verdict,
        _signed(_difference(now, first), percent),
        abs(size or 0.0),
    )


def _difference(now: dict[str, Any], before: dict[str, Any] | None) -> float | None:
    if before is None or now["value"] is None or before["value"] is None:
        return None
    return now["value"] - before["value"]


def _size(now: dict[str, Any], before: dict[str, Any] | None) -> float | None:
    """A change in standard errors, infinite where both errors are 0; None where one is not known."""
    change = _difference(now, before)
    if change is None or before is None or now["stderr"] is None or before["stderr"] is None:
        return None
    error = math.hypot(now["stderr"], before["stderr"])
    return change / error if error else math.copysign(math.inf, change) if change else 0.0


def _signed(change: float | None, percent: bool) -> str:
    if change is None:
        return ""
    text = points(change, "+") if percent else f"{change:+.3f}"
    return text if float(text) else text.lstrip("+-")


def _aligned(table: Sequence[Line]) -> list[Marked]:
    """Columns as wide as their widest cell; names give way where a line would be wider than 80."""
    columns = list(zip(*(line[:-1] for line in table), strict=True))
    if not any(columns[4][1:]):  # the base: nothing to compare with
        columns[4] = columns[5] = columns[6] = ("",) * len(table)
    widths = [max(map(len, column)) for column in columns]
    spare = WIDTH - 4 - sum(width + 2 for width in widths[1:] if width)
    widths[0] = min(widths[0], max(spare, 12))
    return [_marked(cells, widths, head=number == 0) for number, cells in enumerate(zip(*columns, strict=True))]


def _marked(cells: Sequence[str], widths: Sequence[int], head: bool) -> Marked:
    name, part, measure, *numbers = cells
    name = name if len(name) <= widths[0] else name[: widths[0] - 3] + "..."
    text = "    " + "  ".join([name.ljust(widths[0]), part.ljust(widths[1]), measure.ljust(widths[2])])
    parts = [(4, 4 + len(name), "head")] if head else []
    verdict = cells[5]
    for place, (value, width) in enumerate(zip(numbers, widths[3:], strict=True)):
        if not width:
            continue
        padded = value.ljust(width) if place == 2 else value.rjust(width)
        if place in (1, 2) and verdict in ("better", "worse"):
            parts.append((len(text) + 2, len(text) + 2 + width, verdict))
        text += "  " + padded
    return Marked.of(text.rstrip(), parts)
