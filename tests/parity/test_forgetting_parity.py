"""Memorisation, forgetting and membership against slow implementations that say plainly what the papers say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval_harness.metrics import forgetting as f
from eval_harness.metrics import membership as m

pytestmark = pytest.mark.parity

log_probs = st.lists(st.floats(-20, 0), min_size=1, max_size=8)
hits = st.lists(st.booleans(), min_size=1, max_size=12)
scores = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=12)  # few values, many ties
CLOSE = {"rel": 1e-9, "abs": 1e-12}


# ---- the papers' words -------------------------------------------------------------------------------


def normalised(one):
    """p(answer)^(1/n) as a product of probabilities."""
    return np.prod(np.exp(np.array(one))) ** (1 / len(one))


def slow_geometric(right, wrong):
    return np.prod([normalised(one) for one in wrong]) ** (1 / len(wrong)) / normalised(right)


def slow_arithmetic(right, wrong):
    return np.mean([normalised(one) for one in wrong]) / normalised(right)


def slow_extraction_strength(hits):
    """Try every k, from the whole answer to nothing: the first that is completed greedily."""
    n = len(hits)
    for k in range(n + 1):
        if all(hits[k:]):
            return 1 - k / n


def slow_ks(one, other):
    """The largest distance of the two empirical distribution functions, at every point of either."""
    return max(abs(np.mean(np.array(one) <= x) - np.mean(np.array(other) <= x)) for x in [*one, *other])


def slow_ks_p(one, other):
    """Share of all ways to split the pooled values (no ties) that are at least as far apart."""
    from itertools import combinations

    pooled, observed = [*one, *other], slow_ks(one, other)
    far = [
        slow_ks([pooled[i] for i in chosen], [pooled[i] for i in range(len(pooled)) if i not in chosen])
        for chosen in combinations(range(len(pooled)), len(one))
    ]
    return np.mean(np.array(far) >= observed - 1e-12)


def slow_auc(members, nonmembers):
    return np.mean([(a < b) + 0.5 * (a == b) for a in members for b in nonmembers])


def slow_min_k(values, k):
    count = max(1, int(k * len(values)))
    return -np.mean(np.sort(np.array(values))[:count])


# ---- the comparison ----------------------------------------------------------------------------------


@given(log_probs, st.lists(log_probs, min_size=1, max_size=5))
def test_truth_ratio_and_probabilities(right, wrong):
    assert f.probability(right) == pytest.approx(normalised(right), **CLOSE)
    assert f.truth_ratio_geometric(right, wrong) == pytest.approx(slow_geometric(right, wrong), **CLOSE)
    assert f.truth_ratio_arithmetic(right, wrong) == pytest.approx(slow_arithmetic(right, wrong), **CLOSE)
    share = normalised(right) / (normalised(right) + sum(map(normalised, wrong)))
    assert f.choice_probability(right, wrong) == pytest.approx(share, **CLOSE)


@given(log_probs, st.lists(log_probs, min_size=1, max_size=5), st.floats(-50, 0))
def test_relations_of_the_truth_ratios(right, wrong, shift):
    geometric, arithmetic = f.truth_ratio_geometric(right, wrong), f.truth_ratio_arithmetic(right, wrong)
    assert geometric <= arithmetic * (1 + 1e-12)
    assert f.truth_ratio_geometric(right, wrong[::-1]) == pytest.approx(geometric, rel=1e-12)
    moved = [[value + shift for value in one] for one in (right, *wrong)]  # all less likely by the same factor
    for ratio, value in ((f.truth_ratio_geometric, geometric), (f.truth_ratio_arithmetic, arithmetic)):
        assert ratio(moved[0], moved[1:]) == pytest.approx(value, rel=1e-9)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=9))
def test_aggregates(ratios):
    closeness = np.mean([min(r, 1 / r if r else math.inf) for r in ratios])
    assert f.aggregate(ratios, "closeness").value == pytest.approx(closeness, **CLOSE)
    assert f.aggregate(ratios, "true_better").value == pytest.approx(np.mean(np.maximum(0, 1 - np.array(ratios))))
    assert f.aggregate(ratios, "prob_mean").value == pytest.approx(np.mean(1 / (1 + np.array(ratios))))


@given(hits, st.integers(0, 3))
def test_memorisation(hits, end_tokens):
    text = hits[: len(hits) - min(end_tokens, len(hits) - 1)]
    end_tokens = len(hits) - len(text)
    assert f.exact_memorisation(hits, end_tokens=end_tokens) == pytest.approx(np.mean(text), **CLOSE)
    strength = f.extraction_strength(hits, end_tokens=end_tokens)
    assert strength == pytest.approx(slow_extraction_strength(text), **CLOSE)
    assert strength <= f.exact_memorisation(text)
    assert (strength == 0) == (not text[-1])


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(7)), st.integers(2, 5))
def test_forget_quality(order, n):
    """Exact p by counting all splits of seven distinct values; the longer side is cut to what both have."""
    values = [float(value) for value in order]
    ratios, reference = values[:n], values[n:]
    size = max(len(ratios), len(reference))
    padded = [side + [math.nan] * (size - len(side)) for side in (ratios, reference)]
    quality = f.forget_quality(*padded)
    assert (quality.n, quality.n_ref) == (n, 7 - n)
    assert quality.statistic == pytest.approx(slow_ks(ratios, reference), **CLOSE)
    assert quality.p == pytest.approx(slow_ks_p(ratios, reference), **CLOSE)


@given(st.lists(st.floats(1e-3, 1), min_size=9, max_size=9))
def test_model_utility(values):
    from scipy.stats import hmean

    rows = zip(f.UTILITY_SETS, np.reshape(values, (3, 3)).tolist(), strict=True)
    summary = f.model_utility(
        {one: dict(zip(f.UTILITY_QUANTITIES, row, strict=True)) for one, row in rows}, truth_ratio="arithmetic"
    )
    assert summary.value == pytest.approx(hmean(values), rel=1e-12)


@given(scores, scores)
def test_auc(members, nonmembers):
    from scipy.stats import mannwhitneyu

    area = m.auc(members, nonmembers)
    assert area.value == pytest.approx(slow_auc(members, nonmembers), **CLOSE)
    u = mannwhitneyu(nonmembers, members).statistic  # of the first sample being larger
    assert area.value == pytest.approx(u / len(members) / len(nonmembers), **CLOSE)
    assert m.auc(nonmembers, members).value == pytest.approx(area.muse, **CLOSE)
    if area.low is not None:
        assert 0 <= area.low <= area.value <= area.high <= 1


@given(log_probs, st.floats(0.01, 1))
def test_min_k(values, k):
    assert m.min_k(values, k) == pytest.approx(slow_min_k(values, k), **CLOSE)
    assert m.min_k(values, 1) == pytest.approx(m.loss(values), **CLOSE)
    assert m.min_k(values, k) >= m.loss(values) - 1e-9  # the lowest tokens are no likelier than all


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.sampled_from([0.2, 0.4, 1.0]))
def test_min_k_plus_plus(seed, n, k):
    """From whole distributions over 11 tokens, one of them almost certain so that its variance is clamped."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3, (n, 11))
    logits[0, 0] = 60.0
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    token = random.integers(0, 11, n)
    mean = (p * np.log(p)).sum(1)
    variance = (p * np.log(p) ** 2).sum(1) - mean**2
    assert variance[0] < 1e-6
    z = [(math.log(p[t, v]) - mean[t]) / math.sqrt(max(variance[t], 1e-6)) for t, v in enumerate(token)]
    own = np.minimum(np.log(p[range(n), token]), 0)
    ours = m.min_k_plus_plus(own.tolist(), np.minimum(mean, 0).tolist(), variance.tolist(), k)
    assert ours == pytest.approx(slow_min_k(z, k), rel=1e-9, abs=1e-9)


@given(st.floats(0, 1), st.floats(0.01, 1))
def test_privleak(area, reference):
    """MUSE's form, and open-unlearning's, which turns both areas and then turns them back."""
    value = m.privleak(area, reference).value
    assert value == pytest.approx(100 * (area - reference) / reference, **CLOSE)
    turned, turned_reference = 1 - area, 1 - reference
    assert value == pytest.approx(100 * ((1 - turned) - (1 - turned_reference)) / (1 - turned_reference), rel=1e-6)
