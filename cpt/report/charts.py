"""Curves as inline SVG, with a table of the same numbers beside each.

Drawn here because no chart library makes a picture that stands in one file, follows the reader's theme and stays
small: matplotlib's SVG is fixed in its colours and some 20 kB a curve, a JavaScript library alone is larger than a page
may be. Colours are classes of report.css (`s0` to `s7`, after Okabe and Ito 2008, in a light and a dark variant). Every
class has a dash and a marker of its own, so that curves are told apart without colour too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from cpt.report.plane import Axis
from cpt.report.scaffold import isolated

SLOTS = 8  # kinds of curves that can be told apart
MARKED = 40  # points of a curve up to which each has a marker
BUCKETS = 120  # a longer curve keeps the lowest and the highest point of so many parts: spikes stay
Point = tuple[float, float | None]


@dataclass(frozen=True)
class Curve:
    """A named curve. points: by x; None as y is a gap. spans: an interval or None for each point, or nothing at all."""

    name: str
    points: tuple[Point, ...]
    slot: int = 0
    spans: tuple[tuple[float, float] | None, ...] = ()


@dataclass(frozen=True)
class Size:
    """Of a drawing, in its own units: about pixels where it is shown as wide as it is."""

    width: float
    height: float
    left: float
    bottom: float
    right: float = 10
    top: float = 12


SMALL = Size(210, 132, 34, 22)
MIDDLE = Size(420, 240, 50, 40)
WIDE = Size(860, 300, 50, 40, top=24)
SHARE = (0.0, 100.0)  # the axis of per cents


@dataclass(frozen=True)
class Figure:
    """A drawing, its legend (empty for one curve) and its numbers: a header and rows, of which `cut` were left out."""

    title: str
    caption: str
    svg: Markup
    legend: Markup
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    cut: str = ""


def line_chart(
    curves: Sequence[Curve],
    *,
    x_label: str,
    description: str,
    size: Size = MIDDLE,
    y_range: tuple[float, float] | None = None,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    marks: Sequence[tuple[float, str]] = (),
    titled: bool = True,
) -> Markup:
    """The curves in one frame; every text is escaped.

    Args:
        curves: with at least one number among them.
        x_label: of the axis, with its unit; empty leaves it out. What y is stands in the figure's caption.
        description: what the drawing shows, for those who do not see it.
        y_range: of the axis; default: of the numbers.
        x_ticks: (place, text), all of them within the axis; default: round numbers.
        marks: (x, text) of vertical lines.
        titled: whether markers say their numbers on hover, which makes half of the drawing's bytes.
    """
    xs = [*(x for curve in curves for x, _ in curve.points), *(at for at, _ in x_ticks or ())]
    ys = [y for curve in curves for _, y in curve.points if y is not None]
    ys += [end for curve in curves for span in curve.spans if span for end in span]
    low, high = y_range or (0.0, 0.0)
    y = Axis(low, high, size.height - size.bottom, size.top)
    if not y_range:
        y = Axis.around(ys, size.height - size.bottom, size.top)
    x = Axis(min(xs), max(max(xs), min(xs) + 1e-9), size.left + 6, size.width - size.right)
    ticks = [(value, number(value)) for value in x.ticks()] if x_ticks is None else x_ticks
    parts = [*_frame(x, y, size, ticks), *_marks(marks, x, y)]
    for curve in curves:
        parts += _curve(curve, x, y, titled)
    if x_label:
        title = '<text class="axis-title" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>'
        parts.append(Markup(title).format((size.left + size.width - size.right) / 2, size.height - 6, x_label))
    head = '<svg class="chart" viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">{}</svg>'
    return Markup(head).format(size.width, size.height, description, Markup("").join(parts))


def legend(curves: Sequence[Curve]) -> Markup:
    """What each kind of curve is; nothing for a single one."""
    if len(curves) < 2:
        return Markup("")
    key = '<svg class="key" viewBox="0 0 30 12" aria-hidden="true"><path class="curve s{}" d="M1 6H29"/>{}</svg>'
    lines = [
        Markup("<li>{}<bdi>{}</bdi></li>").format(
            Markup(key).format(curve.slot, _marker(curve.slot, 15, 6, None)), curve.name
        )
        for curve in curves
    ]
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(lines))


def thinned(points: Sequence[Point], most: int = 2 * BUCKETS) -> tuple[Point, ...]:
    """At most `most` points: of a longer curve the lowest and highest of equal parts, its first and its last."""
    if len(points) <= most:
        return tuple(points)
    parts = max(1, (most - 2) // 2)
    kept = {0, len(points) - 1}
    for part in range(parts):
        span = range(part * len(points) // parts, (part + 1) * len(points) // parts)
        known = [(y, i) for i in span if (y := points[i][1]) is not None]
        kept |= {min(known)[1], max(known)[1]} if known else set(span[:1])
    return tuple(points[i] for i in sorted(kept))


def number(value: float | None) -> str:
    """Four figures, all of them of a large number, with a true minus sign; `-` for None."""
    if value is None:
        return "-"
    text = f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    return text.replace("-", "\u2212")


def _frame(x: Axis, y: Axis, size: Size, ticks: Sequence[tuple[float, str]]) -> Iterator[Markup]:
    line = Markup('<path class="{}" d="M{:.1f} {:.1f}H{:.1f}"/>')
    text = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    is_small = size.height < 160
    values = y.ticks()
    if (y.low, y.high) == SHARE:
        values = [0, 50, 100] if is_small else [0, 25, 50, 75, 100]
    for value in values[:: 1 + (is_small and len(values) > 4)]:
        yield line.format("zero" if value == 0 else "grid", size.left, y.at(value), size.width - size.right)
        yield text.format(size.left - 6, y.at(value) + 4, "end", number(value))
    for at, name in _apart(ticks, x, size):
        yield text.format(x.at(at), size.height - size.bottom + 16, "middle", name)


def _apart(ticks: Sequence[tuple[float, str]], x: Axis, size: Size) -> Sequence[tuple[float, str]]:
    """As many of the ticks as stand apart."""
    longest = max((len(name) for _, name in ticks), default=1)
    room = max(1, int((size.width - size.left) / (7 * longest + 12)))
    return ticks[:: math.ceil(len(ticks) / room)]


def _marks(marks: Sequence[tuple[float, str]], x: Axis, y: Axis) -> Iterator[Markup]:
    """Vertical lines; their names stand above, where they leave each other room."""
    free = -math.inf
    for at, name in marks:
        place = x.at(at)
        yield Markup('<path class="mark" d="M{:.1f} {:.1f}V{:.1f}"/>').format(place, y.start, y.end)
        if place >= free:
            said = name if len(name) <= 18 else name[:17] + "\u2026"
            anchor = "end" if place + 7 * len(said) > x.end else "start"
            text = Markup('<text class="mark" x="{:.1f}" y="{:.1f}" text-anchor="{}"><title>{}</title>{}</text>')
            yield text.format(place, y.end - 8, anchor, isolated(name), isolated(said))
            free = place + 7 * len(said) + 8


def _curve(curve: Curve, x: Axis, y: Axis, titled: bool) -> Iterator[Markup]:
    path, drawn = [], False
    for at, value in curve.points:
        if value is not None:
            path.append(f"{'L' if drawn else 'M'}{x.at(at):.1f} {y.at(value):.1f}")
        drawn = value is not None
    yield from _bars(curve, x, y)
    yield Markup('<path class="curve s{}" d="{}"/>').format(curve.slot, "".join(path))
    known = [(at, value) for at, value in curve.points if value is not None]
    if len(curve.points) > MARKED and len(known) > 1:
        return
    for at, value in known:
        title = f"{isolated(curve.name)}, {number(at)}: {number(value)}" if titled else None
        yield _marker(curve.slot, x.at(at), y.at(value), title)


def _bars(curve: Curve, x: Axis, y: Axis) -> Iterator[Markup]:
    ends = "".join(
        f"M{x.at(at):.1f} {y.at(span[0]):.1f}V{y.at(span[1]):.1f}"
        for (at, value), span in zip(curve.points, curve.spans, strict=bool(curve.spans))
        if span is not None and value is not None
    )
    if ends:
        yield Markup('<path class="spread s{}" d="{}"/>').format(curve.slot, ends)


def _marker(slot: int, x: float, y: float, title: str | None) -> Markup:
    """Circle, square, triangle, diamond; then the same, hollow."""
    r = 3.0
    shapes = (
        f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
        f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z",
        f"M{x:.1f} {y - r - 1:.1f}l{r + 1} {2 * r}h{-2 * r - 2}z",
        f"M{x:.1f} {y - r - 1:.1f}l{r + 1} {r + 1}l{-r - 1} {r + 1}l{-r - 1} {-r - 1}z",
    )
    kind = "hollow" if slot >= len(shapes) else "full"
    inside = Markup("") if title is None else Markup("<title>{}</title>").format(title)
    path = Markup('<path class="{} s{}" d="{}">{}</path>')
    return path.format(kind, slot, shapes[slot % len(shapes)], inside)
