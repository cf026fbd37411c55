"""Intervals and paired differences over items, seeds and orders: how much of a difference is noise.

Items are resampled with replacement; the interval is the percentile interval, its level expanded for few items
(Hesterberg 2015, "What Teachers Should Know about the Bootstrap", arXiv 1411.5279): its tails are
Phi(-sqrt(n / (n - 1)) t), t the quantile of Student's t with n - 1 degrees of freedom, which undoes the (n - 1) / n by
which resampling understates a variance. Not BCa (Efron 1987): that wants a leave-one-out evaluation per item, is
undefined where the items are equal, and has no agreed acceleration for items crossed with seeds. One method serves
means, ratios of sums, differences and metrics of a whole matrix, from the same draws.

Everything is a function of its arguments and `seed`: equal draws for equal (seed, n, resamples), so that what is
resampled twice over the same items is paired. Cost: resamples x items additions (2,000 x 14,000: about 0.4 s), a
block of at most 4 M draws in memory.

A value that is not a number is left out and named. What cannot be said is None with a reason, never a width of 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from statistics import NormalDist
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Values = Mapping[str, float] | Sequence[float]

RESAMPLES = 2000
LEVEL = 0.95
BLOCK = 1 << 22  # draws held at once

PERCENTILE = "percentile bootstrap, expanded for few items (Hesterberg 2015)"
AT_ITS_END = "exact binomial (Clopper and Pearson 1934)"
STUDENT = "Student's t over runs"
WELCH = "Welch's t over runs, whole degrees of freedom"
HIERARCHICAL = "percentile bootstrap of runs, then of the items they share (Owen 2007)"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and how sure it is.

    value      None where it is undefined
    stderr     standard error; None for fewer than two items
    low, high  the interval of `level`; None where there is none, and `reason` says why
    n          items (of `t_interval`: runs)
    method     how the interval was made
    left_out   items that are not a number
    """

    value: float | None
    stderr: float | None
    low: float | None
    high: float | None
    level: float
    n: int
    method: str
    reason: str | None = None
    left_out: tuple[str, ...] = ()

    @property
    def width(self) -> float | None:
        """high - low; None without an interval."""
        return None if self.low is None or self.high is None else self.high - self.low

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True, slots=True)
class Difference(Estimate):
    """An estimate of b - a over the items of both.

    only_a, only_b   items that the other side does not have
    p_value          of the exact sign test, where items are 0 or 1: McNemar's; None elsewhere
    """

    only_a: int = 0
    only_b: int = 0
    p_value: float | None = None


@dataclass(frozen=True, slots=True)
class Pooled:
    """A value over several runs: two intervals, one of which is shown.

    value          mean over runs
    runs           how many; of a difference the smaller side
    over_runs      Student's t: honest about few runs, silent about the choice of items
    hierarchical   runs and items resampled: honest about items, too narrow for few runs (of 3 runs no resample goes
                   beyond the best and the worst, and the variance comes out 2/3 of what it is)
    """

    value: float
    runs: int
    over_runs: Estimate
    hierarchical: Estimate

    @property
    def shown(self) -> Estimate:
        """The wider of the two: each is blind to what the other sees, so it covers at least as often as either."""
        return max(self.hierarchical, self.over_runs, key=lambda one: -1.0 if one.width is None else one.width)


# ---- one set of items --------------------------------------------------------------------------------


