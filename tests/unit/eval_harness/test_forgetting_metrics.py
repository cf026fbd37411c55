"""Memorisation and forgetting on two items worked by hand, and the edge cases.

                       token probabilities          mean log p = log of     p = exp(mean log p)
    item 1  right      1/2  1/4  1/8                (1/64)^(1/3)            1/4
            wrong 1    1/2  1/2                     (1/4)^(1/2)             1/2
            wrong 2    1/32                                                 1/32
    item 2  right      1  1/2  1/2                  (1/4)^(1/3)             .629961
            wrong 1    1/16                                                 1/16
            wrong 2    1/16                                                 1/16

probability        item 1: 1/4; item 2: .629961
choice probability item 1: (1/4) / (1/4 + 1/2 + 1/32) = .25 / .78125      = .32
geometric R        item 1: sqrt(1/2 * 1/32) / (1/4) = (1/8) / (1/4)       = 1/2
                   item 2: (1/16) / .629961                               = .0992126
arithmetic R       item 1: (1/2 + 1/32) / 2 / (1/4) = .265625 / .25       = 1.0625
                   item 2: (1/16) / .629961                               = .0992126
closeness          geometric:  (1/2 + .0992126) / 2                       = .2996063
                   arithmetic: (1/1.0625 + .0992126) / 2                  = .5201945
true_better        geometric:  (1/2 + .9007874) / 2                       = .7003937
                   arithmetic: (0 + .9007874) / 2                         = .4503937
prob_mean          geometric:  (1/1.5 + 1/1.0992126) / 2                  = .7882044
                   arithmetic: (1/2.0625 + 1/1.0992126) / 2               = .6972953

                            hits          EM     ES
    item 1                  1 0 1         2/3    1/3  (the last token only)
    item 2                  0 1 1         2/3    2/3
    item 2, 1 end token     0 1           1/2    1/2
"""

from __future__ import annotations

import math

import pytest

from eval_harness.metrics import forgetting as f

NAN, INF = math.nan, math.inf


def logs(*probabilities: float) -> list[float]:
    return [math.log(p) if p else -INF for p in probabilities]


RIGHT = [logs(1 / 2, 1 / 4, 1 / 8), logs(1, 1 / 2, 1 / 2)]
WRONG = [[logs(1 / 2, 1 / 2), logs(1 / 32)], [logs(1 / 16), logs(1 / 16)]]


# ---- worked by hand ----------------------------------------------------------------------------------


def test_probabilities_by_hand():
    assert [f.probability(one) for one in RIGHT] == pytest.approx([0.25, 0.25 ** (1 / 3)], rel=1e-15)
    assert f.choice_probability(RIGHT[0], WRONG[0]) == pytest.approx(0.32, rel=1e-15)


@pytest.mark.parametrize(
    ("ratio", "values", "aggregates"),
    [
        (f.truth_ratio_geometric, [0.5, 0.0992126], [0.2996063, 0.7003937, 0.7882044]),
        (f.truth_ratio_arithmetic, [1.0625, 0.0992126], [0.5201945, 0.4503937, 0.6972953]),
    ],
)
def test_truth_ratios_by_hand(ratio, values, aggregates):
    found = [ratio(right, wrong) for right, wrong in zip(RIGHT, WRONG, strict=True)]
    assert found == pytest.approx(values, abs=5e-8)
    summaries = [f.aggregate(found, by) for by in ("closeness", "true_better", "prob_mean")]
    assert [one.value for one in summaries] == pytest.approx(aggregates, abs=5e-8)
    assert {(one.n, one.left_out, one.reason) for one in summaries} == {(2, 0, None)}
    assert len({one.formula for one in summaries}) == 3


