"""Continual metrics against slow implementations that say plainly what the papers say.

Matrices and curves are numpy arrays here, NaN where nothing was measured, indexed as in the papers: R[stage, task] with
tasks from 1 (column 0 is unused). What NaN reaches is NaN there, and must be None here.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_harness.metrics import continual as c
from eval_harness.metrics import stability as s

pytestmark = pytest.mark.parity

scores = st.floats(-100, 100, allow_nan=False)
sometimes = st.one_of(scores, scores, scores, scores, st.none())


def of(entries, rows, columns):
    return st.lists(st.lists(entries, min_size=columns, max_size=columns), min_size=rows, max_size=rows)


matrices = st.integers(2, 6).flatmap(lambda tasks: of(scores, tasks + 1, tasks))
holed = st.integers(1, 5).flatmap(lambda tasks: of(sometimes, tasks + 1, tasks))


def as_array(matrix):
    """T + 1 x T + 1: column 0 is NaN, so that an index from 0 shows."""
    return np.array([[math.nan, *(math.nan if x is None else x for x in row)] for row in matrix])


def slow_ap(R, T):
    total = 0.0
    for j in range(1, T + 1):
        total += R[T, j]
    return total / T


def slow_maa(R, T):
    total = 0.0
    for i in range(1, T + 1):
        seen = 0.0
        for j in range(1, i + 1):
            seen += R[i, j]
        total += seen / i
    return total / T


def slow_plasticity(R, T):
    return np.mean([R[j, j] for j in range(1, T + 1)])


def slow_bwt(R, T, divisor):
    total = 0.0
    for j in range(1, T):
        total += R[T, j] - R[j, j]
    return total / divisor if T > 1 else math.nan


def slow_fwt(R, T):
    total = 0.0
    for j in range(2, T + 1):
        total += R[j - 1, j] - R[0, j]
    return total / (T - 1) if T > 1 else math.nan


def slow_forgetting(R, T):
    total = 0.0
    for j in range(1, T):
        best = R[j, j]
        for i in range(j, T):
            best = np.maximum(best, R[i, j])  # NaN stays
        total += best - R[T, j]
    return total / (T - 1) if T > 1 else math.nan


def slow_f1(R, T, general):
    performance = slow_ap(R, T)
    if min(performance, general) < 0:
        return math.nan
    return 2 * general * performance / (general + performance) if general * performance else 0.0 * performance


SLOW = {
    c.average_performance: slow_ap,
    c.mean_average_performance: slow_maa,
    c.plasticity: slow_plasticity,
    c.bwt_gem: lambda R, T: slow_bwt(R, T, T - 1),
    c.bwt_t: lambda R, T: slow_bwt(R, T, T),
    c.fwt_gem: slow_fwt,
    c.forgetting_max: slow_forgetting,
    c.forgetting_just_learned: lambda R, T: -slow_bwt(R, T, T - 1),
    partial(c.f1_average, general=0.6): lambda R, T: slow_f1(R, T, 0.6),
}
DIRECTED = (c.bwt_gem, c.bwt_t, c.fwt_gem, c.forgetting_max, c.forgetting_just_learned)


def agree(summary, expected):
    if math.isnan(expected):
        assert summary.value is None
        assert summary.reason
    else:
        assert summary.value == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(holed)
def test_against_the_loops_with_cells_missing(matrix):
    T = len(matrix) - 1
    for fast, slow in SLOW.items():
        agree(fast(matrix), slow(as_array(matrix), T))
    for fast in DIRECTED:
        agree(fast(matrix, higher_is_better=False), SLOW[fast](-as_array(matrix), T))


@given(st.integers(1, 5).flatmap(lambda tasks: st.tuples(of(sometimes, tasks + 1, tasks), of(sometimes, 1, tasks))))
def test_references_against_the_loop(drawn):
    matrix, (reference,) = drawn
    R, T, other = as_array(matrix), len(matrix) - 1, as_array([reference])[0]
    lack = np.mean([other[j] - R[j, j] for j in range(1, T + 1)])
    agree(c.intransigence(matrix, reference, against="joint"), lack)
    agree(c.intransigence(matrix, reference, against="single", higher_is_better=False), -lack)
    agree(c.fwt_sapt(matrix, reference), -lack)
    agree(c.fwt_sapt(matrix, reference, higher_is_better=False), lack)


@given(st.integers(1, 4).flatmap(lambda abilities: of(sometimes, 3, abilities)), st.integers(0, 2))
def test_general_delta_against_the_loop(rows, stage):
    general = [{str(m): score for m, score in enumerate(row)} for row in rows]
    G = as_array(rows)[:, 1:]
    agree(c.general_delta(general, stage=stage), np.mean(G[stage] - G[0]))
    agree(c.general_delta(general, stage=stage, higher_is_better=False), np.mean(G[0] - G[stage]))


@given(st.floats(0, 100), st.floats(0, 100))
def test_the_harmonic_mean_lies_between_the_smaller_and_twice_it(a, b):
    value = c.hars(a, b).value
    assert min(a, b) * (1 - 1e-12) <= value <= 2 * min(a, b) * (1 + 1e-12)
    assert value <= max(a, b) * (1 + 1e-12)


@given(matrices)
def test_relations_between_them(matrix):
    gem, learned = c.bwt_gem(matrix), c.forgetting_just_learned(matrix)
    assert learned.value == pytest.approx(-gem.value, abs=1e-9)
    assert c.forgetting_max(matrix).value >= learned.value - 1e-9
    T = len(matrix) - 1
    change = c.average_performance(matrix).value - c.plasticity(matrix).value
    assert change == pytest.approx(c.bwt_t(matrix).value, abs=1e-9)  # AP = P + BWT_T
    assert c.bwt_t(matrix).value * T == pytest.approx(gem.value * (T - 1), abs=1e-9)


@given(matrices, st.integers(-50, 50))
def test_differences_do_not_see_a_constant(matrix, constant):
    shifted = [[value + constant for value in row] for row in matrix]
    for metric in DIRECTED:
        assert metric(shifted).value == pytest.approx(metric(matrix).value, abs=1e-8)


# ---- curves --------------------------------------------------------------------------------------------

curves = st.tuples(st.integers(1, 9), st.integers(1, 3)).flatmap(lambda shape: of(sometimes, *shape))


def as_curve(rows):
    return [(10 * n, {str(task): score for task, score in enumerate(row)}) for n, row in enumerate(rows)]


def slow_window(A, window):
    """The largest fall in any window of consecutive evaluations, over every pair in it."""
    if np.isnan(A).any() or len(A) < 2:
        return math.nan
    largest = 0.0
    for start in range(len(A)):
        inside = A[start : start + window]
        for m in range(len(inside)):
            for n in range(m + 1, len(inside)):
                largest = max(largest, inside[m] - inside[n])
    return largest


@given(curves, st.integers(2, 6))
def test_windows_against_every_pair(rows, window):
    columns = as_array(rows)[:, 1:].T
    falls = np.mean([slow_window(A, window) for A in columns])
    rises = np.mean([slow_window(-A, window) for A in columns])
    agree(s.windowed_forgetting(as_curve(rows), window), falls)
    agree(s.windowed_plasticity(as_curve(rows), window), rises)
    agree(s.windowed_forgetting(as_curve(rows), window, higher_is_better=False), rises)
    agree(s.windowed_plasticity(as_curve(rows), window, higher_is_better=False), falls)


@given(curves)
def test_the_worst_against_numpy(rows):
    """The last column is the task being learned."""
    columns = as_array(rows)[:, 1:].T
    before, current = [str(task) for task in range(len(columns) - 1)], str(len(columns) - 1)
    later, k = columns[:-1, 1:], len(columns)
    minima = later.min(axis=1) if later.size else np.full(k - 1, math.nan)
    agree(s.min_acc(as_curve(rows), before), minima.mean() if k > 1 else math.nan)
    last = columns[-1, -1]
    agree(s.wc_acc(as_curve(rows), before, current), last / k + (1 - 1 / k) * minima.mean() if k > 1 else last)
