"""The stability gap on one curve, worked by hand. Tasks a and b were finished before the stage that teaches c.

    step    0    10   20   30   40
    a      .9    .3   .5   .7   .8
    b      .6    .4   .2   .5   .5
    c      .1    .5   .6   .9   .8

min-ACC   (min(.3, .5, .7, .8) + min(.4, .2, .5, .5)) / 2      = (.3 + .2) / 2       = .25
WC-ACC    1/3 (.8) + 2/3 (.25) = (.8 + .3 + .2) / 3                                  = 13/30
WF^2      falls to the next evaluation    a .9-.3 = .6   b .6-.4 = .2   c .9-.8 = .1   mean .3
WF^3      falls within three              a .6           b .6-.2 = .4   c .1           mean 11/30
WP^2      rises to the next evaluation    a .7-.5 = .2   b .5-.2 = .3   c .5-.1 = .4   mean .3
WP^5      rises                           a .8-.3 = .5   b .3           c .9-.1 = .8   mean 8/15
"""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_harness.metrics import stability as s

STEPS = (0, 10, 20, 30, 40)
A, B, C = (0.9, 0.3, 0.5, 0.7, 0.8), (0.6, 0.4, 0.2, 0.5, 0.5), (0.1, 0.5, 0.6, 0.9, 0.8)
CURVE = [(step, {"a": a, "b": b, "c": c}) for step, a, b, c in zip(STEPS, A, B, C, strict=True)]
NEGATED = [(step, {task: -score for task, score in by.items()}) for step, by in CURVE]


def only(task, scores):
    return [(10 * n, {task: score}) for n, score in enumerate(scores)]


def with_score(step, task, value):
    return [(at, by | {task: value} if at == step else by) for at, by in CURVE]


def test_min_acc_by_hand():
    found = s.min_acc(CURVE, ["a", "b"])
    assert found.value == pytest.approx(0.25, abs=1e-15)
    assert (found.n, found.reason) == (2, None)
    assert found.formula == "min-ACC = 1/(k-1) sum_{i<k} min_{n > end of i} A_i[n]"


def test_wc_acc_by_hand():
    found = s.wc_acc(CURVE, ["a", "b"], "c")
    assert found.value == pytest.approx(13 / 30, abs=1e-15)
    assert (found.n, found.reason) == (3, None)


@pytest.mark.parametrize(
    ("metric", "window", "value"),
    [
        (s.windowed_forgetting, 2, 0.3),
        (s.windowed_forgetting, 3, 11 / 30),
        (s.windowed_plasticity, 2, 0.3),
        (s.windowed_plasticity, 5, 8 / 15),
    ],
)
def test_windows_by_hand(metric, window, value):
    found = metric(CURVE, window)
    assert found.value == pytest.approx(value, abs=1e-15)
    assert (found.n, found.reason) == (3, None)
    assert f"^{window} = " in found.formula


def test_a_window_longer_than_the_curve_is_the_curve():
    assert s.windowed_forgetting(CURVE, 100).value == s.windowed_forgetting(CURVE, 5).value


def test_tasks_choose_what_is_averaged():
    assert s.windowed_forgetting(CURVE, 2, tasks=["a", "b"]).value == pytest.approx(0.4)
    assert s.windowed_plasticity(CURVE, 2, tasks=["c"]).value == pytest.approx(0.4)


def test_the_gap_is_what_the_ends_do_not_show():
    gap = only("a", [0.9, 0.1, 0.9])
    assert s.min_acc(gap, ["a"]).value == 0.1
    assert s.windowed_forgetting(gap, 10).value == pytest.approx(0.8)


def test_the_score_before_the_first_update_is_no_minimum():
    assert s.min_acc(only("a", [0.1, 0.5, 0.6]), ["a"]).value == 0.5


def test_stages_joined_to_one_curve_count_from_each_end():
    # a was finished at step 0, b at step 20: of b only steps 30 and 40 count.
    assert s.min_acc(CURVE, {"a": 0, "b": 20}).value == pytest.approx((0.3 + 0.5) / 2)
    assert s.wc_acc(CURVE, {"a": 0, "b": 20}, "c").value == pytest.approx((0.8 + 0.3 + 0.5) / 3)


@pytest.mark.parametrize("metric", [s.windowed_forgetting, s.windowed_plasticity])
def test_windows_of_losses_are_those_of_minus_the_losses(metric):
    turned = metric(NEGATED, 3, higher_is_better=False)
    assert turned.value == pytest.approx(metric(CURVE, 3).value)
    assert turned.formula.endswith("with A replaced by -A (lower is better)")
    assert "-A " not in metric(CURVE, 3).formula


