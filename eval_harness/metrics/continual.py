"""Continual-learning metrics of the score matrix R: every one names its formula, none guesses.

`R[i][j]` is the score of task j after stage i: rows i = 0..T (row 0 is the untrained base), columns
j = 1..T. Task j is learned in stage j. In code the columns count from 0, so that column j is learned in
row j + 1. An entry that was not measured is None; a metric that needs it, or one that is not finite, is None
with the reason, which names the entry as papers do, R[stage][task].

Two kinds of values. A level is in the scores' own unit and never turned: `average_performance`,
`mean_average_performance`, `plasticity`. A change has one direction for accuracies and losses alike:
transfer is positive where a task got better, forgetting, intransigence positive where it got worse; for a score
where lower is better the formula is applied to -R, and says so.

Sources: Lopez-Paz & Ranzato 2017 (GEM, arXiv 1706.08840: BWT, FWT); Chaudhry et al. 2018 (arXiv 1801.10112:
forgetting, intransigence); Rebuffi et al. 2017 (iCaRL, arXiv 1611.07725: the average over stages); Riemer et al.
2019 (arXiv 1810.11910: learning accuracy); Wang et al. 2023 (TRACE, arXiv 2310.06762: general ability); Zhao et al.
2024 (SAPT, arXiv 2401.08295); GeRe (arXiv 2508.04676); KORE (arXiv 2510.19316).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Matrix = Sequence[Sequence[float | None]]
Row = Sequence[float | None]

NEEDS_TWO = "undefined for one task: no stage comes after it"


@dataclass(frozen=True, slots=True)
class Summary:
    """A metric's value with the formula used and the number of terms; `reason` where it is None, or 0 by rule."""

    value: float | None
    formula: str
    n: int
    reason: str | None = None


# ---- levels: in the unit of the scores -----------------------------------------------------------------


def average_performance(R: Matrix) -> Summary:
    """Mean of the last row (AP, AA, OP, "last")."""
    tasks = _check(R)
    return _mean(R, [(tasks, j) for j in range(tasks)], "AP = 1/T sum_j R[T][j]")


def mean_average_performance(R: Matrix) -> Summary:
    """Mean over stages of the mean over the tasks learned so far (MAA, average incremental accuracy; iCaRL).

    A task weighs more the earlier it came, so unlike AP it depends on the order even where nothing is forgotten.
    """
    tasks = _check(R)
    formula = "MAA = 1/T sum_i 1/i sum_{j<=i} R[i][j]"
    seen = [[(i, j) for j in range(i)] for i in range(1, tasks + 1)]
    missing = _missing(R, (cell for stage in seen for cell in stage))
    if missing:
        return Summary(None, formula, 0, missing)
    means = [math.fsum(_known(R, *cell) for cell in stage) / len(stage) for stage in seen]
    return Summary(math.fsum(means) / tasks, formula, tasks)


def plasticity(R: Matrix) -> Summary:
    """Mean score of a task right after the stage that teaches it (learning accuracy, Riemer et al.)."""
    tasks = _check(R)
    return _mean(R, _learned(tasks), "P = 1/T sum_j R[j][j]")


# ---- changes within R: higher is better, or the formula of -R --------------------------------------------


def bwt_gem(R: Matrix, *, higher_is_better: bool = True) -> Summary:
    """Backward transfer over the T - 1 tasks that something followed (GEM, eq. 3)."""
    tasks = _check(R)
    formula = _formula("BWT_GEM = 1/(T-1) sum_{j<T} (R[T][j] - R[j][j])", higher_is_better)
    return _mean_change(R, _last_minus_learned(tasks), formula, higher_is_better, tasks - 1)


def bwt_t(R: Matrix, *, higher_is_better: bool = True) -> Summary:
    """The same sum divided by T (SAPT, TRACE): (T - 1) / T of `bwt_gem`; compare like with like."""
    tasks = _check(R)
    formula = _formula("BWT_T = 1/T sum_{j<T} (R[T][j] - R[j][j])", higher_is_better)
    return _mean_change(R, _last_minus_learned(tasks), formula, higher_is_better, tasks)


