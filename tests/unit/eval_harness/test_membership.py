"""Membership scores on a text of three tokens and one of two, worked by hand, and the edge cases.

    text 1   log p       -1    -4    -3        text 2   log p       -2    -1
             mean        -2    -2    -1                 mean        -1    -1
             variance     1     4     0                 variance     1     1
             z            1    -1    -2/1e-3            z           -1     0

loss             (1 + 4 + 3) / 3 = 8/3                  3/2
Min-K, k = .4    int(1.2) = 1 token:  4                 int(.8) = 0, so 1 token:  2
Min-K, k = .7    int(2.1) = 2 tokens: 3.5               int(1.4) = 1 token:       2
Min-K++, k = .4  variance 0 counts as 1e-6: 2000        1
Min-K++, k = .7  (2000 + 1) / 2 = 1000.5                1
reference        text 1 against log p = -1 -1 -1:       8/3 - 1 = 5/3

AUC of members 1, 2, 2 against non-members 2, 3: of 6 pairs 4 are below and 2 are ties: (4 + 2/2) / 6 = 5/6.

PrivLeak, areas in MUSE's direction:  .25 against .5: 100 (.25 - .5) / .5 = -50.
"""

from __future__ import annotations

import math
import zlib
from functools import partial

import pytest

from eval_harness.metrics import membership as m

ONE, TWO = [-1.0, -4.0, -3.0], [-2.0, -1.0]
MEANS = {1: [-2.0, -2.0, -1.0], 2: [-1.0, -1.0]}
VARIANCES = {1: [1.0, 4.0, 0.0], 2: [1.0, 1.0]}
NAN, INF = math.nan, math.inf


# ---- worked by hand ----------------------------------------------------------------------------------


def test_loss_by_hand():
    assert [m.loss(ONE), m.loss(TWO)] == [8 / 3, 1.5]
    assert m.reference_ratio(ONE, [-1.0] * 3) == pytest.approx(5 / 3)
    assert m.reference_ratio(ONE, ONE) == 0


@pytest.mark.parametrize(("k", "values"), [(0.4, [4, 2]), (0.7, [3.5, 2]), (1, [8 / 3, 1.5]), (0.01, [4, 2])])
def test_min_k_by_hand(k, values):
    assert [m.min_k(ONE, k), m.min_k(TWO, k)] == values


@pytest.mark.parametrize(("k", "values"), [(0.4, [2000, 1]), (0.7, [1000.5, 1]), (1, [2000 / 3, 0.5])])
def test_min_k_plus_plus_by_hand(k, values):
    found = [m.min_k_plus_plus(text, MEANS[i], VARIANCES[i], k) for i, text in ((1, ONE), (2, TWO))]
    assert found == pytest.approx(values, rel=1e-12)


def test_the_default_share_is_muses():
    assert m.min_k([-9.0, -8.0, -1.0, -1.0, -1.0]) == 8.5  # int(.4 * 5) = 2
    assert m.min_k_plus_plus([-9.0, -8.0, -1.0, -1.0, -1.0], [0.0] * 5, [1.0] * 5) == 8.5


def test_zlib_by_hand():
    text = "ab" * 500
    size = len(zlib.compress(text.encode()))
    assert size < 30
    assert m.zlib(ONE, text) == pytest.approx(8 / 3 / size)
    assert m.zlib(ONE, "") == pytest.approx(8 / 3 / 8)  # nothing compresses to 8 bytes
    assert m.zlib(ONE, "é") == m.loss(ONE) / len(zlib.compress(b"\xc3\xa9"))  # bytes, not characters
    assert m.zlib(ONE, "\ud800") > 0  # half a surrogate pair, which strict UTF-8 has no bytes for