def test_levels_of_losses_keep_their_unit_and_the_worst_is_the_highest():
    losses = only("a", [1.0, 3.0, 2.0])
    assert s.min_acc(losses, ["a"], higher_is_better=False).value == 3.0
    assert "max_{n > end of i}" in s.min_acc(losses, ["a"], higher_is_better=False).formula
    both = [(step, by | {"b": 0.5}) for step, by in losses]
    assert s.wc_acc(both, ["a"], "b", higher_is_better=False).value == 1.75
    assert s.windowed_forgetting(losses, 2, higher_is_better=False).value == 2.0  # a loss that rises


def test_a_task_that_never_falls_has_no_forgetting_rather_than_a_negative_one():
    both = [(n, {"up": n / 10, "down": -n / 10}) for n in range(3)]
    assert s.windowed_forgetting(both, 3).value == pytest.approx(0.1)  # (0 + .2) / 2
    assert s.windowed_forgetting(both, 3, tasks=["up"]).value == 0.0


def test_the_first_stage_has_no_task_before_it():
    found = s.min_acc(CURVE, [])
    assert (found.value, found.n, found.reason) == (None, 0, "no task was finished before")
    assert s.wc_acc(CURVE, [], "c").value == 0.8  # k = 1: 1/1 A_1 + 0
    assert s.wc_acc(CURVE, [], "c").n == 1


@pytest.mark.parametrize(
    ("value", "said"), [(None, "not measured: a at step 20"), (math.nan, "not finite: a at step 20 = nan")]
)
def test_a_gap_in_the_curve_is_named(value, said):
    holed = with_score(20, "a", value)
    for found in (
        s.min_acc(holed, ["a", "b"]),
        s.wc_acc(holed, ["a", "b"], "c"),
        s.windowed_forgetting(holed, 2),
        s.windowed_plasticity(holed, 2),
    ):
        assert (found.value, found.n, found.reason) == (None, 0, said)
    assert s.min_acc(holed, ["b"]).value == 0.2  # what is not needed may be missing


def test_the_current_task_must_be_there_at_the_end():
    assert s.wc_acc(with_score(40, "c", None), ["a"], "c").reason == "not measured: c at step 40"
    assert s.wc_acc(CURVE, ["a"], "d").reason == "not measured: d at step 40"
    assert s.wc_acc([], ["a"], "c").reason == "no evaluation"
    with pytest.raises(ValueError, match="must not be among the finished"):
        s.wc_acc(CURVE, ["a", "c"], "c")


def test_a_curve_starts_where_its_task_is_first_named():
    later = [(step, {t: v for t, v in by.items() if t != "c" or step >= 20}) for step, by in CURVE]
    assert s.windowed_plasticity(later, 2, tasks=["c"]).value == pytest.approx(0.3)  # .6 to .9
    absent = [(step, {t: v for t, v in by.items() if t != "c" or step != 20}) for step, by in CURVE]
    assert s.windowed_plasticity(absent, 2, tasks=["c"]).reason == "not measured: c at step 20"


def test_too_few_evaluations_are_undefined_and_never_zero():
    one = CURVE[:1]
    assert s.windowed_forgetting(one, 2).reason == "a has fewer than two evaluations"
    assert s.windowed_forgetting([], 2).reason == "no task was evaluated"
    assert s.windowed_forgetting(CURVE, 2, tasks=["d"]).reason == "d has fewer than two evaluations"
    assert s.min_acc(one, ["a"]).reason == "no evaluation of a after step 0"
    assert s.windowed_forgetting(one, 2).value is s.min_acc(one, ["a"]).value is None


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="window = 1: must be at least 2"):
        s.windowed_forgetting(CURVE, 1)
    with pytest.raises(ValueError, match="step 0 comes after step 40"):
        s.min_acc([*CURVE, CURVE[0]], ["a"])
    with pytest.raises(ValueError, match="steps must rise"):
        s.windowed_plasticity([CURVE[0], CURVE[0]], 2)


curves = st.lists(st.floats(-10, 10), min_size=2, max_size=12).map(lambda scores: only("t", scores))


@given(curves, st.integers(2, 12))
def test_relations_between_windows(curve, window):
    forgetting = s.windowed_forgetting(curve, window).value
    assert 0 <= forgetting <= s.windowed_forgetting(curve, window + 1).value
    backwards = [(step, by) for (step, _), (_, by) in zip(curve, reversed(curve), strict=True)]
    assert forgetting == s.windowed_plasticity(backwards, window).value
