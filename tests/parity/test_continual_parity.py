"""Continual metrics against loops that say plainly what the papers say, with the papers' indices from 1."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_harness.metrics import continual as c

pytestmark = pytest.mark.parity

scores = st.floats(-100, 100, allow_nan=False)
matrices = st.integers(2, 6).flatmap(
    lambda tasks: st.lists(st.lists(scores, min_size=tasks, max_size=tasks), min_size=tasks + 1, max_size=tasks + 1)
)


def at(matrix, stage, task):
    """R[stage][task] with tasks counted from 1, stage 0 the base."""
    return matrix[stage][task - 1]


def slow_bwt(matrix, divisor):
    last, total = len(matrix) - 1, 0.0
    for task in range(1, last):
        total += at(matrix, last, task) - at(matrix, task, task)
    return total / divisor


def slow_fwt(matrix):
    last, total = len(matrix) - 1, 0.0
    for task in range(2, last + 1):
        total += at(matrix, task - 1, task) - at(matrix, 0, task)
    return total / (last - 1)


def slow_forgetting(matrix, higher_is_better=True):
    last, total = len(matrix) - 1, 0.0
    for task in range(1, last):
        best = at(matrix, task, task)
        for stage in range(task, last):
            score = at(matrix, stage, task)
            best = max(best, score) if higher_is_better else min(best, score)
        fell = best - at(matrix, last, task)
        total += fell if higher_is_better else -fell
    return total / (last - 1)


@given(matrices)
def test_against_the_loops(matrix):
    tasks = len(matrix) - 1
    close = {"rel": 1e-9, "abs": 1e-9}
    assert c.average_performance(matrix).value == pytest.approx(sum(matrix[-1]) / tasks, **close)
    assert c.bwt_gem(matrix).value == pytest.approx(slow_bwt(matrix, tasks - 1), **close)
    assert c.bwt_t(matrix).value == pytest.approx(slow_bwt(matrix, tasks), **close)
    assert c.fwt_gem(matrix).value == pytest.approx(slow_fwt(matrix), **close)
    assert c.forgetting_max(matrix).value == pytest.approx(slow_forgetting(matrix), **close)
    lower = c.forgetting_max(matrix, higher_is_better=False)
    assert lower.value == pytest.approx(slow_forgetting(matrix, higher_is_better=False), **close)


@given(matrices)
def test_relations_between_them(matrix):
    gem, learned = c.bwt_gem(matrix), c.forgetting_just_learned(matrix)
    assert learned.value == pytest.approx(-gem.value, abs=1e-9)
    assert c.forgetting_max(matrix).value >= learned.value - 1e-9


@given(matrices, st.integers(-50, 50))
def test_differences_do_not_see_a_constant(matrix, constant):
    shifted = [[value + constant for value in row] for row in matrix]
    for metric in (c.bwt_gem, c.bwt_t, c.fwt_gem, c.forgetting_max, c.forgetting_just_learned):
        assert metric(shifted).value == pytest.approx(metric(matrix).value, abs=1e-8)