def test_auc_by_hand():
    area = m.auc([1.0, 2.0, 2.0], [2.0, 3.0])
    assert (area.value, area.members, area.nonmembers) == (5 / 6, 3, 2)
    assert area.muse == pytest.approx(1 / 6)
    # Newcombe's variance: star = 5/2 - 1 = 3/2, area (1 - area) = 5/36,
    # 1 + 1.5 (1/6)/(7/6) + 1.5 (5/6)/(11/6) = 1 + 3/14 + 15/22 = 1.896104, over 3 * 2.
    assert area.stderr == pytest.approx(math.sqrt(5 / 36 * 1.896104 / 6), rel=1e-6)


def test_privleak_by_hand():
    leak = m.privleak(0.25, 0.5)
    assert (leak.value, leak.auc, leak.auc_reference, leak.reason) == (-50, 0.25, 0.5, None)


# ---- directions --------------------------------------------------------------------------------------


def test_a_memorised_text_scores_low_on_every_score():
    seen, unseen = [-0.1, -0.2, -0.1], [-3.0, -2.0, -5.0]
    means, variances = [-1.0] * 3, [0.5] * 3
    scores = [
        m.loss,
        m.min_k,
        partial(m.zlib, text="three tokens"),
        partial(m.min_k_plus_plus, means=means, variances=variances),
        partial(m.reference_ratio, reference_log_probs=[-2.0] * 3),
    ]
    for score in scores:
        assert score(seen) < score(unseen)


def test_directions_of_auc_and_privleak():
    forget, holdout = [0.1, 0.2], [1.0, 2.0]  # losses: the forget set is memorised
    memorised, forgotten = m.auc(forget, holdout), m.auc(holdout, forget)
    assert (memorised.value, memorised.muse) == (1, 0)
    assert m.privleak(memorised, 0.5).value == -100  # under-unlearning
    assert m.privleak(forgotten, 0.5).value == 100  # over-unlearning
    reference = m.auc([1.0, 2.0], [1.0, 2.0])
    assert m.privleak(memorised, reference) == m.PrivLeak(-100, 0, 0.5)
    assert m.privleak(reference, reference).value == 0
    # MUSE's published reference areas are in its own direction, and enter as they are.
    assert m.privleak(0.4772, 0.4772).value == 0
    assert m.privleak(m.auc([1.0], [1.0]), 0.4772).value == pytest.approx(4.778, abs=1e-3)


def test_privleak_has_no_upper_bound_and_keeps_its_areas():
    leak = m.privleak(0.9, 0.017)
    assert leak.value > 5000
    assert (leak.auc, leak.auc_reference) == (0.9, 0.017)


def test_privleak_against_an_area_of_0_is_undefined():
    leak = m.privleak(0.5, m.auc([1.0], [2.0]))
    assert (leak.value, leak.auc, leak.auc_reference) == (None, 0.5, 0)
    assert "the reference's area is 0" in leak.reason


# ---- undefined, wrong --------------------------------------------------------------------------------


def test_an_empty_text_has_no_score():
    assert m.loss([]) is None
    assert m.zlib([], "text") is None
    assert m.min_k([]) is None
    assert m.min_k_plus_plus([], [], []) is None
    assert m.reference_ratio([], []) is None


def test_an_impossible_token_is_infinitely_unlikely():
    never = [-1.0, -INF]
    assert m.loss(never) == m.min_k(never) == m.reference_ratio(never, [-1.0, -1.0]) == INF
    assert m.min_k_plus_plus(never, [-1.0, -1.0], [1.0, 1.0]) == INF
    assert m.reference_ratio(never, never) is None  # inf - inf
    assert m.auc([1.0], [INF]).value == 1


def test_a_negative_variance_of_rounding_is_clamped():
    assert m.min_k_plus_plus([-1.0], [-1.0], [-1e-9]) == 0
    assert m.min_k_plus_plus([-1.001], [-1.0], [-1e-9]) == pytest.approx(1)


