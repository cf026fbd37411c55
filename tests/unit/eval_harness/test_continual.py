"""Continual metrics on one matrix, worked by hand.

            task 1  task 2  task 3
    base      .1      .2      .3
    stage 1   .9      .3      .1
    stage 2   .6      .8      .5
    stage 3   .4      .7      .9

AP        (.4 + .7 + .9) / 3                       = 2/3
BWT_GEM   ((.4 - .9) + (.7 - .8)) / 2              = -.3
BWT_T     ((.4 - .9) + (.7 - .8)) / 3              = -.2
FWT_GEM   ((.3 - .2) + (.5 - .3)) / 2              = .15
F_max     ((max(.9, .6) - .4) + (.8 - .7)) / 2     = .3
F_learned ((.9 - .4) + (.8 - .7)) / 2              = .3
"""

from __future__ import annotations

import copy

import pytest

from eval_harness.metrics import continual as c

R = [[0.1, 0.2, 0.3], [0.9, 0.3, 0.1], [0.6, 0.8, 0.5], [0.4, 0.7, 0.9]]
DIRECTED = (c.bwt_gem, c.bwt_t, c.fwt_gem, c.forgetting_max, c.forgetting_just_learned)
EVERY = (c.average_performance, *DIRECTED)


@pytest.mark.parametrize(
    ("metric", "value", "n"),
    [
        (c.average_performance, 2 / 3, 3),
        (c.bwt_gem, -0.3, 2),
        (c.bwt_t, -0.2, 2),
        (c.fwt_gem, 0.15, 2),
        (c.forgetting_max, 0.3, 2),
        (c.forgetting_just_learned, 0.3, 2),
    ],
)
def test_by_hand(metric, value, n):
    summary = metric(R)
    assert summary.value == pytest.approx(value, abs=1e-15)
    assert (summary.n, summary.reason) == (n, None)
    assert "R[T][j]" in summary.formula or "R[j-1][j]" in summary.formula


def test_the_two_forgettings_differ_when_a_task_gets_better_later():
    # Task 1 is .9 when learned, .95 after stage 2, .4 at the end: max-based ((.95 - .4) + .1) / 2.
    better = [R[0], R[1], [0.95, 0.8, 0.5], R[3]]
    assert c.forgetting_max(better).value == pytest.approx(0.325)
    assert c.forgetting_just_learned(better).value == pytest.approx(0.3)


def test_the_last_stage_is_no_candidate_for_the_maximum():
    risen = [[0.0, 0.0], [0.5, 0.1], [0.8, 0.9]]
    assert c.forgetting_max(risen).value == pytest.approx(-0.3)  # it got better: negative, not 0


@pytest.mark.parametrize("metric", DIRECTED)
def test_lower_is_better_is_the_formula_on_minus_R(metric):
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
        (c.bwt_gem, (1, 0), "R[1][1]"),
        (c.bwt_t, (3, 0), "R[3][1]"),
        (c.fwt_gem, (0, 1), "R[0][2]"),
        (c.forgetting_max, (2, 0), "R[2][1]"),
        (c.forgetting_just_learned, (2, 1), "R[2][2]"),
    ],
)
def test_a_missing_entry_is_named(metric, hole, name):
    holed = copy.deepcopy(R)
    holed[hole[0]][hole[1]] = None
    summary = metric(holed)
    assert summary.value is None
    assert name in summary.reason


def test_entries_that_are_not_needed_may_be_missing():
    holed = [[None, None, None], [0.9, None, None], [0.6, 0.8, None], [0.4, 0.7, 0.9]]
    assert c.bwt_gem(holed).value == pytest.approx(-0.3)
    assert c.forgetting_max(holed).value == pytest.approx(0.3)
    assert c.fwt_gem(holed).value is None


@pytest.mark.parametrize("metric", EVERY)
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
    assert c.general_delta([{"a": 1, "b": 2}, {"a": 1}]).reason == "not measured at both stages: b"
    assert c.general_delta([{"a": None}, {"a": 1}]).value is None
    assert c.general_delta([{}, {}]).value is None
    with pytest.raises(ValueError, match="stage 0"):
        c.general_delta([])
