"""Intervals and paired differences: by hand where a hand reaches, by their limits and refusals elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eval_harness.metrics import statistics as s


def test_a_mean_with_its_interval():
    values = {"a": 1.0, "b": 0.0, "c": 1.0, "d": 1.0}
    found = s.bootstrap(values)
    # mean 3/4; sample variance 1/4; stderr sqrt(1/4 / 4).
    assert (found.value, found.n, found.stderr, found.level) == (0.75, 4, 0.25, 0.95)
    assert found.low is not None
    assert found.high is not None
    assert 0 <= found.low < 0.75 < found.high <= 1
    assert found == s.bootstrap(dict(reversed(values.items())))  # a file's order of items changes nothing
    assert found != s.bootstrap(values, level=0.5)
    many = {str(i): float(i % 10) for i in range(200)}
    assert s.bootstrap(many, seed=1) == s.bootstrap(many, seed=1) != s.bootstrap(many, seed=2)


def test_two_resampled_items_are_expanded_to_all_that_resampling_shows():
    # Means of two draws of {0, 4}: 0, 2, 4 with 1/4, 1/2, 1/4. The tail, Phi(-sqrt(2) 12.706), is beyond them all.
    found = s.bootstrap([0.0, 4.0])
    assert (found.value, found.low, found.high) == (2.0, 0.0, 4.0)
    # Without expansion the 50 % interval of 2,000 draws would be the same; with n = 2 at 0.1 the tail is
    # Phi(-sqrt(2) t(.55; 1)) = Phi(-sqrt(2) tan(.05 pi)) = Phi(-.2240) = .41: inside the half that is 2.
    narrow = s.bootstrap([0.0, 4.0], level=0.1)
    assert (narrow.low, narrow.high) == (2.0, 2.0)


def test_another_statistic_and_its_draws_in_blocks(monkeypatch):
    values = list(np.random.default_rng(0).normal(size=40))
    whole = s.bootstrap(values, lambda drawn: np.median(drawn, axis=-1))
    assert whole.value == pytest.approx(np.median(values))
    monkeypatch.setattr(s, "BLOCK", 100)  # two resamples at once instead of all
    assert s.bootstrap(values, lambda drawn: np.median(drawn, axis=-1)) == whole


@pytest.mark.parametrize(("value", "low", "high"), [(0.0, 0.0, 1 - 0.025 ** (1 / 8)), (1.0, 0.025 ** (1 / 8), 1.0)])
def test_a_share_at_its_end_gets_the_binomial_interval(value, low, high):
    """Of 8 items all alike every resample is the same: its width would be 0, and 8 of 8 do not prove 100 %."""
    found = s.bootstrap([value] * 8)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.method == s.AT_ITS_END


def test_what_has_no_interval_says_why():
    assert s.bootstrap({}) == s.Estimate(None, None, None, None, 0.95, 0, s.PERCENTILE, "no item")
    one = s.bootstrap([3.0])
    assert (one.value, one.stderr, one.low, one.reason) == (3.0, None, None, "one item: nothing is known of others")
    equal = s.bootstrap([0.3] * 5)
    assert (equal.low, equal.high, equal.width) == (None, None, None)
    assert equal.reason == "all resamples of the 5 items are equal"
    assert not equal.excludes_zero


def test_items_that_are_no_numbers_are_left_out_by_name():
    found = s.bootstrap({"a": 1.0, "b": math.nan, "c": 2.0, "d": math.inf})
    assert (found.value, found.n, found.left_out) == (1.5, 2, ("b", "d"))
    assert s.bootstrap([1.0, math.nan, 2.0]).left_out == ("1",)
    pair = s.paired_difference({"a": 1.0, "b": math.nan, "c": 0.0}, {"a": 0.0, "b": 1.0, "c": math.nan})
    assert (pair.value, pair.n, pair.left_out) == (-1.0, 1, ("b", "c"))


def test_ratio_of_sums_by_hand():
    # (1 + 5) / (1 + 2) = 2, the mean of 1 and 2.5 is 1.75. Residuals 1 - 2 = -1 and 5 - 4 = 1:
    # stderr sqrt(2 / 1 * 2) / 3 = 2/3.
    found = s.ratio_of_sums({"a": 1.0, "b": 5.0}, {"a": 1.0, "b": 2.0})
    assert found.value == 2.0
    assert found.stderr == pytest.approx(2 / 3)
    assert (found.low, found.high) == (1.0, 2.5)  # draws: a a, a b, b b
    with pytest.raises(ValueError, match=r"denominator of item b = 0.0: must be greater than 0"):
        s.ratio_of_sums({"a": 1.0, "b": 5.0}, {"a": 1.0, "b": 0.0})
    with pytest.raises(ValueError, match="only a numerator or only a denominator: b"):
        s.ratio_of_sums({"a": 1.0, "b": 5.0}, {"a": 1.0})


def test_a_paired_difference_by_hand():
    a = {"x": 1.0, "y": 0.0, "z": 1.0, "w": 0.0, "mine": 1.0}
    b = {"w": 1.0, "z": 1.0, "y": 1.0, "x": 1.0, "theirs": 0.0, "too": 0.0}
    found = s.paired_difference(a, b)
    # Differences x 0, y 1, z 0, w 1: mean 1/2, sample variance 1/3, stderr sqrt(1/12).
    assert (found.value, found.n, found.only_a, found.only_b) == (0.5, 4, 1, 2)
    assert found.stderr == pytest.approx(math.sqrt(1 / 12))
    assert found.p_value == 0.5  # two changes, both up: 2 * (1/2)^2
    assert s.paired_difference(b, a).value == -0.5
    graded = s.paired_difference({"x": 0.2, "y": 0.5}, {"x": 0.4, "y": 0.5})
    assert graded.p_value is None


def test_pairing_removes_what_the_items_share():
    """Items of very unlike difficulty, one of them 0.1 better on each: unpaired noise hides it, paired not."""
    rng = np.random.default_rng(0)
    hard = rng.normal(scale=5, size=60)
    a = {str(i): value for i, value in enumerate(hard)}
    b = {str(i): value + 0.1 + 0.05 * rng.normal() for i, value in enumerate(hard)}
    paired = s.paired_difference(a, b)
    alone = s.bootstrap(a)
    assert paired.excludes_zero
    assert paired.width is not None
    assert alone.width is not None
    assert alone.width > 50 * paired.width


def test_differences_of_ratios_and_of_transforms():
    a, b = {"x": 1.0, "y": 2.5}, {"x": 2.0, "y": 3.0}
    weights = {"x": 1.0, "y": 2.0}
    found = s.paired_difference(a, b, weights_a=weights, weights_b={"x": 1.0, "y": 1.0})
    assert found.value == pytest.approx(5 / 2 - 6 / 3)
    with pytest.raises(ValueError, match="item y: has no weight greater than 0"):
        s.paired_difference(a, b, weights_a={"x": 1.0})
    losses = {"x": 0.0, "y": 2.0, "z": 1.0}, {"x": 1.0, "y": 2.0, "z": 3.0}
    perplexity = s.paired_difference(*losses, transform=np.exp)
    assert perplexity.value == pytest.approx(math.exp(2) - math.exp(1))
    # Delta method by hand: e^2 (x - 2) - e (x - 1) per item, over x, y, z.
    slopes = [math.e**2 * (q - 2) - math.e * (p - 1) for p, q in zip(*(side.values() for side in losses), strict=True)]
    assert perplexity.stderr == pytest.approx(np.std(slopes, ddof=1) / math.sqrt(3), rel=1e-5)


def test_nothing_to_pair_and_nothing_different():
    none = s.paired_difference({"a": 1.0}, {"b": 1.0})
    assert (none.value, none.reason, none.only_a, none.only_b) == (None, "no item in common", 1, 1)
    lost = s.paired_difference({"a": math.nan}, {"a": 1.0})
    assert (lost.value, lost.reason) == (None, "no item is a number on both sides")
    same = s.paired_difference({"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 0.0})
    assert (same.value, same.low, same.p_value) == (0.0, None, 1.0)
    assert same.reason == "all resamples of the 2 items are equal"


def test_sign_test_by_hand():
    # 5 up, 1 down of 6: 2 (C(6,0) + C(6,1)) / 64 = 14 / 64; zeros count nothing.
    assert s.sign_test([1, 1, 0, 1, 1, -1, 1, 0]) == 14 / 64
    assert s.sign_test([]) == s.sign_test([0.0]) == s.sign_test([1, -1]) == 1.0
    assert s.sign_test([1.0] * 1001) == 2.0**-1000  # exact: floats would have lost it long before
    assert s.sign_test([0.2] * 10) == 2 / 1024


def test_t_over_three_runs_by_hand():
    # 1, 2, 3: mean 2, stderr 1 / sqrt(3), t(.975; 2) = 4.302653: 2 -+ 2.484138.
    found = s.t_interval([1.0, 2.0, 3.0])
    assert (found.low, found.high) == (pytest.approx(-0.484138, abs=1e-6), pytest.approx(4.484138, abs=1e-6))
    assert s.t_interval([1.0]).reason == "one run: nothing is known of others"
    assert s.t_interval([2.0, 2.0]).reason == "all 2 runs are equal"
    assert s.t_interval([]).value is None


def test_pooled_shows_the_wider_interval():
    rng = np.random.default_rng(0)
    items = rng.normal(size=50)
    unlike_items = np.stack([items, items + 0.001, items - 0.001])  # runs agree, items do not
    drawn = s.resampled(unlike_items)
    over_items = s.pooled(list(unlike_items.mean(1)), drawn, 50)
    assert over_items.shown is over_items.hierarchical
    assert over_items.over_runs.width is not None
    assert over_items.over_runs.width < 0.01
    unlike_runs = np.stack([items * 0 + i for i in (1, 2, 3)])  # items agree, runs do not
    over_runs = s.pooled([1, 2, 3], s.resampled(unlike_runs), 50)
    assert over_runs.shown is over_runs.over_runs
    assert (over_runs.hierarchical.low, over_runs.hierarchical.high) == (1.0, 3.0)  # no resample sees more
    alone = s.pooled([items.mean()], s.resampled(items[None]), 50)
    assert alone.shown == s.percentile(alone.value, s.resampled(items[None])[:, 0], 50)


def test_groups_are_paired_or_welch():
    rng = np.random.default_rng(0)
    level = np.array([0.0, 10.0, 20.0])  # seeds differ much, the second group is 1 better on each
    noise = rng.normal(scale=0.1, size=(2, 3, 30))
    a, b = level[:, None] + noise[0], level[:, None] + 1 + noise[1]
    args = list(a.mean(1)), list(b.mean(1)), s.resampled(a), s.resampled(b), 30
    paired, alone = s.pooled_difference(*args, paired=True), s.pooled_difference(*args, paired=False)
    assert paired.value == pytest.approx(alone.value)
    assert paired.value == pytest.approx(1, abs=0.1)
    assert paired.shown.excludes_zero
    assert not alone.shown.excludes_zero
    # Welch by hand: both variances 100 (nearly), stderr sqrt(200 / 3), 4 degrees of freedom cut to 3 or 4.
    assert alone.over_runs.stderr == pytest.approx(math.sqrt(200 / 3), rel=0.01)
    assert alone.over_runs.method == s.WELCH
    one = s.pooled_difference(args[0][:1], args[1], args[2][:, :1], args[3], 30, paired=False)
    assert one.over_runs.reason == "a side of one run: nothing is known of others"
    assert one.shown is one.hierarchical
    with pytest.raises(ValueError, match="paired groups of 1 and 3 runs"):
        s.pooled_difference(args[0][:1], args[1], args[2][:, :1], args[3], 30, paired=True)


@pytest.mark.parametrize("bad", [{"level": 0.0}, {"level": 1.0}, {"level": 95}, {"resamples": 0}])
def test_settings_out_of_range(bad):
    with pytest.raises(ValueError, match=rf"{next(iter(bad))} = .*must"):
        s.bootstrap([1.0, 2.0], **bad)
    with pytest.raises(ValueError, match="must"):
        s.paired_difference({"a": 1.0}, {"a": 1.0}, **bad)
