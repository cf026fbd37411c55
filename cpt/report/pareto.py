"""Plasticity against stability: where the runs of a comparison stand, and which of them no other beats in both.

Plasticity is P = 1/T sum_j R[j][j], the mean score of a task right after its stage (learning accuracy, Riemer et al.
2019); stability is the change of general ability since the base, or backward transfer. Their formulas are those of
`eval_harness.metrics.continual`, their intervals those of the comparison's table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cpt.report.compare import Comparison, Quantity, spans_of
from eval_harness.metrics import statistics as st

PLASTICITY = "P = 1/T sum_j R[j][j]"
GENERAL, BACKWARD = "dG_i", "BWT_GEM"  # names of quantities: what is kept of the base, and of earlier stages


@dataclass(frozen=True)
class Spot:
    """A group of runs in the plane; `x` and `y` with their intervals, None where undefined (`reason`)."""

    label: str
    x: st.Estimate | None
    y: st.Estimate | None
    reason: str | None = None
    on_front: bool = False


@dataclass(frozen=True)
class TradeOff:
    """One plot: every group by its plasticity (x) and a kind of stability (y), which grows with what is kept."""

    x: Quantity
    y: Quantity
    spots: tuple[Spot, ...]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points are best trade-offs: those that no other point dominates (more of both is better).

    A point dominates another that it is nowhere below and somewhere above; so equal points are on the front together.

    Args:
        points: (x, y), all finite. Cost: their number squared.

    Returns:
        Their indices, by x from left to right, equal ones in their order.

    Raises:
        ValueError: a coordinate is not finite.
    """
    for index, point in enumerate(points):
        if not all(map(math.isfinite, point)):
            raise ValueError(f"points[{index}] = {point}: both coordinates must be finite; leave out what is undefined")
    best = [i for i, point in enumerate(points) if not any(_dominates(other, point) for other in points)]
    return sorted(best, key=lambda i: points[i][0])


def trade_offs(found: Comparison) -> list[TradeOff]:
    """Plasticity against general ability and against backward transfer, where a group has finite values of both."""
    learned = plasticity(found)
    kinds = [one for name in (GENERAL, BACKWARD) if (one := _named(found, name))]
    if learned is None:
        return []
    drawn = [TradeOff(learned, kept, _spots(found, learned, kept)) for kept in kinds]
    return [trade for trade in drawn if any(spot.x and spot.y for spot in trade.spots)]


def plasticity(found: Comparison) -> Quantity | None:
    """P of every run, with its resamples; None where the comparison has no AP.

    Made of AP and BWT_GEM, whose sums hold every R[j][j]: P = AP - (T - 1) / T x BWT_GEM, and of one task P = AP. The
    resamples of both come from one draw of items, so those of P are what resampling R itself would give.
    """
    average, backward = _named(found, "AP"), _named(found, BACKWARD)
    if average is None:
        return None
    named = replace(average, name="P", formula=PLASTICITY)
    tasks = len(average.sets)
    if tasks == 1:
        return named
    if backward is None:
        return None
    # BWT_GEM is that of -R where lower is better; P is a plain mean.
    share = (tasks - 1) / tasks * (1 if average.higher_is_better else -1)
    pairs = zip(average.values, backward.values, strict=True)
    values = tuple(None if ap is None or bwt is None else ap - share * bwt for ap, bwt in pairs)
    drawn = None
    if average.drawn is not None and backward.drawn is not None:
        drawn = average.drawn - share * backward.drawn
    return replace(named, values=values, drawn=drawn, reason=average.reason or backward.reason)


def _named(found: Comparison, name: str) -> Quantity | None:
    return next((one for one in found.quantities if one.section == "the stream" and one.name == name), None)


def _spots(found: Comparison, learned: Quantity, kept: Quantity) -> tuple[Spot, ...]:
    known = [estimate.shown for by in found.estimates for estimate in by if estimate is not None]
    level = known[0].level if known else st.LEVEL
    spots = []
    for group, span in zip(found.groups, spans_of(found.groups), strict=True):
        x, y = (_estimate(one, span, level) for one in (learned, kept))
        missing = next((one for one, at in ((learned, x), (kept, y)) if at is None), None)
        reason = None if missing is None else f"{missing.name}: {missing.reason or 'a score is not a number'}"
        spots.append(Spot(group.label, x, y, reason))
    sign = 1 if learned.higher_is_better else -1
    placed = [(i, spot.x.value, spot.y.value) for i, spot in enumerate(spots) if spot.x and spot.y]
    on_front = {placed[k][0] for k in front([(sign * x, y) for _, x, y in placed if x is not None and y is not None])}
    return tuple(replace(spot, on_front=i in on_front) for i, spot in enumerate(spots))


def _estimate(one: Quantity, span: slice, level: float) -> st.Estimate | None:
    """The value of a group, over its runs and items; None unless every run has a finite one."""
    values = [value for value in one.values[span] if value is not None and math.isfinite(value)]
    if len(values) < len(one.values[span]):
        return None
    drawn = None if one.drawn is None else one.drawn[:, span]
    return st.pooled(values, drawn, one.n, level=level).shown


def _dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] >= b[0] and a[1] >= b[1] and a != b
