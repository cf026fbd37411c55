"""Statistics against loops that say plainly what is meant, against scipy, and against what an interval promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from eval_harness.metrics import statistics as s

pytestmark = pytest.mark.parity


@given(st.floats(0.5, 0.9999), st.integers(1, 2000))
def test_quantiles_of_t_are_those_of_scipy(p, freedom):
    assert s.t_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=1e-9, abs=1e-9)


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5]), max_size=60))
def test_the_sign_test_is_the_binomial_test(differences):
    up, down = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    expected = stats.binomtest(up, up + down).pvalue if up + down else 1.0
    assert s.sign_test(differences) == pytest.approx(expected, rel=1e-9)


def slow_resamples(above, below, resamples, seed):
    """One resample after the other, one item after the other."""
    rng, (columns, n) = np.random.default_rng(seed), above.shape
    for _ in range(resamples):
        drawn = [int(rng.integers(0, n)) for _ in range(n)]
        yield [sum(above[k][i] for i in drawn) / sum(below[k][i] for i in drawn) for k in range(columns)]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 3), st.integers(0, 5))
def test_resamples_are_those_of_the_loop(n, columns, seed):
    rng = np.random.default_rng(99)
    above, below = rng.normal(size=(columns, n)), rng.random((columns, n)) + 0.1
    slow = list(slow_resamples(above, below, 30, seed))
    assert s.resampled(above, below, resamples=30, seed=seed) == pytest.approx(np.array(slow))
    ones = np.ones((columns, n))
    slow = list(slow_resamples(above, ones, 30, seed))
    assert s.resampled(above, resamples=30, seed=seed) == pytest.approx(np.array(slow))


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_interval_is_that_of_the_loop(level):
    values = {f"{i:02d}": float(i * i % 17) for i in range(20)}
    drawn = sorted(row[0] for row in slow_resamples(np.array([list(values.values())]), np.ones((1, 20)), 400, 3))
    tail = stats.norm.cdf(-math.sqrt(20 / 19) * stats.t.ppf(0.5 + level / 2, 19))
    found = s.bootstrap(values, level=level, resamples=400, seed=3)
    assert (found.low, found.high) == (
        pytest.approx(np.quantile(drawn, tail)),
        pytest.approx(np.quantile(drawn, 1 - tail)),
    )


def test_welch_is_that_of_scipy_but_for_whole_degrees_of_freedom():
    a, b = [1.0, 2.0, 4.0], [3.0, 3.5, 9.0, 4.0]
    found = s.pooled_difference(a, b, np.zeros((5, 3)), np.zeros((5, 4)), 10, paired=False).over_runs
    theirs = stats.ttest_ind(b, a, equal_var=False)
    half = stats.t.ppf(0.975, int(theirs.df)) * (found.value / theirs.statistic)
    assert (found.low, found.high) == (pytest.approx(found.value - half), pytest.approx(found.value + half))


def coverage(make, intervals, trials=400):
    """Shares of trials in which each interval holds 0."""
    found = np.zeros(len(intervals))
    for trial in range(trials):
        pooled = make(trial)
        for i, pick in enumerate(intervals):
            one = pick(pooled)
            found[i] += one.low <= 0 <= one.high
    return found / trials


def test_a_95_percent_interval_holds_the_truth_95_times_of_100():
    """20 normal items, 400 trials: a binomial deviation of 1.1 points. Without expansion it would be 92 %."""
    rng = np.random.default_rng(0)
    (share,) = coverage(lambda t: s.bootstrap(rng.normal(size=20), resamples=500, seed=t), [lambda one: one])
    assert 0.925 <= share <= 0.975


@pytest.mark.parametrize(("over_seeds", "over_items"), [(0.1, 0.0), (0.1, 1.0), (0.0, 1.0)])
def test_three_runs_of_a_hundred_items(over_seeds, over_items):
    """What is shown holds the truth; the t fails where the items vary, the bootstrap of runs where the seeds do."""
    rng = np.random.default_rng(1)

    def make(trial):
        seeds, items = over_seeds * rng.normal(size=(3, 1)), over_items * rng.normal(size=(1, 100))
        values = seeds + items + 0.3 * rng.normal(size=(3, 100))
        return s.pooled(list(values.mean(1)), s.resampled(values, resamples=300, seed=trial), 100, seed=trial)

    t, hierarchical, shown = coverage(make, [lambda p: p.over_runs, lambda p: p.hierarchical, lambda p: p.shown])
    assert shown >= 0.92
    if over_items:
        assert t < 0.9
    else:
        assert hierarchical < 0.9
