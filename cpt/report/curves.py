"""The figures of a report: tasks over stages, general ability, drift, scores within stages, training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from cpt.report.charts import (
    MIDDLE,
    SHARE,
    SLOTS,
    SMALL,
    WIDE,
    Curve,
    Figure,
    Point,
    legend,
    line_chart,
    number,
    thinned,
)
from cpt.report.heatmap import ABSENT, average, general_measure, shown
from cpt.report.read import DRIFT, SHARES, RunView, Score, StageFiles, as_list, as_object, finite, points
from cpt.report.scaffold import isolated
from cpt.report.summary import WITHIN


@dataclass(frozen=True)
class Limits:
    """How much a page shows; what goes beyond is counted and points at its file."""

    cells: int  # of the heat map
    tasks: int  # small curves
    points: int  # of one curve
    rows: int  # of one table of numbers
    stages: int  # whose training is drawn
    lines: int  # of one table of facts
    titled: bool  # whether points of small curves say their numbers on hover


def task_figures(view: RunView, limits: Limits) -> list[Figure]:
    """A small curve for every task over the stages; the axis of shares is 0 to 100 %."""
    return [_over_stages(view, name, limits) for name in [*view.tasks, *view.forget] if name in view.measures][
        : limits.tasks
    ]


def general_figures(view: RunView, limits: Limits) -> list[Figure]:
    """The average where there is one, then a small curve for every general set."""
    found = []
    measure = general_measure(view)
    if measure:
        points: tuple[Point, ...] = tuple(
            (stage.index, None if (value := average(view, stage, measure)) is None else 100 * value)
            for stage in view.rows
        )
        count = sum(view.measures.get(name) == measure for name in view.general)
        if count > 1 and any(y is not None for _, y in points):
            title, unit = "average", f"{measure}, %, of {count} sets"
            found.append(_small(title, unit, Curve(title, points, 0), view, SHARE, None, limits.titled))
    sets = [name for name in view.general if name in view.measures]
    return found + [_over_stages(view, name, limits) for name in sets[: limits.tasks]]


def drift_figures(view: RunView, limits: Limits) -> list[Figure]:
    """Every drift measure over the stages."""
    rows = [row for row in view.rows if DRIFT in row.scores]
    measures = list(dict.fromkeys(m for row in rows for m in row.scores[DRIFT]))
    found = []
    for measure in measures:
        scores = [(row.index, row.scores[DRIFT].get(measure)) for row in rows]
        points = tuple((index, score.value if score else None) for index, score in scores)
        if all(y is None for _, y in points):
            continue
        definition = next((score.definition for _, score in scores if score), "")
        unit = _unit_of(definition)
        spans = tuple(score.interval if score else None for _, score in scores)
        found.append(_small(measure, unit, Curve(measure, points, 3, spans), view, None, None, limits.titled))
    return found


def within_figure(view: RunView, limits: Limits) -> Figure | None:
    """Scores of a few rows while the stages trained, joined: tasks and the mean of general sets, by optimizer step."""
    stages = [stage for stage in view.stages if stage.curve]
    heads = [as_object(stage.curve_head.get("sets")) for stage in stages]
    known = {name: as_object(by) for head in heads for name, by in head.items()}
    measure = _within_measure(known)
    if measure is None:
        return None
    factor = 100 if measure in SHARES else 1
    tasks, general = _parts(known, measure)
    curves, marks = _joined(view, stages, measure, factor, [*tasks[: SLOTS - 1]], general)
    curves = [curve for curve in curves if any(y is not None for _, y in curve.points)]
    if not curves:
        return None
    numbers = _numbers(curves, limits.rows, "step")
    thin = [Curve(c.name, thinned(c.points, limits.points), c.slot) for c in curves]
    unit = f"{measure}{', %' if factor == 100 else ''}"
    svg = line_chart(
        thin,
        x_label="optimizer steps since the stream began",
        description=f"{unit} while the stages trained, of {len(curves)} curves",
        size=WIDE,
        y_range=SHARE if factor == 100 else None,
        marks=marks,
    )
    cut = f"{len(tasks) - SLOTS + 1} more tasks are in within.jsonl of the stages. " if len(tasks) >= SLOTS else ""
    caption = f"{unit}, on a few rows of each set. A line marks where a stage begins."
    return Figure("Within the stages", caption, svg, legend(curves), *numbers[:2], cut + numbers[2])


def training_figures(stage: StageFiles, limits: Limits) -> list[Figure]:
    """Loss, each method's terms, rewards, learning rate, as far as the stage has logged them."""
    known = list(dict.fromkeys(key for line in stage.metrics for key in line))
    methods = [key for key in known if key.partition("/")[0] in _methods(stage)]
    rewards = ["reward", *(key for key in known if key.startswith("rewards/") and key.endswith("/mean"))]
    parts = [
        ("Loss", "the stage's own loss", ["loss"]),
        ("Terms of the methods", "loss terms, by method", methods[:SLOTS]),
        ("Rewards", "mean of a batch's completions, all together and each", rewards[:SLOTS]),
        ("KL", "to the reference, nats", ["kl"]),
        ("Learning rate", "", ["learning_rate"]),
    ]
    found = [_logged(stage, title, unit, keys, limits) for title, unit, keys in parts]
    return [figure for figure in found if figure]