def bootstrap(
    values: Values,
    statistic: Callable[[Array], Array] | None = None,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """A statistic of items with its interval.

    Args:
        values: item -> value, or values by position.
        statistic: array (..., n) to array (...), over the last axis; None is the mean. Cost resamples x its own.
        level: of the interval, between 0 and 1.
        resamples: how many.
        seed: of the draws.

    Returns:
        Estimate; a share whose items are all 0 or all 1 gets the exact binomial interval, for which resampling is
        blind. `stderr` of a mean is the sample standard deviation / sqrt(n), else that of the resamples.

    Raises:
        ValueError: level or resamples out of range.
    """
    _check(level, resamples)
    names, kept, left_out = _numbers(values)
    n = len(names)
    value = None if not n else float(kept.mean() if statistic is None else statistic(kept))
    if statistic is None:
        if n > 1 and kept.min() == kept.max() and kept[0] in (0.0, 1.0):
            return _at_its_end(float(kept[0]), n, level, left_out)
        drawn = resampled(kept[None], resamples=resamples, seed=seed)[:, 0] if n else kept
        found = percentile(value, drawn, n, level=level)
        return replace(found, stderr=_stderr(kept), left_out=left_out)
    rng = np.random.default_rng(seed)
    size = _block(n)
    parts = [min(size, resamples - start) for start in range(0, resamples, size)] if n else []
    drawn = np.concatenate([statistic(kept[rng.integers(0, n, (part, n))]) for part in parts]) if n else kept
    return replace(percentile(value, drawn, n, level=level), left_out=left_out)


def ratio_of_sums(
    numerators: Values,
    denominators: Values,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """sum(numerators) / sum(denominators) with its interval: bits per byte, say. Items are resampled as pairs.

    Args:
        numerators, denominators: of the same items; denominators above 0.

    Returns:
        Estimate; `stderr` is that of a ratio of sums: sqrt(n / (n - 1) sum (a_i - r b_i)^2) / sum b
        (Cochran 1977, section 2.11).

    Raises:
        ValueError: other items, a denominator that is not above 0, level or resamples out of range.
    """
    _check(level, resamples)
    above, below = _named(numerators), _named(denominators)
    if set(above) != set(below):
        odd = sorted(set(above) ^ set(below))
        raise ValueError(f"only a numerator or only a denominator: {', '.join(odd[:5])}; give both of each item")
    bad = [name for name, weight in below.items() if not weight > 0]
    if bad:
        raise ValueError(f"denominator of item {bad[0]} = {below[bad[0]]}: must be greater than 0")
    names, top, left_out = _numbers(above)
    bottom = np.array([below[name] for name in names], dtype=float)
    if not names:
        return percentile(None, top, 0, level=level)
    value = float(top.sum() / bottom.sum())
    drawn = resampled(top[None], bottom[None], resamples=resamples, seed=seed)[:, 0]
    return replace(
        percentile(value, drawn, len(names), level=level),
        stderr=_stderr(_influence(top, bottom, value)),
        left_out=left_out,
    )


def paired_difference(
    a: Mapping[str, float],
    b: Mapping[str, float],
    *,
    weights_a: Mapping[str, float] | None = None,
    weights_b: Mapping[str, float] | None = None,
    transform: Callable[[Array], Array] | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """b - a over the items that both have: positive where b is higher.

    Args:
        a, b: item -> value.
        weights_a, weights_b: item -> denominator, where a side is a ratio of sums and its values the items' own
            ratios; None is a mean.
        transform: of a side's aggregate, e.g. `numpy.exp` for a perplexity; elementwise.

    Returns:
        Difference; `stderr` from the items' differences (of ratios and transforms by linearisation).

    Raises:
        ValueError: level or resamples out of range, an item without a weight.
    """
    _check(level, resamples)
    both = [name for name in a if name in b]
    left_out = tuple(name for name in both if not (math.isfinite(a[name]) and math.isfinite(b[name])))
    names = sorted(set(both) - set(left_out))  # the draws do not depend on the order of a file
    sides = {"only_a": len(a) - len(both), "only_b": len(b) - len(both)}
    if not names:
        reason = "no item in common" if not both else "no item is a number on both sides"
        return Difference(None, None, None, None, level, 0, PERCENTILE, reason, left_out, **sides)
    weights = np.array([_weights(weights_a, names), _weights(weights_b, names)])
    above = np.array([[side[name] for name in names] for side in (a, b)], dtype=float) * weights
    change = transform or (lambda aggregate: aggregate)
    aggregates = above.sum(1) / weights.sum(1)
    value = float(np.subtract(*change(aggregates)[::-1]))
    drawn = change(resampled(above, weights, resamples=resamples, seed=seed))
    found = percentile(value, drawn[:, 1] - drawn[:, 0], len(names), level=level)
    slopes = _slopes(change, aggregates)
    linear = [s * _influence(t, w, r) for s, t, w, r in zip(slopes, above, weights, aggregates, strict=True)]
    is_binary = weights_a is None and weights_b is None and bool(np.isin(above, (0.0, 1.0)).all())
    return Difference(
        value,
        _stderr(linear[1] - linear[0]),
        found.low,
        found.high,
        level,
        len(names),
        PERCENTILE,
        found.reason,
        left_out,
        **sides,
        p_value=sign_test(above[1] - above[0]) if is_binary else None,
    )


def sign_test(differences: Sequence[float] | Array) -> float:
    """Two-sided exact sign test that a positive and a negative difference are equally likely; zeros are left out.

    For items that are 0 or 1 it is McNemar's exact test. 1.0 where all differences are 0.
    """
    found = np.asarray(differences, dtype=float)
    up, down = int((found > 0).sum()), int((found < 0).sum())
    term = total = 1  # whole numbers: exact for any n
    for k in range(min(up, down)):
        term = term * (up + down - k) // (k + 1)
        total += term
    return min(1.0, float(Fraction(2 * total, 1 << (up + down))))


# ---- several runs ------------------------------------------------------------------------------------


def t_interval(values: Sequence[float], *, level: float = LEVEL) -> Estimate:
    """The mean of a few runs' values with Student's interval; None for one run."""
    _check(level, 1)
    n = len(values)
    if not n:
        return Estimate(None, None, None, None, level, 0, STUDENT, "no run")
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, None, None, level, 1, STUDENT, "one run: nothing is known of others")
    spread = _stderr(np.asarray(values, dtype=float))
    return _student(mean, spread or 0.0, n - 1, level, n, STUDENT)


def pooled(
    values: Sequence[float],
    drawn: Array | None,
    n: int,
    *,
    level: float = LEVEL,
    seed: int = 0,
) -> Pooled:
    """Several runs (seeds, orders) as one: runs are clusters, their items are the same and resampled alike.

    Args:
        values: every run's value, k of them.
        drawn: (resamples, k) every run's value over resamples of its items, the same items for all runs (`resampled`);
            None where the values do not follow from items: then there is the interval over runs only.
        n: items.

    Returns:
        Pooled. With one run its hierarchical interval is that over items.
    """
    mean = math.fsum(values) / len(values)
    means = None if drawn is None else _mean_of_drawn_runs(drawn, np.random.default_rng(seed))
    over_runs = t_interval(values, level=level)
    return Pooled(mean, len(values), over_runs, _hierarchical(mean, means, n, len(values), level))


def pooled_difference(
    a: Sequence[float],
    b: Sequence[float],
    drawn_a: Array | None,
    drawn_b: Array | None,
    n: int,
    *,
    paired: bool,
    level: float = LEVEL,
    seed: int = 0,
) -> Pooled:
    """b - a of two groups of runs, over items that both share.

    Args:
        a, b: the runs' values.
        drawn_a, drawn_b: (resamples, runs) as for `pooled`, from the same draws of items.
        n: items.
        paired: whether run i of both groups belong together (same seed and order): then their differences are pooled;
            else runs are resampled in each group by themselves, and the t is Welch's.

    Raises:
        ValueError: paired groups of unlike size.
    """
    if paired:
        if len(a) != len(b):
            raise ValueError(f"paired groups of {len(a)} and {len(b)} runs: give as many of both, or paired=False")
        differences = [second - first for first, second in zip(a, b, strict=True)]
        drawn = None if drawn_a is None or drawn_b is None else drawn_b - drawn_a
        return pooled(differences, drawn, n, level=level, seed=seed)
    value = math.fsum(b) / len(b) - math.fsum(a) / len(a)
    means = None
    if drawn_a is not None and drawn_b is not None:
        rng = np.random.default_rng(seed)
        first, second = (_mean_of_drawn_runs(side, rng) for side in (drawn_a, drawn_b))
        means = second - first
    runs = min(len(a), len(b))
    return Pooled(value, runs, _welch(a, b, level), _hierarchical(value, means, n, max(len(a), len(b)), level))


# ---- what the rest stands on -------------------------------------------------------------------------


def resampled(
    above: Array,
    below: Array | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int | Sequence[int] = 0,
) -> Array:
    """Means, or ratios of sums, of k columns over the same resamples of their n items.

    Args:
        above: (k, n) values, or numerators.
        below: (k, n) denominators; None is a mean.
        seed: a number, or several (a name's hash beside the seed makes draws of unlike sets independent).

    Returns:
        (resamples, k)
    """
    columns, n = above.shape
    rng = np.random.default_rng(seed)
    stacked = above if below is None else np.concatenate([above, below])
    out = np.empty((resamples, len(stacked)))
    size = _block(n)
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        drawn = rng.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        out[start : start + rows] = counts @ stacked.T
    return out / n if below is None else out[:, :columns] / out[:, columns:]


def percentile(value: float | None, drawn: Array, n: int, *, level: float = LEVEL) -> Estimate:
    """The expanded percentile interval of a value from its resamples over n items; `stderr` is their deviation."""
    if value is None or n < 2:
        reason = "no item" if value is None else "one item: nothing is known of others"
        return Estimate(value, None, None, None, level, n, PERCENTILE, reason)
    if drawn.max() - drawn.min() <= 1e-12 * max(1.0, abs(value)):
        reason = f"all resamples of the {n} items are equal"
        return Estimate(value, float(drawn.std(ddof=1)), None, None, level, n, PERCENTILE, reason)
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * t_quantile(0.5 + level / 2, n - 1))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Estimate(value, float(drawn.std(ddof=1)), float(low), float(high), level, n, PERCENTILE)


def t_quantile(p: float, freedom: int) -> float:
    """The p-quantile, 0.5 <= p < 1, of Student's t with a whole number of degrees of freedom.

    By bisection of its closed form (Abramowitz and Stegun 26.7.3, 26.7.4).
    """
    wanted, low, high = 2 * p - 1, 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < wanted else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """P(|t| <= sqrt(freedom) tan(angle))."""
    odd = freedom % 2
    cosine = math.cos(angle)
    k = np.arange(1, (freedom - 2 - odd) // 2 + 1, dtype=float)
    ratios = cosine**2 * (2 * k - 1 + odd) / (2 * k + odd)
    terms = 1.0 + float(np.cumprod(ratios).sum())
    if not odd:
        return math.sin(angle) * terms
    return 2 / math.pi * (angle + (math.sin(angle) * cosine * terms if freedom > 1 else 0.0))


def _student(value: float, stderr: float, freedom: int, level: float, n: int, method: str) -> Estimate:
    if not stderr:
        return Estimate(value, stderr, None, None, level, n, method, f"all {n} runs are equal")
    half = t_quantile(0.5 + level / 2, freedom) * stderr
    return Estimate(value, stderr, value - half, value + half, level, n, method)


def _welch(a: Sequence[float], b: Sequence[float], level: float) -> Estimate:
    value = math.fsum(b) / len(b) - math.fsum(a) / len(a)
    n = min(len(a), len(b))
    if n < 2:
        reason = "a side of one run: nothing is known of others"
        return Estimate(value, None, None, None, level, n, WELCH, reason)
    first, second = ((_stderr(np.asarray(side, dtype=float)) or 0.0) ** 2 for side in (a, b))
    total = first + second
    below = first**2 / (len(a) - 1) + second**2 / (len(b) - 1)
    freedom = int(total**2 / below) if below else 1
    return _student(value, math.sqrt(total), freedom, level, n, WELCH)


def _hierarchical(value: float, drawn: Array | None, n: int, runs: int, level: float) -> Estimate:
    if drawn is None:
        return Estimate(value, None, None, None, level, n, HIERARCHICAL, "the value does not follow from its items")
    return replace(percentile(value, drawn, n, level=level), method=HIERARCHICAL if runs > 1 else PERCENTILE)


def _mean_of_drawn_runs(drawn: Array, rng: np.random.Generator) -> Array:
    """(resamples, k) -> (resamples,): in every resample k runs with replacement, averaged."""
    runs = drawn.shape[1]
    return np.take_along_axis(drawn, rng.integers(0, runs, drawn.shape), axis=1).mean(axis=1)


def _at_its_end(value: float, n: int, level: float, left_out: tuple[str, ...]) -> Estimate:
    reach = (0.5 - level / 2) ** (1 / n)
    low, high = (reach, 1.0) if value else (0.0, 1 - reach)
    return Estimate(value, 0.0, low, high, level, n, AT_ITS_END, None, left_out)


def _influence(above: Array, below: Array, ratio: float) -> Array:
    """What each item adds to the ratio of sums, to first order; of a mean its deviation."""
    return (above - ratio * below) / below.mean()


def _slopes(change: Callable[[Array], Array], at: Array) -> Array:
    """Central differences."""
    step = 1e-6 * np.maximum(1.0, np.abs(at))
    return (change(at + step) - change(at - step)) / (2 * step)


def _stderr(values: Array) -> float | None:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def _weights(weights: Mapping[str, float] | None, names: Sequence[str]) -> Array:
    if weights is None:
        return np.ones(len(names))
    lacking = [name for name in names if not weights.get(name, 0) > 0]
    if lacking:
        raise ValueError(f"item {lacking[0]}: has no weight greater than 0; a ratio of sums needs one of every item")
    return np.array([weights[name] for name in names], dtype=float)


def _named(values: Values) -> dict[str, float]:
    return dict(values) if isinstance(values, Mapping) else {str(i): value for i, value in enumerate(values)}


def _numbers(values: Values) -> tuple[list[str], Array, tuple[str, ...]]:
    """Names sorted where they are names, their values, and the names of what is not a number."""
    named = _named(values)
    order = sorted(named) if isinstance(values, Mapping) else list(named)
    names = [name for name in order if math.isfinite(named[name])]
    left_out = tuple(name for name in order if not math.isfinite(named[name]))
    return names, np.array([named[name] for name in names], dtype=float), left_out


def _block(n: int) -> int:
    """Resamples of n items that are drawn at once."""
    return max(1, BLOCK // max(1, n))


def _check(level: float, resamples: int) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level = {level}: must lie between 0 and 1, e.g. 0.95")
    if resamples < 1:
        raise ValueError(f"resamples = {resamples}: must be at least 1, e.g. {RESAMPLES}")