@pytest.mark.parametrize(
    ("hits", "end_tokens", "exact", "strength"),
    [
        ([True, False, True], 0, 2 / 3, 1 / 3),
        ([False, True, True], 0, 2 / 3, 2 / 3),
        ([False, True, True], 1, 1 / 2, 1 / 2),
        # The cases in which published code has 1/n for 0, and loses a real last token.
        ([False] * 4, 0, 0.0, 0.0),
        ([False, False, False, True], 0, 1 / 4, 1 / 4),
        ([True, True, True, False], 0, 3 / 4, 0.0),
        ([True, True, True, False], 1, 1.0, 1.0),
        ([True] * 4, 0, 1.0, 1.0),
        ([True], 0, 1.0, 1.0),
        ([False], 0, 0.0, 0.0),
        ([], 0, None, None),
        ([True, True], 2, None, None),  # nothing but end tokens: an empty answer
    ],
)
def test_memorisation_by_hand(hits, end_tokens, exact, strength):
    assert f.exact_memorisation(hits, end_tokens=end_tokens) == exact
    assert f.extraction_strength(hits, end_tokens=end_tokens) == strength


@pytest.mark.parametrize("metric", [f.exact_memorisation, f.extraction_strength])
@pytest.mark.parametrize("end_tokens", [-1, 3])
def test_end_tokens_out_of_range(metric, end_tokens):
    with pytest.raises(ValueError, match=f"end_tokens = {end_tokens}: must be from 0 to 2"):
        metric([True, True], end_tokens=end_tokens)


# ---- undefined, extreme, wrong -----------------------------------------------------------------------

RIVALLED = (f.choice_probability, f.truth_ratio_geometric, f.truth_ratio_arithmetic)


@pytest.mark.parametrize("metric", RIVALLED)
@pytest.mark.parametrize(("right", "wrong"), [([], [[-1.0]]), ([-1.0], []), ([-1.0], [[-1.0], []])])
def test_without_an_answer_or_a_rival_it_is_undefined(metric, right, wrong):
    assert metric(right, wrong) is None


def test_an_empty_answer_has_no_probability():
    assert f.probability([]) is None


def test_probability_0_is_a_limit_and_0_over_0_is_undefined():
    never, sure = logs(0.5, 0), logs(1.0)
    assert f.probability(never) == 0
    assert [metric(sure, [never, never]) for metric in RIVALLED] == [1, 0, 0]
    assert [metric(never, [sure]) for metric in RIVALLED] == [0, INF, INF]
    assert [metric(never, [never]) for metric in RIVALLED] == [None, None, None]
    # One impossible rival of two: it empties the product, and halves the mean.
    assert f.truth_ratio_geometric(sure, [never, logs(0.5)]) == 0
    assert f.truth_ratio_arithmetic(sure, [never, logs(0.5)]) == pytest.approx(0.25)


def test_answers_too_unlikely_for_a_float_still_compare():
    # exp(-800) is 0 in double precision: both ratios would be 0 / 0.
    right, wrong = [-800.0], [[-801.0], [-801.0]]
    assert f.truth_ratio_geometric(right, wrong) == pytest.approx(math.exp(-1))
    assert f.truth_ratio_arithmetic(right, wrong) == pytest.approx(math.exp(-1))
    assert f.choice_probability(right, wrong) == pytest.approx(1 / (1 + 2 * math.exp(-1)))
    assert f.truth_ratio_geometric([-800.0], [[0.0]]) == INF  # past the largest float, and no error
    assert f.truth_ratio_arithmetic([-800.0], [[0.0]]) == INF


def test_of_equal_rivals_the_two_ratios_are_one_and_geometric_is_never_above():
    right, wrong = [-1.0, -2.0], [[-0.5], [-3.0], [-1.0]]
    assert f.truth_ratio_geometric(right, wrong) < f.truth_ratio_arithmetic(right, wrong)
    same = [[-0.5], [-0.5, -0.5]]
    assert f.truth_ratio_geometric(right, same) == pytest.approx(f.truth_ratio_arithmetic(right, same))