def fwt_gem(R: Matrix, *, higher_is_better: bool = True) -> Summary:
    """Forward transfer (GEM, eq. 4): a task's score just before it is learned, less the base model's."""
    tasks = _check(R)
    formula = _formula("FWT_GEM = 1/(T-1) sum_{j>1} (R[j-1][j] - R[0][j])", higher_is_better)
    cells = [((j, j), (0, j)) for j in range(1, tasks)]
    return _mean_change(R, cells, formula, higher_is_better, tasks - 1)


def forgetting_max(R: Matrix, *, higher_is_better: bool = True) -> Summary:
    """Forgetting (Chaudhry): the best score from learning to the last stage but one, less the last score."""
    tasks = _check(R)
    formula = _formula("F_max = 1/(T-1) sum_{j<T} (max_{j<=i<=T-1} R[i][j] - R[T][j])", higher_is_better)
    if tasks < 2:
        return Summary(None, formula, 0, NEEDS_TWO)
    missing = _missing(R, ((i, j) for j in range(tasks - 1) for i in range(j + 1, tasks + 1)))
    if missing:
        return Summary(None, formula, 0, missing)
    sign = 1 if higher_is_better else -1
    drops = []
    for j in range(tasks - 1):
        scores = [sign * _known(R, i, j) for i in range(j + 1, tasks + 1)]
        drops.append(max(scores[:-1]) - scores[-1])
    return Summary(math.fsum(drops) / len(drops), formula, len(drops))


def forgetting_just_learned(R: Matrix, *, higher_is_better: bool = True) -> Summary:
    """Forgetting since a task was learned (Avalanche): -BWT_GEM."""
    tasks = _check(R)
    formula = _formula("F_learned = 1/(T-1) sum_{j<T} (R[j][j] - R[T][j])", higher_is_better)
    cells = [(learned, last) for last, learned in _last_minus_learned(tasks)]
    return _mean_change(R, cells, formula, higher_is_better, tasks - 1)


# ---- against other models' scores ------------------------------------------------------------------------


def fwt_sapt(R: Matrix, single: Row, *, higher_is_better: bool = True) -> Summary:
    """Forward transfer as SAPT's script has it: a task's score right after learning it, less that of a model
    trained on this task alone; `intransigence` against "single" with the other sign.

    Args:
        single: T scores of the single-task models, in the columns' order, measured as R is. SAPT's script holds one
            constant mean (50.94, for its own base model and tasks); it is nobody else's reference.

    Raises:
        ValueError: `single` has not one score per task.
    """
    formula = _formula("FWT_SAPT = 1/T sum_j (R[j][j] - S[j])", higher_is_better)
    return _learned_against(R, single, "S", formula, 1 if higher_is_better else -1)


def intransigence(
    R: Matrix, reference: Row, *, against: Literal["joint", "single"], higher_is_better: bool = True
) -> Summary:
    """What a task lacks, right after it is learned, to a model that saw no stream (Chaudhry): positive is worse.

    Args:
        reference: T scores, in the columns' order, measured as R is.
        against: what `reference` is of. "joint": for task j a model trained on the data of tasks 1..j together, as
            Chaudhry; one model trained on all T is a common stand-in. "single": a model trained on task j alone.

    Raises:
        ValueError: `reference` has not one score per task, or `against` is neither.
    """
    if against not in ("joint", "single"):
        raise ValueError(f"against = {against!r}: must be 'joint' or 'single', what the reference was trained on")
    symbol = {"joint": "J", "single": "S"}[against]
    formula = _formula(f"I_{against} = 1/T sum_j ({symbol}[j] - R[j][j])", higher_is_better)
    return _learned_against(R, reference, symbol, formula, -1 if higher_is_better else 1)


