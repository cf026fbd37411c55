"""Continual metrics on one matrix, worked by hand.

            task 1  task 2  task 3
    base      .1      .2      .3
    stage 1   .9      .3      .1
    stage 2   .6      .8      .5
    stage 3   .4      .7      .9

AP        (.4 + .7 + .9) / 3                                        = 2/3
MAA       (.9 + (.6 + .8) / 2 + (.4 + .7 + .9) / 3) / 3             = 34/45
P         (.9 + .8 + .9) / 3                                        = 13/15
BWT_GEM   ((.4 - .9) + (.7 - .8)) / 2                               = -.3
BWT_T     ((.4 - .9) + (.7 - .8)) / 3                               = -.2
FWT_GEM   ((.3 - .2) + (.5 - .3)) / 2                               = .15
F_max     ((max(.9, .6) - .4) + (.8 - .7)) / 2                      = .3
F_learned ((.9 - .4) + (.8 - .7)) / 2                               = .3
FWT_SAPT  ((.9 - .8) + (.8 - .9) + (.9 - .6)) / 3                   = .1    single-task models: .8 .9 .6
I_single  ((.8 - .9) + (.9 - .8) + (.6 - .9)) / 3                   = -.1
I_joint   ((.95 - .9) + (.85 - .8) + (.95 - .9)) / 3                = .05   joint training: .95 .85 .95
F1_avg    2 (1/2) (2/3) / (1/2 + 2/3)                               = 4/7   general ability: .5
HARS      2 (.6) (.3) / (.6 + .3)                                   = .4    adaptation .6, retention .3
"""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest

from eval_harness.metrics import continual as c

R = [[0.1, 0.2, 0.3], [0.9, 0.3, 0.1], [0.6, 0.8, 0.5], [0.4, 0.7, 0.9]]
SINGLE, JOINT = [0.8, 0.9, 0.6], [0.95, 0.85, 0.95]
DIRECTED = (c.bwt_gem, c.bwt_t, c.fwt_gem, c.forgetting_max, c.forgetting_just_learned)
LEVELS = (c.average_performance, c.mean_average_performance, c.plasticity)
against_single = partial(c.intransigence, reference=SINGLE, against="single")
against_joint = partial(c.intransigence, reference=JOINT, against="joint")
above_single = partial(c.fwt_sapt, single=SINGLE)
with_general = partial(c.f1_average, general=0.5)


@pytest.mark.parametrize(
    ("metric", "value", "n", "name"),
    [
        (c.average_performance, 2 / 3, 3, "AP"),
        (c.mean_average_performance, 34 / 45, 3, "MAA"),
        (c.plasticity, 13 / 15, 3, "P"),
        (c.bwt_gem, -0.3, 2, "BWT_GEM"),
        (c.bwt_t, -0.2, 2, "BWT_T"),
        (c.fwt_gem, 0.15, 2, "FWT_GEM"),
        (c.forgetting_max, 0.3, 2, "F_max"),
        (c.forgetting_just_learned, 0.3, 2, "F_learned"),
        (above_single, 0.1, 3, "FWT_SAPT"),
        (against_single, -0.1, 3, "I_single"),
        (against_joint, 0.05, 3, "I_joint"),
        (with_general, 4 / 7, 2, "F1_avg"),
    ],
)
def test_by_hand(metric, value, n, name):
    summary = metric(R)
    assert summary.value == pytest.approx(value, abs=1e-15)
    assert (summary.n, summary.reason) == (n, None)
    assert summary.formula.startswith(f"{name} = ")


def test_hars_by_hand():
    assert c.hars(0.6, 0.3) == c.Summary(pytest.approx(0.4), "HARS = 2 A K / (A + K)", 2)


@pytest.mark.parametrize(
    ("mmlu", "ap", "published"), [(60.7155, 74.0817, 66.7359), (66.2539, 64.4417, 65.3352)], ids=["full", "lora"]
)
def test_the_f1_averages_that_gere_published(mmlu, ap, published):
    assert c.f1_average([[0.0], [ap]], mmlu).value == pytest.approx(published, abs=5e-5)


def test_the_order_of_tasks_moves_the_average_over_stages_alone():
    # Nothing is forgotten; task 1 is hard (.2) and task 2 easy (.8): AP .5 either way, MAA (.2 + .5)/2 or (.8 + .5)/2.
    hard_first, easy_first = [[0, 0], [0.2, 0], [0.2, 0.8]], [[0, 0], [0.8, 0], [0.8, 0.2]]
    assert c.average_performance(hard_first).value == c.average_performance(easy_first).value == 0.5
    assert c.mean_average_performance(hard_first).value == pytest.approx(0.35)
    assert c.mean_average_performance(easy_first).value == pytest.approx(0.65)


