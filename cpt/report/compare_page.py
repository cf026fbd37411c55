"""A comparison of runs as one self-contained page: trade-offs, intervals, matrices, cost, what differs between streams.

The page has a size whatever is compared: columns of a matrix and keys that differ are cut, counted, and the file that
holds all of them is named.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cpt.errors import ConfigError
from cpt.report import compare_table, summary
from cpt.report.compare import FINAL, Comparison, Group, Quantity, RunFiles, labels, spans_of
from cpt.report.pareto import GENERAL, Spot, TradeOff, trade_offs
from cpt.report.plane import Dot, plane
from cpt.report.scaffold import isolated, page
from cpt.report.stream_diff import ABSENT, differing
from eval_harness.metrics import statistics as st

MOST_VALUES = 3_000  # of keys that differ, over all groups
MOST_CELLS = 10_000  # of all matrices together
COSTS = ("training, s", "evaluation, s", "tokens", "tokens/s", "peak memory, GiB", "written, MB")
KINDS = {GENERAL: "General ability", "BWT_GEM": "Earlier tasks"}


def write(found: Comparison, file: Path, measure: str | None = None) -> Path:
    """Write the page, with the folders it needs; gives the file. measure: what `compare` was given, for the command.

    Raises ConfigError where the file cannot be written.
    """
    text = html(found, measure)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {file}: cannot be written ({error.strerror}); give the name of a file") from error
    return file


def html(found: Comparison, measure: str | None = None) -> str:
    """The page as text; whatever the runs' files hold is escaped."""
    named = list(_runs(found))
    runs = [run for _, run in named]
    level = next((e.shown.level for by in found.estimates for e in by if e is not None), st.LEVEL)
    trades = trade_offs(found)
    lines = differing([run.stream for run in runs])
    most = MOST_VALUES // len(found.groups)
    grouped = len(runs) > len(found.groups)
    return page(
        f"{len(found.groups)} {'groups of runs' if grouped else 'runs'} compared",
        "compare.html",
        groups=list(_groups(found)),
        grouped=grouped,
        tasks=runs[0].tasks,
        orders=len({tuple(run.tasks) for run in runs}),
        level=f"{100 * level:g}",
        trade_offs=[_trade_off(trade, level) for trade in trades],
        no_plot=_no_plot(found),
        table=list(_table(found)),
        notes=[*_undefined(found), *found.notes],
        matrices=[_matrix(name, run, MOST_CELLS // len(runs)) for name, run in named],
        costs={"names": COSTS, "rows": [{"run": name, "cells": _cost(run.path)} for name, run in named]},
        differences=[{"key": one.key, "cells": _by_group(found, one.values)} for one in lines[:most]],
        differences_cut=max(0, len(lines) - most),
        command=_command(found, measure),
    )


def letter(index: int) -> str:
    """A to Z, then #27: what a group is called in the terminal's table too."""
    return chr(ord("A") + index) if index < 26 else f"#{index + 1}"


def _groups(found: Comparison) -> Iterator[dict[str, str]]:
    for index, group in enumerate(found.groups):
        seeds = ", ".join(str(seed) for seed in sorted({run.key[0] for run in group.runs}))
        many = len(group.runs) > 1
        said = f"{len(group.runs)} runs, seeds {seeds}" if many else f"seed {seeds}, {group.runs[0].name}"
        yield {"letter": letter(index), "label": group.label, "said": said}


def _runs(found: Comparison) -> Iterator[tuple[dict[str, str], RunFiles]]:
    """Every run with its group's label and, where that has several, what tells it from the others."""
    for group in found.groups:
        several = len({tuple(run.tasks) for run in group.runs}) > 1
        for run in group.runs:
            order = f", {', '.join(map(isolated, run.tasks))}" if several else ""
            more = f", seed {run.key[0]}{order}" if len(group.runs) > 1 else ""
            yield {"label": group.label, "more": more}, run


def _by_group(found: Comparison, values: Sequence[str]) -> list[str]:
    return [", ".join(dict.fromkeys(values[span])) for span in spans_of(found.groups)]


def _undefined(found: Comparison) -> list[str]:
    lines = [f"{one.name}: {one.reason}" for one in found.quantities if None in one.values and one.reason]
    return list(dict.fromkeys(lines))


def _command(found: Comparison, measure: str | None) -> Markup:
    """As a shell takes it; names and paths are set apart by elements, for a mark within them would be copied too."""
    plain = {group.label: [run.path for run in group.runs] for group in found.groups}
    is_plain = plain == labels([run.path for group in found.groups for run in group.runs])
    form = "<bdi>{1}</bdi>" if is_plain else "--group <bdi>{0}</bdi>=<bdi>{1}</bdi>"
    parts = [Markup("cpt compare")]
    for label, paths in plain.items():
        parts.append(Markup(form).format(shlex.quote(label), shlex.quote(",".join(map(str, paths)))))
    if measure:
        parts.append(Markup("--measure <bdi>{}</bdi>").format(shlex.quote(measure)))
    return Markup(" ").join([*parts, Markup("--html compare.html")])


# ---- plots -------------------------------------------------------------------------------------------


def _trade_off(trade: TradeOff, level: float) -> dict[str, Any]:
    scales = [100.0 if one.is_share else 1.0 for one in (trade.x, trade.y)]
    labels = [spot.label for spot in trade.spots]
    short = labels if len(labels) <= 6 and max(map(len, labels)) <= 24 else list(map(letter, range(len(labels))))
    dots = [dot for spot, name in zip(trade.spots, short, strict=True) if (dot := _dot(spot, name, trade, scales))]
    units = ["points" if scale == 100 else trade.y.measure for scale in scales]
    kind = KINDS[trade.y.name]
    what = "general ability since the base" if trade.y.name == GENERAL else "earlier tasks since they were learned"
    best = [spot.label for spot in trade.spots if spot.on_front]
    x_label = f"score right after its stage: {trade.x.name} of {trade.x.measure}{', %' if scales[0] == 100 else ''}"
    return {
        "x": trade.x,
        "y": trade.y,
        "kind": kind,
        "best": best,
        "beaten": [spot.label for spot in trade.spots if spot.x and spot.y and not spot.on_front],
        "nowhere": [spot.label for spot in trade.spots if spot.reason],
        "caption": f"{kind}. Upwards: change of {what}, {trade.y.name} in {units[1]}. To the "
        f"{'right' if trade.x.higher_is_better else 'left'}: more was learned. Bars: {100 * level:g} % intervals.",
        "plot": plane(
            dots,
            x_label,
            f"{trade.y.name} against {trade.x.name}; on the Pareto front: {', '.join(map(isolated, best)) or 'none'}",
            more_is_right=trade.x.higher_is_better,
        ),
        "rows": [_row(spot, trade) for spot in trade.spots],
    }


def _dot(spot: Spot, label: str, trade: TradeOff, scales: Sequence[float]) -> Dot | None:
    if spot.x is None or spot.y is None or spot.x.value is None or spot.y.value is None:
        return None
    row = _row(spot, trade)
    title = f"{isolated(spot.label)}: {trade.x.name} {row['x']}, {trade.y.name} {row['y']}"
    return Dot(
        isolated(label),
        title,
        spot.x.value * scales[0],
        spot.y.value * scales[1],
        _span(trade.x, spot.x, scales[0]),
        _span(trade.y, spot.y, scales[1]),
        spot.on_front,
    )


def _span(one: Quantity, found: st.Estimate, scale: float) -> tuple[float, float] | None:
    """An interval in the plot's units; that of a share is cut to what a share can be."""
    if found.low is None or found.high is None:
        return None
    ends = (found.low, found.high)
    low, high = (min(max(end, 0.0 if one.name == "P" else -1.0), 1.0) for end in ends) if one.is_share else ends
    return low * scale, high * scale


def _row(spot: Spot, trade: TradeOff) -> dict[str, str]:
    x, y = (_estimate(one, e) for one, e in ((trade.x, spot.x), (trade.y, spot.y)))
    return {"label": spot.label, "x": x, "y": y, "front": "yes" if spot.on_front else spot.reason or "no"}


def _estimate(one: Quantity, found: st.Estimate | None) -> str:
    if found is None or found.value is None:
        return ABSENT
    ends = _span(one, found, 1.0) or ()
    value, *shown = (compare_table._number(number, one.is_share, one.name != "P") for number in (found.value, *ends))
    return f"{value} [{','.join(shown)}]" if shown else value


def _no_plot(found: Comparison) -> str:
    if all(one.name != "AP" for one in found.quantities):
        return "no task has a score in every run"
    return "no run has finite scores of both; what was kept is said by a general set or by a second task"


# ---- tables ------------------------------------------------------------------------------------------


def _table(found: Comparison) -> Iterator[dict[str, Any]]:
    """A part per section: every quantity with a cell per group, each with its difference to the first."""
    lines = zip(found.quantities, found.estimates, found.differences, strict=True)
    for section, part in groupby(lines, key=lambda line: line[0].section):
        listed = list(part)
        measures = [one.measure for one, _, _ in listed]
        usual = max(measures, key=measures.count)
        said = []
        for one, estimates, differences in listed:
            changes = [None, *differences]
            cells = [_cell(one, *each) for each in zip(estimates, changes, found.groups, strict=True)]
            formula = "" if one.formula == FINAL else one.formula
            measure = "" if one.measure == usual else one.measure
            said.append({"name": one.name, "formula": formula, "measure": measure, "cells": cells})
        yield {"section": section, "measure": usual, "lines": said}


def _cell(one: Quantity, estimate: st.Pooled | None, change: st.Pooled | None, group: Group) -> dict[str, str]:
    value, _, interval = compare_table._cell(one, estimate, group).partition(" ")
    verdict = ""
    if change is not None and change.shown.excludes_zero:
        verdict = "better" if (change.value > 0) == one.higher_is_better else "worse"
    said = compare_table._cell(one, change, None) if change is not None else ""
    return {"value": value, "interval": interval, "change": said, "verdict": verdict}


def _matrix(name: Mapping[str, str], run: RunFiles, most: int) -> dict[str, Any]:
    """A small heat map: at most `most` cells, of tasks first."""
    rows = run.matrix["rows"]
    names = [name for name in [*run.tasks, *run.forget, *run.matrix["general"]] if run.primary(name)]
    kept = names[: max(1, most // len(rows))]
    lines = [{"stage": row["stage"], "cells": [_matrix_cell(run, row, name) for name in kept]} for row in rows]
    return {"run": name, "columns": kept, "cut": len(names) - len(kept), "rows": lines}


def _matrix_cell(run: RunFiles, row: Mapping[str, Any], name: str) -> dict[str, Any]:
    measure = run.primary(name) or ""
    result = row["scores"].get(name, {}).get(measure)
    own = row["stage"] == name
    if result is None:
        return {"own": own, "colour": "", "text": ABSENT, "title": "not measured"}
    value = result["value"]
    if value is None or not math.isfinite(value):
        return {"own": own, "colour": "", "text": "NaN", "title": result["note"] or "no finite number"}
    colour = f"h{round(10 * min(max(value, 0.0), 1.0))}" if summary.is_percent(result) else ""
    error = "" if result["stderr"] is None else f", standard error {result['stderr']:.3g}"
    title = f"{measure} {value:.4g}, n = {result['n']}{error}"
    return {"own": own, "colour": colour, "text": summary.cell(result), "title": title}


def _cost(run: Path) -> list[str]:
    """The cells of COSTS; "-" where a record does not say."""
    trained = list(summary.facts(run).values())
    seconds, tokens = _total(trained, "train_seconds"), _total(trained, "tokens")
    peaks = [facts["peak_gib"] for facts in trained if facts.get("peak_gib") is not None]
    written = _total(trained, "bytes_written")
    return [
        _count(seconds),
        _count(_total(_measured(run), "seconds")),
        _count(tokens),
        _count(tokens / seconds if tokens is not None and seconds else None),
        f"{max(peaks):.2f}" if peaks else ABSENT,
        _count(None if written is None else written / 1e6),
    ]


def _measured(run: Path) -> list[dict[str, Any]]:
    files = [file for file in run.glob("stages/*/eval/DONE") if ".superseded-" not in file.parts[-3]]
    return [json.loads(file.read_text(encoding="utf-8")).get("facts", {}) for file in sorted(files)]


def _total(facts: Sequence[Mapping[str, Any]], key: str) -> float | None:
    known = [one[key] for one in facts if one.get(key) is not None]
    return sum(known) if known and len(known) == len(facts) else None


def _count(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
