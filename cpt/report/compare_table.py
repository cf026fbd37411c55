"""A comparison of runs as a table of at most 80 columns, and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from cpt.report.compare import FINAL, Comparison, Group, Quantity, spans_of
from cpt.report.read import points
from eval_harness.metrics import statistics as st

WIDTH = 80
NAME = 16  # columns of a quantity's name; a longer one gets a line of its own
WIDTHS = (19, 19, 22)  # of A, of the other, of the difference
WIDE = 25  # of each, where these do not do and the name has a line of its own


def as_json(found: Comparison) -> dict[str, Any]:
    """Groups and every quantity with its estimates (both intervals) and differences to the first group."""
    first, *later = [group.label for group in found.groups]
    quantities = []
    for one, estimates, differences in zip(found.quantities, found.estimates, found.differences, strict=True):
        said = {key: value for key, value in vars(one).items() if key not in ("drawn", "values")}
        said["values"] = {
            group.label: list(one.values[span])
            for group, span in zip(found.groups, spans_of(found.groups), strict=True)
        }
        said["estimates"] = dict(zip([first, *later], map(_as_json, estimates), strict=True))
        said["differences"] = dict(zip(later, map(_as_json, differences), strict=True))
        quantities.append(said)
    runs = {
        group.label: [{"run": run.name, "seed": run.key[0], "tasks": run.tasks} for run in group.runs]
        for group in found.groups
    }
    return {"first": first, "groups": runs, "quantities": quantities, "notes": list(found.notes)}


def _as_json(found: st.Pooled | None) -> dict[str, Any] | None:
    return None if found is None else {**asdict(found), "shown": asdict(found.shown)}


def text(found: Comparison) -> str:
    """For every group after the first a block with both and their difference: at most 80 columns."""
    letters = [chr(ord("A") + i) if i < 26 else f"#{i + 1}" for i in range(len(found.groups))]
    level = next((e.shown.level for by in found.estimates for e in by if e is not None), st.LEVEL)
    lines = []
    for letter, group in zip(letters, found.groups, strict=True):
        lines += _wrapped(_legend(letter, group))
    lines += [f"shares in %, [ , ] is the {100 * level:g} % interval"]
    for other in range(1, len(found.groups)) or [0]:
        shown = [0, other] if other else [0]
        lines += ["", _line("", [letters[i] for i in shown] + ([f"{letters[other]} - A"] if other else []))]
        lines += _block(found, shown)
    undefined = {one.name: one.reason for one in found.quantities if None in one.values and one.reason}
    remarks = [*(f"{name}: {reason}" for name, reason in undefined.items()), *found.notes]
    return "\n".join([*lines, *(line for remark in remarks for line in _wrapped(remark))])


def _legend(letter: str, group: Group) -> str:
    orders = {tuple(run.tasks) for run in group.runs}
    seeds = ", ".join(str(seed) for seed in sorted({run.key[0] for run in group.runs}))
    said = f"{len(group.runs)} runs, seeds {seeds}" if len(group.runs) > 1 else f"seed {seeds}"
    return f"{letter}  {group.label}: {said}" + (f", {len(orders)} orders" if len(orders) > 1 else "")


def _block(found: Comparison, shown: Sequence[int]) -> Iterator[str]:
    lines = zip(found.quantities, found.estimates, found.differences, strict=True)
    for section, group in groupby(lines, key=lambda line: line[0].section):
        part = list(group)
        measures = [one.measure for one, _, _ in part]
        usual = max(measures, key=measures.count)
        yield f"{section} ({usual})"
        for one, estimates, differences in part:
            cells = [_cell(one, estimates[i], found.groups[i]) for i in shown]
            if shown[-1]:
                cells.append(_cell(one, differences[shown[-1] - 1], None))
            name = f"  {one.name}" if one.measure == usual else f"  {one.name} ({one.measure})"
            if len(name) > NAME or len(_line(name, cells)) > WIDTH:
                yield from textwrap.wrap(name, WIDTH)
                name = ""
            yield from _lines(name, cells)


def _lines(name: str, cells: Sequence[str]) -> list[str]:
    """One line, or what the cells need: changes of a loss are wider than their columns, large values wider still."""
    line = _line(name, cells)
    if len(line) <= WIDTH:
        return [line]
    if max(map(len, cells)) < WIDE:
        return [("    " + "".join(f"{cell:<{WIDE}}" for cell in cells)).rstrip()]
    return [f"    {cell}" for cell in cells]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="   ", break_on_hyphens=False)


def _line(name: str, cells: Sequence[str]) -> str:
    padded = [f"{cell:<{width}}" for cell, width in zip(cells, WIDTHS, strict=False)]
    return " ".join([f"{name:<{NAME}}", *padded]).rstrip()


def _cell(one: Quantity, found: st.Pooled | None, group: Group | None) -> str:
    """Value and interval; of a difference (no group) with their signs."""
    if found is None:
        return "-"
    shown = found.shown
    if group is not None and shown.low is None and one.formula == FINAL:
        shown = _at_its_end(one, group, shown)
    is_change = group is None or (one.section == "the stream" and not one.formula.startswith("AP"))
    value = _number(found.value, one.is_share, is_change)
    if shown.low is None or shown.high is None:
        return value
    ends = [shown.low, shown.high]
    if one.is_share:  # Student's t knows no bounds, a share does
        ends = [min(max(end, -1.0 if is_change else 0.0), 1.0) for end in ends]
    return f"{value} [{','.join(_number(end, one.is_share, is_change) for end in ends)}]"


def _at_its_end(one: Quantity, group: Group, shown: st.Estimate) -> st.Estimate:
    """Where all items of all runs are right, or none, the binomial interval: resampling is blind there."""
    last = [run.result(len(run.rows) - 1, one.sets[0], one.measure) for run in group.runs]
    values = {value for result in last if result is not None for value in result.per_item.values()}
    if last[0] is None or values not in ({0.0}, {1.0}):
        return shown
    return st.bootstrap(last[0].per_item, level=shown.level)


def _number(value: float, is_share: bool, sign: bool) -> str:
    mark = "+" if sign else ""
    if is_share:
        return points(value, mark)
    size = abs(value)
    return f"{value:{mark}{'.3f' if 0.1 <= size < 10 else '.4g' if size >= 10 else '.2g'}}"