def test_the_two_forgettings_differ_when_a_task_gets_better_later():
    # Task 1 is .9 when learned, .95 after stage 2, .4 at the end: max-based ((.95 - .4) + .1) / 2.
    better = [R[0], R[1], [0.95, 0.8, 0.5], R[3]]
    assert c.forgetting_max(better).value == pytest.approx(0.325)
    assert c.forgetting_just_learned(better).value == pytest.approx(0.3)


def test_the_last_stage_is_no_candidate_for_the_maximum():
    risen = [[0.0, 0.0], [0.5, 0.1], [0.8, 0.9]]
    assert c.forgetting_max(risen).value == pytest.approx(-0.3)  # it got better: negative, not 0


@pytest.mark.parametrize("metric", DIRECTED)
def test_lower_is_better_is_the_formula_on_minus_r(metric):
    minus = [[-value for value in row] for row in R]
    flipped = metric(R, higher_is_better=False)
    assert flipped.value == pytest.approx(metric(minus).value)
    assert "-R (lower is better)" in flipped.formula
    assert "-R" not in metric(R).formula


def test_a_loss_that_rises_is_forgetting():
    losses = [[5.0, 5.0], [1.0, 4.0], [3.0, 1.0]]
    assert c.bwt_gem(losses, higher_is_better=False).value == pytest.approx(-2.0)
    assert c.forgetting_max(losses, higher_is_better=False).value == pytest.approx(2.0)
    assert c.fwt_gem(losses, higher_is_better=False).value == pytest.approx(1.0)
    assert c.average_performance(losses).value == pytest.approx(2.0)


def test_a_loss_above_the_reference_is_intransigence_and_negative_transfer():
    losses = [[5.0, 5.0], [1.0, 4.0], [3.0, 2.0]]  # .5 and 1 above the single-task models right after learning
    single = [0.5, 1.0]
    assert c.intransigence(losses, single, against="single", higher_is_better=False).value == pytest.approx(0.75)
    assert c.fwt_sapt(losses, single, higher_is_better=False).value == pytest.approx(-0.75)
    assert "-R (lower is better)" in c.fwt_sapt(losses, single, higher_is_better=False).formula
    assert c.plasticity(losses).value == 1.5  # a level keeps its unit


def test_what_a_reference_is_of_must_be_said():
    with pytest.raises(TypeError, match="against"):
        c.intransigence(R, JOINT)
    with pytest.raises(ValueError, match="'best': must be 'joint' or 'single'"):
        c.intransigence(R, JOINT, against="best")


@pytest.mark.parametrize("metric", [c.fwt_sapt, partial(c.intransigence, against="joint")])
def test_a_reference_has_one_score_per_task(metric):
    with pytest.raises(ValueError, match="has 2 scores for 3 tasks"):
        metric(R, [0.8, 0.9])
    assert "[2]" in metric(R, [0.8, None, 0.6]).reason
    assert metric(R, [0.8, None, 0.6]).value is None
    assert "[3] = nan" in metric(R, [0.8, 0.9, math.nan]).reason


@pytest.mark.parametrize(("a", "b"), [(0.0, 0.7), (0.7, 0.0), (0.0, 0.0)])
def test_a_harmonic_mean_with_a_zero_is_zero_by_rule(a, b):
    summary = c.hars(a, b)
    assert (summary.value, summary.n) == (0.0, 2)
    assert summary.reason.startswith("0 by rule")
    assert c.hars(max(a, 1e-9), max(b, 1e-9)).value < 1e-8  # and the limit


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        (-0.1, 0.7, "undefined below 0: A = -0.1"),
        (0.7, -0.7, "undefined below 0: K = -0.7"),  # the pole
        (-0.1, 0.0, "undefined below 0: A"),
        (None, 0.7, "not measured: A"),
        (0.7, math.nan, "not finite: K = nan"),
    ],
)
def test_a_harmonic_mean_that_is_none(a, b, reason):
    summary = c.hars(a, b)
    assert summary.value is None
    assert reason in summary.reason


def test_a_harmonic_mean_of_losses_is_undefined():
    assert "lower is better" in c.hars(0.5, 0.5, higher_is_better=False).reason
    assert "lower is better" in c.f1_average(R, 0.5, higher_is_better=False).reason
    assert c.f1_average(R, 0.5, higher_is_better=False).value is None


