"""Continual-learning metrics of the score matrix R: every one names its formula, none guesses.

`R[i][j]` is the score of task j after stage i: rows i = 0..T (row 0 is the untrained base), columns
j = 1..T. Task j is learned in stage j. In code the columns count from 0, so that column j is learned in
row j + 1. An entry that was not measured is None, and a metric that needs it is None with the reason.

Backward transfer is positive where a task got better later, forgetting is positive where it got worse,
for accuracies and losses alike: for a score where lower is better the formula is applied to -R, and
says so. `average_performance` is the plain mean of R.

Sources: Lopez-Paz & Ranzato 2017 (GEM: BWT, FWT); Chaudhry et al. 2018 (forgetting); Wang et al. 2023
(TRACE: general ability).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Matrix = Sequence[Sequence[float | None]]

NEEDS_TWO = "undefined for one task: no stage comes after it"


@dataclass(frozen=True, slots=True)
class Summary:
    """A metric's value with the formula used and the number of terms averaged; `reason` where it is None."""

    value: float | None
    formula: str
    n: int
    reason: str | None = None


def average_performance(R: Matrix) -> Summary:
    """Mean of the last row (AP, AA, OP, "last")."""
    tasks = _check(R)
    return _mean("AP = 1/T sum_j R[T][j]", [(R[tasks][j], f"R[{tasks}][{j + 1}]") for j in range(tasks)])


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
    needed = [(i, j) for j in range(tasks - 1) for i in range(j + 1, tasks + 1)]
    missing = _missing(R, needed)
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


def general_delta(
    general: Sequence[Mapping[str, float | None]], *, stage: int = -1, higher_is_better: bool = True
) -> Summary:
    """Change of general ability since stage 0 (TRACE, delta R^G): plain mean over abilities.

    Args:
        general: one mapping name -> score per stage, stage 0 first; the abilities are those of stage 0.
        stage: which stage is compared with stage 0.
    """
    if not general:
        raise ValueError("general ability: no stage given; stage 0 must come first")
    formula = "dG_i = 1/M sum_m (G[i][m] - G[0][m])"
    if not higher_is_better:
        formula += " with G replaced by -G (lower is better)"
    base, now = general[0], general[stage]
    if not base:
        return Summary(None, formula, 0, "no general ability was measured at stage 0")
    lacking = [name for name in base if base[name] is None or now.get(name) is None]
    if lacking:
        return Summary(None, formula, 0, f"not measured at both stages: {', '.join(lacking)}")
    sign = 1 if higher_is_better else -1
    changes = [sign * (float(now[name] or 0) - float(base[name] or 0)) for name in base]
    return Summary(math.fsum(changes) / len(changes), formula, len(changes))


Cell = tuple[int, int]


def _last_minus_learned(tasks: int) -> list[tuple[Cell, Cell]]:
    return [((tasks, j), (j + 1, j)) for j in range(tasks - 1)]


def _mean_change(
    R: Matrix, cells: Iterable[tuple[Cell, Cell]], formula: str, higher_is_better: bool, divisor: int
) -> Summary:
    """Sum of R[minuend] - R[subtrahend] over `divisor`."""
    cells = list(cells)
    if not cells:
        return Summary(None, formula, 0, NEEDS_TWO)
    missing = _missing(R, [cell for pair in cells for cell in pair])
    if missing:
        return Summary(None, formula, 0, missing)
    sign = 1 if higher_is_better else -1
    total = math.fsum(sign * (_known(R, *a) - _known(R, *b)) for a, b in cells)
    return Summary(total / divisor, formula, len(cells))


def _mean(formula: str, entries: Sequence[tuple[float | None, str]]) -> Summary:
    missing = [name for value, name in entries if value is None]
    if missing:
        return Summary(None, formula, 0, f"not measured: {', '.join(missing)}")
    return Summary(math.fsum(value or 0.0 for value, _ in entries) / len(entries), formula, len(entries))


def _missing(R: Matrix, cells: Iterable[Cell]) -> str | None:
    names = [f"R[{i}][{j + 1}]" for i, j in dict.fromkeys(cells) if R[i][j] is None]
    return f"not measured: {', '.join(names)}" if names else None


def _known(R: Matrix, i: int, j: int) -> float:
    value = R[i][j]
    if value is None:
        raise ValueError(f"R[{i}][{j + 1}] was not measured")
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