@pytest.mark.parametrize("bad", [NAN, 0.7])
def test_what_is_no_log_probability_is_named(bad):
    message = r"log_probs\[1\] = .*must be nats, at most 0"
    for score in (m.loss, m.min_k, partial(m.zlib, text="a")):
        with pytest.raises(ValueError, match=message):
            score([-1.0, bad])
    with pytest.raises(ValueError, match=message):
        m.min_k_plus_plus([-1.0, bad], [-1.0] * 2, [1.0] * 2)
    with pytest.raises(ValueError, match=r"means\[0\] = "):
        m.min_k_plus_plus([-1.0], [bad], [1.0])
    with pytest.raises(ValueError, match=r"variances\[0\] is NaN"):
        m.min_k_plus_plus([-1.0], [-1.0], [NAN])


@pytest.mark.parametrize("k", [0, -0.1, 1.01, NAN])
def test_a_share_out_of_range(k):
    with pytest.raises(ValueError, match="must be a share of the tokens"):
        m.min_k(ONE, k)
    with pytest.raises(ValueError, match="must be a share of the tokens"):
        m.min_k([], k)


def test_unlike_lengths():
    with pytest.raises(ValueError, match="3 log-probabilities, 2 means, 3 variances"):
        m.min_k_plus_plus(ONE, MEANS[2], VARIANCES[1])
    with pytest.raises(ValueError, match="3 tokens, 2 under the reference: must be the same tokens"):
        m.reference_ratio(ONE, TWO)


def test_auc_refuses():
    assert m.auc([], [1.0]) is None
    assert m.auc([1.0], []) is None
    with pytest.raises(ValueError, match=r"nonmembers\[1\] is NaN"):
        m.auc([1.0], [1.0, NAN])
    for level in (0, 1, NAN):
        with pytest.raises(ValueError, match="must be between 0 and 1"):
            m.auc([1.0], [2.0], level=level)
    for area, reference, name in ((1.2, 0.5, "area"), (0.5, 47.72, "reference"), (NAN, 0.5, "area")):
        with pytest.raises(ValueError, match=f"{name} = .*must be an area from 0 to 1"):
            m.privleak(area, reference)


# ---- the interval ------------------------------------------------------------------------------------


def test_the_interval_solves_its_equation():
    """At each end the estimate lies z of that end's own standard errors away."""
    area = m.auc([1.0, 2.0, 2.5, 4.0, 0.5], [2.0, 3.0, 5.0, 1.5])
    for end in (area.low, area.high):
        spread = 1 + 3.5 * (1 - end) / (2 - end) + 3.5 * end / (1 + end)
        assert abs(area.value - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) * spread / 20), rel=1e-5)
    assert 0 < area.low < area.value < area.high < 1


def test_an_area_of_1_has_a_lower_end_and_no_standard_error():
    small, large = m.auc([1.0] * 5, [2.0] * 5), m.auc([1.0] * 100, [2.0] * 100)
    assert (small.value, small.stderr, small.high) == (1, None, 1)
    assert 0.5 < small.low < 0.8 < 0.97 < large.low < 1
    none = m.auc([2.0] * 5, [1.0] * 5)
    assert (none.value, none.low) == (0, 0)
    assert none.high == pytest.approx(1 - small.low)


def test_of_one_text_a_side_nothing_follows():
    area = m.auc([1.0], [2.0])
    assert (area.value, area.stderr, area.low, area.high) == (1, None, None, None)


def test_a_higher_level_is_wider():
    wide, narrow = (m.auc([1.0, 3.0, 2.0], [2.5, 4.0, 0.0], level=level) for level in (0.99, 0.9))
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize("true", [0.5, 0.9])
def test_the_interval_covers(true):
    """Normal scores, 40 a side: 200 draws, of which about 190 must cover; fewer than 180 has chance below 1e-4."""
    from random import Random
    from statistics import NormalDist

    draw = Random(0).gauss
    apart = NormalDist().inv_cdf(true) * math.sqrt(2)
    covered = 0
    for _ in range(200):
        area = m.auc([draw(0, 1) for _ in range(40)], [draw(apart, 1) for _ in range(40)])
        covered += area.low <= true <= area.high
    assert 180 <= covered < 200