def test_the_f1_average_says_which_part_it_lacks():
    assert c.f1_average(R, None).reason == "not measured: G"
    assert c.f1_average([*R[:3], [0.4, None, 0.9]], 0.5).reason == "not measured: R[3][2]"
    assert "AP = -1" in c.f1_average([[0.0], [-1.0]], 0.5).reason


@pytest.mark.parametrize("metric", DIRECTED)
def test_one_task_is_undefined_and_never_zero(metric):
    summary = metric([[0.1], [0.9]])
    assert summary.value is None
    assert summary.n == 0
    assert "one task" in summary.reason


@pytest.mark.parametrize(
    ("metric", "hole", "name"),
    [
        (c.average_performance, (3, 1), "R[3][2]"),
        (c.mean_average_performance, (2, 0), "R[2][1]"),
        (c.plasticity, (2, 1), "R[2][2]"),
        (above_single, (1, 0), "R[1][1]"),
        (against_joint, (3, 2), "R[3][3]"),
        (with_general, (3, 0), "R[3][1]"),
        (c.bwt_gem, (1, 0), "R[1][1]"),
        (c.bwt_t, (3, 0), "R[3][1]"),
        (c.fwt_gem, (0, 1), "R[0][2]"),
        (c.forgetting_max, (2, 0), "R[2][1]"),
        (c.forgetting_just_learned, (2, 1), "R[2][2]"),
    ],
)
@pytest.mark.parametrize(
    ("value", "said"), [(None, "not measured: {}"), (math.nan, "not finite: {} = nan"), (-math.inf, "{} = -inf")]
)
def test_an_entry_that_is_no_number_is_named(metric, hole, name, value, said):
    holed = copy.deepcopy(R)
    holed[hole[0]][hole[1]] = value
    summary = metric(holed)
    assert (summary.value, summary.n) == (None, 0)
    assert said.format(name) in summary.reason


def test_entries_that_are_not_needed_may_be_missing():
    holed = [[None, None, None], [0.9, None, None], [0.6, 0.8, None], [0.4, 0.7, 0.9]]
    assert c.bwt_gem(holed).value == pytest.approx(-0.3)
    assert c.forgetting_max(holed).value == pytest.approx(0.3)
    assert c.mean_average_performance(holed).value == pytest.approx(34 / 45)
    assert c.plasticity(holed).value == pytest.approx(13 / 15)
    assert against_joint(holed).value == pytest.approx(0.05)
    assert c.fwt_gem(holed).value is None


def test_one_task_has_levels():
    for metric in LEVELS:
        assert metric([[0.1], [0.9]]).value == 0.9


@pytest.mark.parametrize("metric", [*LEVELS, *DIRECTED, above_single, against_joint, with_general])
def test_the_matrix_is_left_as_it_was(metric):
    before = copy.deepcopy(R)
    metric(R)
    assert before == R


@pytest.mark.parametrize("wrong", [[], [[0.1]], [[0.1, 0.2], [0.3, 0.4]], [[0.1], [0.2, 0.3]]])
def test_wrong_shapes_are_refused(wrong):
    with pytest.raises(ValueError, match="must have a row for the base"):
        c.average_performance(wrong)


def test_general_delta_by_hand():
    # ((40 - 46) + (4 - 26) + (71 - 70)) / 3 = -9
    stages = [
        {"mmlu": 46, "gsm": 26, "boolq": 70},
        {"mmlu": 45, "gsm": 20, "boolq": 70},
        {"mmlu": 40, "gsm": 4, "boolq": 71},
    ]
    assert c.general_delta(stages).value == pytest.approx(-9)
    assert c.general_delta(stages, stage=1).value == pytest.approx(-7 / 3)
    assert c.general_delta(stages, stage=0).value == 0
    assert c.general_delta(stages, higher_is_better=False).value == pytest.approx(9)


def test_general_delta_with_gaps_is_undefined():
    assert c.general_delta([{"a": 1, "b": 2}, {"a": 1}]).reason == "not measured: G[1][b]"
    assert c.general_delta([{"a": None}, {"a": 1}]).value is None
    assert c.general_delta([{}, {}]).value is None
    assert c.general_delta([{"a": 1}, {"a": math.nan}, {"a": 2}], stage=1).reason == "not finite: G[1][a] = nan"
    with pytest.raises(ValueError, match="stage 0"):
        c.general_delta([])
    with pytest.raises(ValueError, match="stage = 2: must be one of the 2 stages given, 0 to 1"):
        c.general_delta([{"a": 1}, {"a": 2}], stage=2)