@pytest.mark.parametrize("bad", [NAN, 0.7, INF])
def test_what_is_no_log_probability_is_named(bad):
    message = r"right\[1\] = .*must be a log-probability in nats, at most 0"
    for metric in RIVALLED:
        with pytest.raises(ValueError, match=message):
            metric([-1.0, bad], [[-1.0]])
        with pytest.raises(ValueError, match=r"wrong\[1\]\[0\] = "):
            metric([-1.0], [[-1.0], [bad]])
    with pytest.raises(ValueError, match=r"log_probs\[0\]"):
        f.probability([bad])


def test_rounding_above_0_is_no_error_and_no_probability_above_1():
    assert f.probability([2e-4, 0.0]) == 1


# ---- over a set --------------------------------------------------------------------------------------


def test_aggregates_at_the_ends():
    assert f.aggregate([0.0, INF], "closeness").value == 0
    assert f.aggregate([0.0, INF], "true_better").value == 0.5
    assert f.aggregate([0.0, INF], "prob_mean").value == 0.5
    assert f.aggregate([1.0], "closeness").value == 1
    assert f.aggregate([2.0, 0.5], "closeness").value == 0.5


def test_undefined_items_are_left_out_and_counted():
    summary = f.aggregate([0.5, None, NAN], "closeness")
    assert (summary.value, summary.n, summary.left_out) == (0.5, 1, 2)
    nothing = f.aggregate([None], "closeness")
    assert (nothing.value, nothing.n, nothing.left_out) == (None, 0, 1)
    assert nothing.reason


def test_aggregates_refuse():
    with pytest.raises(ValueError, match="by = 'mean': must be one of closeness, true_better, prob_mean"):
        f.aggregate([1.0], "mean")
    with pytest.raises(ValueError, match=r"ratios\[1\] = -0.5: a truth ratio is at least 0"):
        f.aggregate([1.0, -0.5], "closeness")


# ---- forget quality ----------------------------------------------------------------------------------