def _methods(stage: StageFiles) -> set[str]:
    listed = as_list(as_object(stage.record.get("stage")).get("methods"))
    return {str(as_object(one).get("name") or as_object(one).get("type")) for one in listed}


def _over_stages(view: RunView, name: str, limits: Limits) -> Figure:
    scores = [(row.index, view.score(row, name)) for row in view.rows]
    known = next((score for _, score in scores if score), None)
    is_percent = known is not None and known.is_percent
    factor = 100 if is_percent else 1
    points = tuple((index, _times(score.value if score else None, factor)) for index, score in scores)
    spans = tuple(_span(score, factor) for _, score in scores)
    measure = view.measures[name]
    unit = f"{measure}, %" if is_percent else measure
    lower = "" if known is None or known.higher_is_better else ", lower is better"
    taught = view.taught(name) if name in view.tasks else None
    curve = Curve(name, points, 0, spans)
    return _small(name, unit + lower, curve, view, SHARE if is_percent else None, taught, limits.titled)


def _small(
    title: str,
    unit: str,
    curve: Curve,
    view: RunView,
    y_range: tuple[float, float] | None,
    taught: StageFiles | None,
    titled: bool,
) -> Figure:
    """One curve over the stages in a small frame; a line marks the stage that teaches it."""
    ys = [y for _, y in curve.points if y is not None]
    if not ys:
        return Figure(title, unit, Markup('<p class="quiet">{}</p>').format("no number yet"), Markup(""))
    description = f"{isolated(title)}, {unit}, by stage: {', '.join(number(y) for _, y in curve.points)}"
    svg = line_chart(
        [curve],
        x_label="",
        description=description,
        size=SMALL,
        y_range=y_range,
        x_ticks=[(float(stage.index), str(stage.index)) for stage in view.stages],
        marks=[(taught.index, "")] if taught else (),
        titled=titled,
    )
    return Figure(title, unit, svg, Markup(""))


