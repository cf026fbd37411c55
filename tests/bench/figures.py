"""A measured figure beside its bound: median, interval, verdict, and the table of them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    value: the median over repeats, or the one measurement. interval: 95 % bootstrap interval of that median,
    None for one measurement. unit: "x" for a ratio. least, most: the bound, inclusive, on one side or both.
    samples: what it was computed from, by name, in the order of measurement. Raises ValueError without a bound.
    """

    name: str
    value: float
    unit: str
    most: float | None = None
    least: float | None = None
    interval: tuple[float, float] | None = None
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.most is None and self.least is None:
            raise ValueError(f"{self.name}: a figure without a bound says nothing; give most, least or both")

    @property
    def holds(self) -> bool:
        """Whether the value, not its interval, keeps the bound."""
        return (self.most is None or self.value <= self.most) and (self.least is None or self.value >= self.least)

    @property
    def bound(self) -> str:
        """What is allowed, in words."""
        if self.least is None:
            return f"at most {self.most:g}"
        return f"at least {self.least:g}" if self.most is None else f"{self.least:g} to {self.most:g}"

    def to_json(self) -> dict[str, Any]:
        """Every field, and the verdict."""
        return asdict(self) | {"holds": self.holds}

    def cells(self) -> list[str]:
        """Name, value, interval, repeats, bound, verdict."""
        interval = "" if self.interval is None else f"{self.interval[0]:.3f} to {self.interval[1]:.3f}"
        repeats = str(max((len(values) for values in self.samples.values()), default=1))
        verdict = "holds" if self.holds else "does not hold"
        return [self.name, f"{self.value:.3f} {self.unit}", interval, repeats, f"{self.bound} {self.unit}", verdict]


def median_of(name: str, values: Sequence[float], unit: str, most: float) -> Figure:
    """The median of repeated measurements."""
    return Figure(name, float(np.median(values)), unit, most, None, bootstrap(values), {unit: list(values)})


def ratio_of(
    name: str,
    a: Sequence[float],
    b: Sequence[float],
    sides: tuple[str, str],
    most: float | None = None,
    least: float | None = None,
    measured: str = "seconds",
) -> Figure:
    """The median of a[i] / b[i] over interleaved pairs; sides name a and b, measured what they hold (per step)."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    samples = {f"{side} {measured}": list(values) for side, values in zip(sides, (a, b), strict=True)}
    return Figure(name, float(np.median(ratios)), "x", most, least, bootstrap(ratios), samples)


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """95 % percentile interval of the median: 10,000 resamples with replacement, seed 0."""
    draws = np.random.default_rng(0).choice(np.asarray(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(low), float(high)


def table(figures: Sequence[Figure]) -> str:
    """The figures as aligned text, a line each."""
    rows = [["figure", "median", "95 % interval", "n", "bound", "verdict"], *(figure.cells() for figure in figures)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
