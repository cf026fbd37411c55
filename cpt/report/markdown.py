"""The report's facts as GitHub markdown, for a pull request: headline, matrix, changes, cost; under 60 kB."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from itertools import groupby

from cpt.report import facts
from cpt.report.headline import Headline
from cpt.report.heatmap import ABSENT, HeatMap, Row, heat_map, part_of, signed, verdict
from cpt.report.read import RunView
from cpt.report.scaffold import clip

LARGEST = 58_000  # bytes; GitHub refuses a comment of 65,536 characters
CELLS = (1200, 400, 120, 30)  # of the matrix: as many as fit
CHANGES = 30  # sets with a line of their own
SHARP = re.compile(r"([\\`*_\[\]<>|#~$@!&])")


def markdown(view: RunView, head: Headline) -> str:
    """By the first of CELLS that makes it small enough; every name is escaped."""
    text = ""
    for most in CELLS:
        text = "\n".join(_lines(view, head, most)) + "\n"
        if len(text.encode()) <= LARGEST:
            return text
    return text.encode()[:LARGEST].decode(errors="ignore") + "\n\n(cut here; all of it is in report.html)\n"


def plain(text: str) -> str:
    """Text that markdown and HTML leave as it is, on one line."""
    return SHARP.sub(r"\\\1", " ".join(clip(str(text), facts.LONGEST).split()))


def _lines(view: RunView, head: Headline, most: int) -> Iterator[str]:
    yield f"## {plain(view.name)}: {plain(head.verdict)}"
    yield f"\n{plain(head.status)}\n"
    for tile in head.tiles:
        yield f"- **{tile.title}: {plain(tile.figure)} {plain(tile.unit)}.** {plain(tile.sentence)}"
    for problem in view.problems[:10]:
        yield f"- {plain(problem)}"
    found = heat_map(view, most)
    if found.rows:
        yield "\n### Scores after each stage\n"
        yield from _matrix(found)
    if len(view.rows) > 1:
        yield "\n### What changed\n"
        yield from _changes(view)
    if rows := facts.metrics(view)[:40]:
        yield "\n### Metrics\n"
        yield from _table(("measure", "value", "formula", ""), rows)
    if costs := facts.cost(view):
        yield "\n### Cost\n"
        yield from _table(facts.COST, costs[-40:])
    yield "\n### To repeat\n\n```sh"
    for what, words in facts.commands(view):
        yield f"{shlex.join(words)}  # {what}".replace("```", "")
    yield "```"


def _matrix(found: HeatMap) -> Iterator[str]:
    average = ("(general)",) if found.averaged else ()
    header = ("after stage", *(column.name for column in found.columns), *average)
    yield from _table(header, [_row(row, bool(average)) for row in found.rows])
    cut = f" {found.cut} more sets are in matrix.json." if found.cut else ""
    yield (
        "\nShares in %, other measures as they are; bold: the task its stage has just taught. "
        f"{ABSENT} was not measured, NaN is no number.{cut}"
    )


def _row(row: Row, averaged: bool) -> tuple[str, ...]:
    cells = tuple(_Bold(cell.text) if cell.own and cell.text != ABSENT else cell.text for cell in row.cells)
    return (row.stage.title, *cells, *((row.average,) if averaged else ()))


class _Bold(str):
    """A cell that the table prints bold."""


def _changes(view: RunView) -> Iterator[str]:
    """Every set: at the base, before the last stage, at the end."""
    base, last = view.rows[0], view.rows[-1]
    rows = []
    for name in view.sets:
        first, now = view.score(base, name), view.score(last, name)
        if first is None or now is None or first.value is None or now.value is None:
            continue
        change, judged = signed(now.value - first.value, now.is_percent), verdict(now, first)
        part = part_of(view, name)
        rows.append((part, name, change, "" if part == "to forget" and judged != "~" else judged))
    for part, listed in groupby(rows, key=lambda row: row[0]):
        kept = list(listed)
        said = [f"{plain(name)} {change} {judged}".rstrip() for _, name, change, judged in kept[:CHANGES]]
        more = f", and {len(kept) - CHANGES} more" if len(kept) > CHANGES else ""
        yield f"- {'tasks' if part == 'task' else part}, since the base: {'; '.join(said)}{more}"
    yield "\n~: within 1.96 standard errors of a difference."


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(map(plain, header))} |"
    yield f"|---{'|---:' * (len(header) - 1)}|"
    for row in rows:
        yield f"| {' | '.join(f'**{plain(cell)}**' if isinstance(cell, _Bold) else plain(cell) for cell in row)} |"