# ---- general ability -------------------------------------------------------------------------------------


def general_delta(
    general: Sequence[Mapping[str, float | None]], *, stage: int = -1, higher_is_better: bool = True
) -> Summary:
    """Change of general ability since stage 0 (TRACE, delta R^G): plain mean over abilities.

    Args:
        general: one mapping name -> score per stage, stage 0 first; the abilities are those of stage 0.
        stage: which stage is compared with stage 0; negative ones count from the end.

    Raises:
        ValueError: no stage is given, or `stage` is none of them.
    """
    if not general:
        raise ValueError("general ability: no stage given; stage 0 must come first")
    if not -len(general) <= stage < len(general):
        raise ValueError(f"stage = {stage}: must be one of the {len(general)} stages given, 0 to {len(general) - 1}")
    formula = "dG_i = 1/M sum_m (G[i][m] - G[0][m])"
    if not higher_is_better:
        formula += " with G replaced by -G (lower is better)"
    base, now = general[0], general[stage]
    if not base:
        return Summary(None, formula, 0, "no general ability was measured at stage 0")
    at = stage % len(general)
    missing = gaps((f"G[{i}][{name}]", by.get(name)) for name in base for i, by in {0: base, at: now}.items())
    if missing:
        return Summary(None, formula, 0, missing)
    sign = 1 if higher_is_better else -1
    changes = [sign * (float(now[name] or 0) - float(base[name] or 0)) for name in base]
    return Summary(math.fsum(changes) / len(changes), formula, len(changes))


def f1_average(R: Matrix, general: float | None, *, higher_is_better: bool = True) -> Summary:
    """GeRe's "F1 Avg": the harmonic mean of general ability and of the average performance at the end.

    Args:
        general: one score after the last stage, MMLU in the paper; from 0 up, in the scale of R (both shares or both
            per cent, which the formula cannot see).

    Returns:
        Summary, with the rules for 0 and below of `hars`.
    """
    performance = average_performance(R)
    formula = "F1_avg = 2 G AP / (G + AP), AP = 1/T sum_j R[T][j]"
    if performance.value is None:
        return Summary(None, formula, 0, performance.reason)
    return _harmonic({"G": general, "AP": performance.value}, formula, higher_is_better)


def hars(adaptation: float | None, retention: float | None, *, higher_is_better: bool = True) -> Summary:
    """KORE's HARS: the harmonic mean of what was learned and what was kept.

    Args:
        adaptation: mean score on what was taught, from 0 up.
        retention: mean score on what was to be kept, from 0 up, in the same scale.

    Returns:
        Summary. 0 by rule where one is 0, also where both are (the mean lies below twice the smaller one, so 0 is the
        limit); None where one is below 0, where it is no mean and has a pole, and for scores where lower is better.
    """
    return _harmonic({"A": adaptation, "K": retention}, "HARS = 2 A K / (A + K)", higher_is_better)


# ---- what they stand on ----------------------------------------------------------------------------------

Cell = tuple[int, int]


def gaps(entries: Iterable[tuple[str, float | None]]) -> str | None:
    """Names the entries that are None, NaN or infinite; None where there are none."""
    absent, odd = [], []
    for name, value in dict.fromkeys(entries):
        if value is None:
            absent.append(name)
        elif not math.isfinite(value):
            odd.append(f"{name} = {value}")
    said = [f"not measured: {', '.join(absent)}"] * bool(absent) + [f"not finite: {', '.join(odd)}"] * bool(odd)
    return "; ".join(said) or None


def _learned(tasks: int) -> list[Cell]:
    return [(j + 1, j) for j in range(tasks)]


def _last_minus_learned(tasks: int) -> list[tuple[Cell, Cell]]:
    return [((tasks, j), learned) for j, learned in enumerate(_learned(tasks)[:-1])]