def numbers_over_stages(view: RunView, names: Sequence[str], most: int) -> Figure | None:
    """The table beside a group of small curves: a row per set, a column per stage, cut to `most` cells."""
    if not names or not view.rows:
        return None
    fit = max(1, most // len(view.rows))
    rows = [(name, *(_shown(view.score(row, name)) for row in view.rows)) for name in names[:fit]]
    if names[0] in view.general and len(names) > 1 and (measure := general_measure(view)):
        values = (average(view, row, measure) for row in view.rows)
        rows.insert(0, ("average", *(ABSENT if value is None else points(value) for value in values)))
    cut = f"{len(names) - fit} more sets are in matrix.json." if len(names) > fit else ""
    return _table("set", view.rows, rows, cut)


def drift_numbers(view: RunView) -> Figure:
    """The table beside the curves of drift."""
    rows = [row for row in view.rows if DRIFT in row.scores]
    measures = dict.fromkeys(m for row in rows for m in row.scores[DRIFT])
    scores = [(m, [row.scores[DRIFT].get(m) for row in rows]) for m in measures]
    return _table("measure", rows, [(m, *(number(s.value if s else None) for s in by)) for m, by in scores], "")


def _table(first: str, stages: Sequence[StageFiles], rows: Sequence[tuple[str, ...]], cut: str) -> Figure:
    header = (first, *(stage.title for stage in stages))
    return Figure("", "", Markup(""), Markup(""), header, tuple(rows), cut)


def _shown(score: Score | None) -> str:
    return ABSENT if score is None else shown(score)


def _span(score: Score | None, factor: float) -> tuple[float, float] | None:
    ends = score.interval if score else None
    return None if ends is None else (ends[0] * factor, ends[1] * factor)


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _unit_of(definition: str) -> str:
    """The first setting of a definition is the unit."""
    inside = definition.partition("(")[2].partition(",")[0].rstrip(")")
    return inside.replace("_", " ")


def _within_measure(known: Mapping[str, Mapping[str, Any]]) -> str | None:
    """A share where any set has one, else what most sets have."""
    listed = [m for one in known.values() for m in as_object(one.get("measures"))]
    shares = [m for m in listed if m in SHARES]
    return max(dict.fromkeys(shares or listed), key=listed.count, default=None)


def _parts(known: Mapping[str, Mapping[str, Any]], measure: str) -> tuple[list[str], list[str]]:
    having = {name: one for name, one in known.items() if measure in as_object(one.get("measures"))}
    general = [name for name, one in having.items() if one.get("group") == "general"]
    return [name for name in having if name not in general], general


def _joined(
    view: RunView,
    stages: Sequence[StageFiles],
    measure: str,
    factor: float,
    tasks: Sequence[str],
    general: Sequence[str],
) -> tuple[list[Curve], list[tuple[float, str]]]:
    """One curve of several stages, their steps counted on; a gap where a stage was not scored."""
    points: dict[str, list[Point]] = {name: [] for name in tasks}
    mean: list[Point] = []
    marks, begin = [], 0
    for stage in view.stages[1:]:
        if stage.is_begun:
            marks.append((float(begin), stage.title))
        for line in stage.curve if stage in stages else []:
            at = float(begin + line["step"])
            scores = {name: _within_score(line, name, measure, factor) for name in [*tasks, *general]}
            for name in tasks:
                points[name].append((at, scores[name]))
            known = [value for name in general if (value := scores[name]) is not None]
            mean.append((at, math.fsum(known) / len(known) if known and len(known) == len(general) else None))
        begin += max([stage.steps or 0, stage.reached, *(line["step"] for line in stage.curve)])
    curves = [Curve(name, tuple(points[name]), slot) for slot, name in enumerate(tasks, start=1)]
    said = f"general, mean of {len(general)} sets" if len(general) > 1 else "".join(general)
    return [*([Curve(said, tuple(mean), 0)] if general else []), *curves], marks


def _within_score(line: Mapping[str, Any], name: str, measure: str, factor: float) -> float | None:
    return _times(finite(as_object(line["scores"].get(name)).get(measure)), factor)


def _logged(stage: StageFiles, title: str, unit: str, keys: Sequence[str], limits: Limits) -> Figure | None:
    curves = [
        Curve(key, tuple((float(line["step"]), finite(line[key])) for line in stage.metrics if key in line), slot)
        for slot, key in enumerate(keys)
    ]
    curves = [curve for curve in curves if any(y is not None for _, y in curve.points)]
    if not curves:
        return None
    svg = line_chart(
        [Curve(curve.name, thinned(curve.points, limits.points), curve.slot) for curve in curves],
        x_label="optimizer steps",
        description=f"{title} of stage {stage.title}: {_ends(curves)}",
        size=MIDDLE,
        titled=limits.titled,
    )
    header, rows, cut = _numbers(curves, limits.rows, "step")
    where = f" All are in stages/{stage.label}/metrics.jsonl." if cut else ""
    return Figure(title, unit, svg, legend(curves), header, rows, cut + where)


def _ends(curves: Iterable[Curve]) -> str:
    said = []
    for curve in curves:
        known = [y for _, y in curve.points if y is not None]
        said.append(f"{isolated(curve.name)} from {number(known[0])} to {number(known[-1])}")
    return ", ".join(said)


def _numbers(
    curves: Sequence[Curve], most: int, first: str
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...], str]:
    """Header and rows of the table beside a chart: of more than `most` lines, evenly spaced ones, the last included."""
    by_x: dict[float, dict[str, float | None]] = {}
    for curve in curves:
        for x, y in curve.points:
            by_x.setdefault(x, {})[curve.name] = y
    places = sorted(by_x)
    kept = places if len(places) <= most else [places[round(i * (len(places) - 1) / (most - 1))] for i in range(most)]
    rows = tuple((number(x), *(number(by_x[x].get(curve.name)) for curve in curves)) for x in kept)
    cut = f"{len(kept)} of {len(places)} lines, evenly spaced." if len(kept) < len(places) else ""
    return (first, *(curve.name for curve in curves)), rows, cut


def gap_rows(view: RunView) -> tuple[str, list[tuple[str, ...]]]:
    """The measure and a row per stage of the stability gap: min-ACC, WC-ACC, WF, WP, worst general; rows, every."""
    scored = [stage for stage in view.rows if isinstance((stage.within or {}).get("measures"), dict)]
    measures = [m for stage in scored for m in (stage.within or {})["measures"]]
    measure = next((m for m in SHARES if m in measures), measures[0] if measures else "")
    return measure, list(_gaps(scored, measure))


def _gaps(scored: Sequence[StageFiles], measure: str) -> Iterator[tuple[str, ...]]:
    for stage in scored:
        within = stage.within or {}
        found = as_object(within["measures"].get(measure))
        values = [finite(as_object(found.get(key)).get("value")) for key in WITHIN]
        is_share = measure in SHARES
        cells = [ABSENT if v is None else points(v) if is_share else f"{v:.3f}" for v in values]
        yield (stage.title, *cells, str(within.get("rows", ABSENT)), str(within.get("every", ABSENT)))
