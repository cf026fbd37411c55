"""The score matrix as a heat map: a row per stage, a column per set, each cell with its interval and its change.

A share is coloured by its value, from pale to deep. What is no share (a loss, bits per byte) is coloured by how much
better or worse than the base it is, relative to the base's value. Every colour is a class of report.css that brings the
ink readable on it; the text says all that the colour does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cpt.report.read import SURE, RunView, Score, StageFiles, points
from cpt.report.scaffold import isolated

FULL = 700  # cells up to which each shows its interval and change; in a larger map they are in its title
STEPS = (0.02, 0.1, 0.25, 0.5, 1.0)  # of the base's value: a relative change beyond each is one shade deeper
ABSENT = "-"


@dataclass(frozen=True)
class Cell:
    """What one cell shows. own: the stage has just taught this task. change: to the row before."""

    stage: str
    name: str
    text: str
    interval: str
    change: str
    verdict: str
    colour: str
    title: str
    own: bool


@dataclass(frozen=True)
class Row:
    stage: StageFiles
    cells: tuple[Cell, ...]
    average: str


@dataclass(frozen=True)
class Column:
    name: str
    part: str
    measure: str


@dataclass(frozen=True)
class HeatMap:
    """is_full: whether cells show more than the value. cut: sets left out."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    is_full: bool
    cut: int
    averaged: str

    @property
    def has_share(self) -> bool:
        return any(cell.colour.startswith("h") for row in self.rows for cell in row.cells)

    @property
    def has_change(self) -> bool:
        """Whether some cell is coloured by its change since the base."""
        return any(cell.colour[:1] in "bwn" for row in self.rows for cell in row.cells if cell.colour)


def part_of(view: RunView, name: str) -> str:
    """What a set is there for: task, to forget, general."""
    return "task" if name in view.tasks else "to forget" if name in view.forget else "general"


def heat_map(view: RunView, most: int) -> HeatMap:
    """The matrix in at most `most` cells: the first sets of many."""
    names = view.sets[: max(1, most // max(1, len(view.rows)))]
    columns = tuple(Column(name, part_of(view, name), view.measures[name]) for name in names)
    averaged = general_measure(view)
    is_full = len(names) * len(view.rows) <= FULL
    rows = tuple(_row(view, stage, names, averaged, is_full) for stage in view.rows)
    return HeatMap(columns, rows, is_full, len(view.sets) - len(names), averaged)


def general_measure(view: RunView) -> str:
    """The measure most general sets are read by, where it is a share; else empty: an average would mean nothing."""
    first = {name: next((s for row in view.rows if (s := view.score(row, name))), None) for name in view.general}
    measures = [view.measures[name] for name, score in first.items() if score and score.is_percent]
    return max(dict.fromkeys(measures), key=measures.count) if measures else ""


def average(view: RunView, stage: StageFiles, measure: str) -> float | None:
    """Of the general sets that are read by `measure`; None unless the stage was measured on all of them."""
    scores = [view.score(stage, name) for name in view.general if view.measures.get(name) == measure]
    known = [score.value for score in scores if score is not None and score.value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(scores) else None


def shown(score: Score, value: float | None = None) -> str:
    """A value as the tables show it: a share in per cent, else three decimals."""
    value = score.value if value is None else value
    if value is None:
        return "NaN" if score.is_nan else "n/a"
    return points(value) if score.is_percent else f"{value:.3f}"


def signed(change: float, is_percent: bool) -> str:
    """With its sign, a true minus; in points for a share. A change that rounds to nothing has none."""
    text = points(change, "+") if is_percent else f"{change:+.3f}"
    return (text if float(text) else text.lstrip("+-")).replace("-", "\u2212")


def verdict(now: Score, before: Score) -> str:
    """better, worse, or `~` within 1.96 standard errors of a difference; empty where no error is known.

    Of independent scores, which is cautious: the items are the same.
    """
    if now.value is None or before.value is None or now.stderr is None or before.stderr is None:
        return ""
    change = now.value - before.value
    if abs(change) <= SURE * math.hypot(now.stderr, before.stderr):
        return "~"
    return "better" if (change > 0) == now.higher_is_better else "worse"


def _row(view: RunView, stage: StageFiles, names: Sequence[str], averaged: str, is_full: bool) -> Row:
    value = average(view, stage, averaged) if averaged else None
    cells = tuple(_cells(view, stage, names, is_full))
    return Row(stage, cells, ABSENT if value is None else points(value))


def _cells(view: RunView, stage: StageFiles, names: Sequence[str], is_full: bool) -> Iterator[Cell]:
    base, before = (view.rows[0] if view.rows else None), view.before(stage)
    for name in names:
        score = view.score(stage, name)
        own = name == stage.name and not stage.is_base
        place = f"{isolated(name)} after {stage.title}{', {_just(view, name)}' if own else ''}"
        if score is None:
            yield Cell(stage.name, name, ABSENT, "", "", "", "", f"{place}: not measured", own)
            continue
        earlier = view.score(before, name) if before else None
        first = view.score(base, name) if base else None
        cell = _cell(stage, name, score, earlier, first, place, own)
        if name in view.forget and cell.verdict != "~":  # less is meant, and may be too much
            cell = replace(cell, verdict="", title=cell.title.replace(_in_words(cell.verdict), ""))
        yield cell if is_full or score.value is None else replace(cell, title=_in_short(cell))


def _just(view: RunView, name: str) -> str:
    return "which was to forget it" if name in view.forget else "which has just taught it"


def _cell(
    stage: StageFiles, name: str, score: Score, earlier: Score | None, first: Score | None, place: str, own: bool
) -> Cell:
    if score.value is None:
        return Cell(stage.name, name, shown(score), "", "", "", "", f"{place}: {score.reason}", own)
    interval, change, judged = _interval(score), "", ""
    if earlier is not None and earlier.value is not None:
        change, judged = signed(score.value - earlier.value, score.is_percent), verdict(score, earlier)
    said = [f"{place}: {shown(score)}{' %' if score.is_percent else ''}"]
    said += [f"95 % interval {interval}"] if interval else []
    said += [f"{change} since the stage before{_in_words(judged)}"] if change else []
    said += [f"{score.n} items"] if score.n is not None else []
    return Cell(stage.name, name, shown(score), interval, change, judged, _colour(score, first), ", ".join(said), own)


def _in_short(cell: Cell) -> str:
    """The title of one cell of thousands."""
    said = (cell.name, f"after {cell.stage}:", cell.text, cell.interval, cell.change, cell.verdict)
    return " ".join(part for part in said if part)


def _in_words(judged: str) -> str:
    return {"~": " (within its error)", "better": " (better)", "worse": " (worse)"}.get(judged, "")


def _interval(score: Score) -> str:
    ends = score.interval
    return "" if ends is None else f"[{shown(score, ends[0])}, {shown(score, ends[1])}]".replace("-", "\u2212")


def _colour(score: Score, first: Score | None) -> str:
    """h0 to h10 for a share; b1 to b5, w1 to w5 or n0 for a change relative to the base."""
    if score.value is None:
        return ""
    if score.is_percent or (score.higher_is_better and 0 <= score.value <= 1):
        return f"h{round(10 * min(max(score.value, 0.0), 1.0))}"
    if first is None or first.value is None or not first.value:
        return ""
    change = (score.value - first.value) / abs(first.value) * (1 if score.higher_is_better else -1)
    depth = sum(abs(change) > step for step in STEPS)
    return "n0" if not depth else f"{'b' if change > 0 else 'w'}{depth}"
