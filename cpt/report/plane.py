"""Points in the plane with error bars and a Pareto front, as inline SVG; colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 420, 320
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 12, 46
CHARACTER, LINE = 7.0, 13.0  # about the size of a character of a label, in the plot's units
CAP = 3.0  # half the width of an error bar's end
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Dot:
    """A point with a short label, a title (shown on hover) and its intervals, None where there are none."""

    label: str
    title: str
    x: float
    y: float
    x_span: tuple[float, float] | None = None
    y_span: tuple[float, float] | None = None
    on_front: bool = False


@dataclass(frozen=True)
class Axis:
    """A linear axis: `low` to `high` on pixels `start` to `end`; `low` is below `high`."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float) -> Axis:
        """All values, with some room on both sides."""
        low, high = min(values), max(values)
        room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(low - room, high + room, start, end)

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Three to six round numbers."""
        size = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(size))
        step = next(nice * power for nice in (1, 2, 5, 10) if nice * power >= size * (1 - 1e-9))
        return [k * step for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def plane(dots: Sequence[Dot], x_label: str, description: str, *, more_is_right: bool = True) -> Markup:
    """The plot; every text is escaped.

    Args:
        dots: at least one; those on the front are joined by steps, above and beyond which there is nothing.
        x_label: beneath the axis; what y is stands in the figure's caption.
        description: what the plot shows, for those who do not see it.
        more_is_right: whether a larger x is better; y always is.
    """
    x = Axis.around([v for dot in dots for v in (dot.x, *(dot.x_span or ()))], LEFT, WIDTH - RIGHT)
    y = Axis.around([v for dot in dots for v in (dot.y, *(dot.y_span or ()))], HEIGHT - BOTTOM, TOP)
    parts = [*_grid(x, y), _front(dots, x, y, more_is_right), *(bar for dot in dots for bar in _bars(dot, x, y))]
    parts += [_dot(dot, x, y) for dot in sorted(dots, key=lambda dot: dot.on_front)]  # the front above the others
    parts += _labels(dots, x, y)
    title = '<text class="axis-title" x="{}" y="{}" text-anchor="middle">{}</text>'
    parts.append(Markup(title).format((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label))
    frame = '<svg class="plane" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    return Markup(frame).format(WIDTH, HEIGHT, description, Markup("").join(parts))


def _grid(x: Axis, y: Axis) -> Iterator[Markup]:
    line, text = '<path class="{}" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>', '<text x="{:.1f}" y="{:.1f}" {}>{}</text>'
    for value in x.ticks():
        at = x.at(value)
        yield Markup(line).format("grid", at, y.start, at, y.end)
        yield Markup(text).format(at, y.start + 16, Markup('text-anchor="middle"'), _tick(value))
    for value in y.ticks():
        at = y.at(value)
        yield Markup(line).format("zero" if value == 0 else "grid", x.start, at, x.end, at)
        yield Markup(text).format(x.start - 6, at + 4, Markup('text-anchor="end"'), _tick(value))


def _tick(value: float) -> str:
    return f"{value:.4g}".replace("-", "\u2212")


def _front(dots: Sequence[Dot], x: Axis, y: Axis, more_is_right: bool) -> Markup:
    """The edge of what the front dominates: level up to each of its points, then down to the height of the next."""
    best = sorted({(dot.x, dot.y) for dot in dots if dot.on_front}, reverse=not more_is_right)
    if not best:
        return Markup("")
    steps = "".join(f"V{y.at(height):.1f}H{x.at(right):.1f}" for right, height in best)
    begin = f"M{x.start if more_is_right else x.end:.1f} {y.at(best[0][1]):.1f}"
    return Markup('<path class="front" d="{}{}V{:.1f}"/>').format(begin, steps, y.start)


def _bars(dot: Dot, x: Axis, y: Axis) -> Iterator[Markup]:
    line = Markup('<path class="bar" d="{}"/>')
    at_x, at_y = x.at(dot.x), y.at(dot.y)
    if dot.x_span:
        low, high = map(x.at, dot.x_span)
        ends = "".join(f"M{end:.1f} {at_y - CAP:.1f}v{2 * CAP}" for end in (low, high))
        yield line.format(f"M{low:.1f} {at_y:.1f}H{high:.1f}{ends}")
    if dot.y_span:
        low, high = map(y.at, dot.y_span)
        ends = "".join(f"M{at_x - CAP:.1f} {end:.1f}h{2 * CAP}" for end in (low, high))
        yield line.format(f"M{at_x:.1f} {low:.1f}V{high:.1f}{ends}")


def _dot(dot: Dot, x: Axis, y: Axis) -> Markup:
    """Full on the front, hollow off it: told apart without colour."""
    circle = '<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="4.5"><title>{}</title></circle>'
    return Markup(circle).format("best" if dot.on_front else "dominated", x.at(dot.x), y.at(dot.y), dot.title)


def _labels(dots: Sequence[Dot], x: Axis, y: Axis) -> Iterator[Markup]:
    """Beside its point, where it covers no other point and no other label, if there is such a place."""
    taken: list[Box] = [(cx - 5, cy - 5, cx + 5, cy + 5) for cx, cy in ((x.at(dot.x), y.at(dot.y)) for dot in dots)]
    for dot in dots:
        places = list(_places(dot, x, y))
        box = next((place for place in places if not any(_overlap(place, other) for other in taken)), places[0])
        taken.append(box)
        text = '<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>'
        yield Markup(text).format("label best" if dot.on_front else "label", box[0], box[3] - 3, dot.label)


def _places(dot: Dot, x: Axis, y: Axis) -> Iterator[Box]:
    width = CHARACTER * len(dot.label)
    for away in (0.0, LINE, 2 * LINE):
        for below in (False, True):
            for left in (x.at(dot.x) + 6, x.at(dot.x) - 6 - width):
                top = y.at(dot.y) + (3 + away if below else -3 - away - LINE)
                if left >= x.start and left + width <= x.end and top >= TOP - 4 and top + LINE <= y.start:
                    yield left, top, left + width, top + LINE
    left, top = max(x.start, min(x.at(dot.x) + 6, x.end - width)), y.at(dot.y) - 3 - LINE
    yield left, top, left + width, top + LINE


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