def _mean(R: Matrix, cells: Sequence[Cell], formula: str) -> Summary:
    missing = _missing(R, cells)
    if missing:
        return Summary(None, formula, 0, missing)
    return Summary(math.fsum(_known(R, *cell) for cell in cells) / len(cells), formula, len(cells))


def _mean_change(
    R: Matrix, cells: Sequence[tuple[Cell, Cell]], formula: str, higher_is_better: bool, divisor: int
) -> Summary:
    """Sum of R[minuend] - R[subtrahend] over `divisor`."""
    if not cells:
        return Summary(None, formula, 0, NEEDS_TWO)
    missing = _missing(R, (cell for pair in cells for cell in pair))
    if missing:
        return Summary(None, formula, 0, missing)
    sign = 1 if higher_is_better else -1
    total = math.fsum(sign * (_known(R, *a) - _known(R, *b)) for a, b in cells)
    return Summary(total / divisor, formula, len(cells))


def _learned_against(R: Matrix, reference: Row, symbol: str, formula: str, sign: int) -> Summary:
    """Mean of R[j][j] - reference[j], times `sign`."""
    tasks = _check(R)
    if len(reference) != tasks:
        raise ValueError(
            f"{symbol} has {len(reference)} scores for {tasks} tasks: must be one per task, in their order"
        )
    others = [(f"{symbol}[{j + 1}]", value) for j, value in enumerate(reference)]
    missing = gaps([*((_name(i, j), R[i][j]) for i, j in _learned(tasks)), *others])
    if missing:
        return Summary(None, formula, 0, missing)
    pairs = zip(_learned(tasks), reference, strict=True)
    differences = [sign * (_known(R, *cell) - float(other or 0)) for cell, other in pairs]
    return Summary(math.fsum(differences) / tasks, formula, tasks)


def _harmonic(two: Mapping[str, float | None], formula: str, higher_is_better: bool) -> Summary:
    if not higher_is_better:
        return Summary(None, formula, 0, "undefined where lower is better: a harmonic mean is of gains")
    missing = gaps(two.items())
    if missing:
        return Summary(None, formula, 0, missing)
    known = {name: float(value or 0) for name, value in two.items()}
    below = [f"{name} = {value:g}" for name, value in known.items() if value < 0]
    if below:
        return Summary(None, formula, 0, f"a harmonic mean is undefined below 0: {', '.join(below)}")
    zero = [name for name, value in known.items() if value == 0]
    if zero:
        return Summary(0.0, formula, len(known), f"0 by rule, because 0 is the value of: {', '.join(zero)}")
    low, high = sorted(known.values())
    return Summary(2 * low / (1 + low / high), formula, len(known))  # 1 / low may be infinite


def _missing(R: Matrix, cells: Iterable[Cell]) -> str | None:
    """`gaps` of R; a bootstrap comes through here a thousand times, so entries are named only where needed."""
    bad = [(i, j) for i, j in cells if (value := R[i][j]) is None or not math.isfinite(value)]
    return gaps((_name(i, j), R[i][j]) for i, j in bad)


def _name(i: int, j: int) -> str:
    return f"R[{i}][{j + 1}]"


def _known(R: Matrix, i: int, j: int) -> float:
    value = R[i][j]
    if value is None:
        raise ValueError(f"{_name(i, j)} was not measured")
    return value


def _formula(formula: str, higher_is_better: bool) -> str:
    return formula if higher_is_better else f"{formula} with R replaced by -R (lower is better)"


def _check(R: Matrix) -> int:
    """Number of tasks T of a matrix of T + 1 rows and T columns."""
    tasks = len(R) - 1
    if tasks < 1 or any(len(row) != tasks for row in R):
        raise ValueError(
            f"R has {len(R)} rows of {sorted({len(row) for row in R})} columns: must have a row for the base "
            "and one per stage, and a column per stage (T + 1 rows of T)"
        )
    return tasks