def test_forget_quality_by_hand():
    # 3 against 3, disjoint: D = 1. Of the C(6, 3) = 20 orders 2 are that far apart: p = .1.
    apart = f.forget_quality([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    assert (apart.statistic, apart.n, apart.n_ref, apart.method) == (1, 3, 3, "exact")
    assert apart.p == pytest.approx(0.1)
    # 2 against 2, the model's inside the reference's: D = 1/2, and all C(4, 2) = 6 orders are at least that far.
    within = f.forget_quality([2.0, 3.0], [1.0, 4.0])
    assert (within.statistic, within.p) == (0.5, pytest.approx(1.0))


def test_the_same_ratios_cannot_be_told_apart():
    same = f.forget_quality({"a": 0.5, "b": INF}, {"b": INF, "a": 0.5})
    assert (same.statistic, same.p) == (0, 1)


def test_forget_quality_without_a_reference_is_undefined():
    alone = f.forget_quality([0.5, 0.6], None)
    assert (alone.p, alone.statistic, alone.n, alone.n_ref) == (None, None, 2, 0)
    assert "no reference" in alone.reason
    for ratios, reference, who in ([[None], [1.0], "the model"], [[1.0], [NAN], "the reference"]):
        empty = f.forget_quality(ratios, reference)
        assert (empty.p, empty.left_out) == (None, 1)
        assert who in empty.reason


def test_forget_quality_refuses_another_forget_set():
    with pytest.raises(ValueError, match="the reference has 2 truth ratios, the model 3"):
        f.forget_quality([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="the reference has other items, 2 in all, among them a, c"):
        f.forget_quality({"a": 1.0, "b": 2.0}, {"c": 1.0, "b": 2.0})
    with pytest.raises(ValueError, match=r"reference\[0\] = -1.0"):
        f.forget_quality([1.0], [-1.0])


def test_p_values_compare_at_equal_n_only():
    near, far = f.forget_quality([2.0, 3.0], [1.0, 4.0]), f.forget_quality([1.0, 2.0], [3.0, 4.0])
    assert far < near
    assert far <= near
    assert near > far
    assert near >= far
    assert not near < far
    assert near <= near
    assert near >= near
    assert max([far, near]) is near
    larger = f.forget_quality([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    for compare in (near.__lt__, near.__le__, near.__gt__, near.__ge__):
        with pytest.raises(f.IncomparableError, match=r"n = 3/3 and 2/2 ratios do not compare|n = 2/2 and 3/3"):
            compare(larger)
    with pytest.raises(f.IncomparableError):
        sorted([near, larger])
    with pytest.raises(TypeError, match=r"use \.p for a threshold"):
        assert near > 0.05
    # A ratio left out on either side is enough.
    for ratios, reference in ([[2.0, None], [1.0, 4.0]], [[2.0, 3.0], [1.0, None]]):
        fewer = f.forget_quality(ratios, reference)
        assert (fewer.n, fewer.n_ref) in {(1, 2), (2, 1)}
        with pytest.raises(f.IncomparableError):
            assert near > fewer


def test_what_is_undefined_does_not_compare():
    undefined = f.forget_quality([1.0], None)
    with pytest.raises(f.IncomparableError, match="forget quality is undefined: no reference"):
        assert undefined <= undefined


def test_beyond_the_exact_distribution_the_method_says_so():
    many = [float(i) for i in range(f.EXACT_UP_TO + 1)]
    assert f.forget_quality(many, many).method == "asymp"


# ---- model utility -----------------------------------------------------------------------------------


def nine(**changed: float | None) -> dict[str, dict[str, float | None]]:
    scores = {one: dict.fromkeys(f.UTILITY_QUANTITIES, 0.5) for one in f.UTILITY_SETS}
    for name, value in changed.items():
        one, _, what = name.partition("__")
        scores[one][what] = value
    return scores


def test_model_utility_by_hand():
    # Eight times 1/2 and a 1/4: 9 / (8 * 2 + 4) = .45.
    summary = f.model_utility(nine(retain__truth_ratio=0.25), truth_ratio="geometric")
    assert (summary.value, summary.n, summary.reason) == (0.45, 9, None)
    assert summary.formula.startswith("MU_geometric")
    other = f.model_utility(nine(), truth_ratio="arithmetic")
    assert (other.value, other.formula == summary.formula) == (0.5, False)


def test_a_zero_is_zero_by_rule_and_says_so():
    summary = f.model_utility(nine(retain__probability=0.0, world_facts__truth_ratio=0.0), truth_ratio="geometric")
    assert summary.value == 0
    assert "0 by rule" in summary.reason
    assert "retain.probability, world_facts.truth_ratio" in summary.reason


@pytest.mark.parametrize("missing", [None, NAN])
def test_a_missing_number_is_undefined_and_named(missing):
    scores = nine(real_authors__rouge_l_recall=missing, retain__probability=0.0)  # a zero beside it decides nothing
    summary = f.model_utility(scores, truth_ratio="geometric")
    assert (summary.value, summary.n) == (None, 8)
    assert summary.reason == "missing or NaN: real_authors.rouge_l_recall"
    del scores["retain"]
    summary = f.model_utility(scores, truth_ratio="geometric")
    assert (summary.value, summary.n) == (None, 5)
    assert "retain.probability, retain.rouge_l_recall, retain.truth_ratio" in summary.reason


def test_model_utility_refuses():
    with pytest.raises(ValueError, match="truth_ratio = 'mean': must be 'geometric' or 'arithmetic'"):
        f.model_utility(nine(), truth_ratio="mean")
    for value in (98.5, -0.1):
        with pytest.raises(ValueError, match=rf"scores\[retain\]\[probability\] = {value}: must be from 0 to 1"):
            f.model_utility(nine(retain__probability=value), truth_ratio="geometric")
    with pytest.raises(ValueError, match=r"scores\[forget\]: must be one of retain"):
        f.model_utility(nine() | {"forget": {}}, truth_ratio="geometric")
    with pytest.raises(ValueError, match=r"scores\[retain\]\[rouge\]: must be one of probability"):
        f.model_utility(nine(retain__rouge=0.5), truth_ratio="geometric")
