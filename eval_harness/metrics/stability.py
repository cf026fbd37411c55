"""The stability gap: what happens to a score while a stage trains, which the scores after the stages do not show.

A curve is a list of (step, {task: score}) in the order of its steps, A[n] being a task's score at evaluation n. Steps
count optimizer steps since the stage began: step 0 is before its first update. Several stages make one curve where
their steps are counted on.

`min_acc` and `wc_acc` are levels in the scores' own unit, whatever they are (for a loss the worst is the highest).
Windowed forgetting and plasticity are changes, and positive means "fell" and "rose in worth" for accuracies and losses
alike: where lower is better the formula is applied to -A. A window counts evaluations, not steps: every 10 steps, ten
evaluations span 90 steps. Curves with unlike spacing do not compare.

A score that is absent, None or not finite where it is needed makes the value None, and the reason names it: the
minimum over what happens to be there would only be too high.

Source: De Lange et al. 2023 (ICLR, arXiv 2205.13452, section 3), who evaluate after every iteration. Evaluating every
k steps can miss a gap that is shorter: min-ACC and WC-ACC are then too high, and WF too low.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise

from eval_harness.metrics.continual import Summary, gaps

Curve = Sequence[tuple[int, Mapping[str, float | None]]]
Finished = Collection[str] | Mapping[str, int]


def min_acc(curve: Curve, finished: Finished, *, higher_is_better: bool = True) -> Summary:
    """Mean over the finished tasks of the worst score since they were finished.

    Args:
        curve: evaluations of a stage, or of several with steps counted on.
        finished: tasks learned before. Names alone are of tasks finished where the curve's steps start, at step 0; a
            mapping gives the last step of the stage that taught each, and only later evaluations count.

    Returns:
        Summary over that many tasks; None without a finished task or an evaluation after it.

    Raises:
        ValueError: steps do not rise.
    """
    _check(curve)
    worst = "min" if higher_is_better else "max"
    formula = f"min-ACC = 1/(k-1) sum_{{i<k}} {worst}_{{n > end of i}} A_i[n]{_note(higher_is_better)}"
    if not finished:
        return Summary(None, formula, 0, "no task was finished before")
    ends = finished if isinstance(finished, Mapping) else dict.fromkeys(finished, 0)
    found = []
    for task, end in ends.items():
        scores, reason = _scores(task, [(step, by) for step, by in curve if step > end])
        if reason or not scores:
            return Summary(None, formula, 0, reason or f"no evaluation of {task} after step {end}")
        found.append(min(scores) if higher_is_better else max(scores))
    return Summary(math.fsum(found) / len(found), formula, len(found))


def wc_acc(curve: Curve, finished: Finished, current: str, *, higher_is_better: bool = True) -> Summary:
    """Worst-case accuracy: the last score of the task being learned with the worst ones of those before.

    Args:
        curve, finished: as for `min_acc`.
        current: the task of this stage, the k-th.

    Returns:
        Summary over k tasks; for k = 1 the last score itself.

    Raises:
        ValueError: steps do not rise, or `current` is among the finished.
    """
    _check(curve)
    if current in finished:
        raise ValueError(f"current = {current!r}: must not be among the finished tasks; take it out of them")
    formula = f"WC-ACC = 1/k A_k[last] + (1-1/k) min-ACC{_note(higher_is_better)}"
    if not curve:
        return Summary(None, formula, 0, "no evaluation")
    step, scores = curve[-1]
    last = scores.get(current)
    if last is None or not math.isfinite(last):
        return Summary(None, formula, 0, gaps([(_name(current, step), last)]))
    if not finished:
        return Summary(last, formula, 1)
    before = min_acc(curve, finished, higher_is_better=higher_is_better)
    if before.value is None:
        return Summary(None, formula, 0, before.reason)
    return Summary((last + before.n * before.value) / (before.n + 1), formula, before.n + 1)


def windowed_forgetting(
    curve: Curve, window: int, *, tasks: Iterable[str] | None = None, higher_is_better: bool = True
) -> Summary:
    """WF: mean over tasks of the largest fall within `window` consecutive evaluations.

    Args:
        curve: evaluations; a task's own curve starts where it is first named.
        window: evaluations, at least 2; 10 and 100 in the paper. A curve shorter than it is one window.
        tasks: names; None for all in the curve.

    Returns:
        Summary, at least 0: a task that never falls has 0 (m = n), as in the published code, and does not pay for
        what another one lost. None for a task with fewer than two evaluations.

    Raises:
        ValueError: window below 2, or steps do not rise.
    """
    return _windowed("WF", curve, window, tasks, higher_is_better)


def windowed_plasticity(
    curve: Curve, window: int, *, tasks: Iterable[str] | None = None, higher_is_better: bool = True
) -> Summary:
    """WP: the same of the largest rise, A[n] - A[m]; of the task being learned, how fast that goes."""
    return _windowed("WP", curve, window, tasks, higher_is_better)


# ---- what they stand on ----------------------------------------------------------------------------------


_CHANGE = {"WF": "A[m] - A[n]", "WP": "A[n] - A[m]"}


def _windowed(name: str, curve: Curve, window: int, tasks: Iterable[str] | None, higher_is_better: bool) -> Summary:
    if window < 2:
        raise ValueError(f"window = {window}: must be at least 2 evaluations, e.g. 10")
    _check(curve)
    turned = "" if higher_is_better else " with A replaced by -A (lower is better)"
    formula = f"{name}^{window} = 1/k sum_i max_{{m<=n<m+{window}}} ({_CHANGE[name]}){turned}"
    sign = 1 if higher_is_better == (name == "WF") else -1  # the largest rise is the largest fall of -A
    names = list(dict.fromkeys(task for _, by in curve for task in by) if tasks is None else tasks)
    if not names:
        return Summary(None, formula, 0, "no task was evaluated")
    found = []
    for task in names:
        first = next((at for at, (_, by) in enumerate(curve) if task in by), len(curve))
        scores, reason = _scores(task, curve[first:])
        if reason or len(scores) < 2:
            return Summary(None, formula, 0, reason or f"{task} has fewer than two evaluations")
        found.append(_largest_fall([sign * score for score in scores], window))
    return Summary(math.fsum(found) / len(found), formula, len(found))


def _largest_fall(scores: Sequence[float], window: int) -> float:
    starts = (max(0, n - window + 1) for n in range(len(scores)))
    return max(max(scores[start : n + 1]) - scores[n] for n, start in enumerate(starts))


def _scores(task: str, curve: Curve) -> tuple[list[float], str | None]:
    """A task's scores, or why there are none."""
    entries = [(_name(task, step), by.get(task)) for step, by in curve]
    reason = gaps(entries)
    return ([], reason) if reason else ([float(score) for _, score in entries if score is not None], None)


def _name(task: str, step: int) -> str:
    return f"{task} at step {step}"


def _note(higher_is_better: bool) -> str:
    return "" if higher_is_better else " (lower is better)"


def _check(curve: Curve) -> None:
    for (before, _), (step, _) in pairwise(curve):
        if step <= before:
            raise ValueError(
                f"curve: step {step} comes after step {before}: steps must rise; where a stage follows another, "
                "add the steps of those before it"
            )
