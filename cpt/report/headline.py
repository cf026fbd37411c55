"""A run in three sentences: what was learned, what of it was kept, what became of general ability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cpt.report.heatmap import ABSENT, average, general_measure, shown, signed, verdict
from cpt.report.read import RunView, Score, points
from cpt.report.scaffold import isolated

NAMED = 3  # sets named in a sentence; the others are counted
MINUS = "\u2212"


@dataclass(frozen=True)
class Tile:
    """One figure with its sentence. figure is `-` where nothing is known yet."""

    title: str
    figure: str
    unit: str
    sentence: str


@dataclass(frozen=True)
class Headline:
    verdict: str
    status: str
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class _Task:
    """A task that a stage has taught: right before that stage, right after it, after the last stage measured."""

    name: str
    before: Score
    after: Score
    now: Score
    is_earlier: bool

    @property
    def learned(self) -> bool:
        """Better by more than the error of the difference; where no error is known, better at all."""
        judged = verdict(self.after, self.before)
        return judged == "better" or (not judged and _gain(self.before, self.after) > 0)


def headline(view: RunView) -> Headline:
    tasks = _read_alike(list(_tasks(view)))
    tiles = tuple(tile for tile in (_learned(tasks), _kept(tasks), _general(view)) if tile)
    said = ", ".join(part for part in (_learned_in_short(tasks), _general_in_short(view)) if part)
    said = said.replace(" %", "\u00a0%").replace(" \u2192 ", "\u00a0\u2192\u00a0")
    return Headline(said or "nothing was measured after a stage yet", status(view), tiles)


def status(view: RunView) -> str:
    """How far the run is."""
    trained = sum(stage.is_trained for stage in view.stages[1:])
    of = f"{trained} of {len(view.stages) - 1} stages trained"
    if view.finished:
        stages = len(view.stages) - 1
        measured = "and measured" if view.rows else "; no test and no evaluation, so nothing was measured"
        return f"finished: {stages} stage{'s' * (stages != 1)} trained {measured}".replace(" ;", ";")
    if not view.rows and not any(stage.is_begun for stage in view.stages):
        return "no stage has begun, and nothing was measured"
    here = next((stage for stage in view.stages if not stage.is_over), None)
    return of if here is None else f"not finished: {of}; {here.title}: {here.state}"


def _tasks(view: RunView) -> list[_Task]:
    last = view.rows[-1] if view.rows else None
    found = []
    for name in view.tasks:
        stage = view.taught(name)
        if stage is None or last is None:
            continue
        row = view.before(stage)
        before, after, now = (view.score(one, name) if one else None for one in (row, stage, last))
        if before and after and now and None not in (before.value, after.value, now.value):
            found.append(_Task(name, before, after, now, stage.index < last.index))
    return found


def _read_alike(tasks: Sequence[_Task]) -> list[_Task]:
    """Those of the definition's measure that most tasks are read by: only they have an average."""
    kinds = [task.after.definition.partition("@")[0] for task in tasks]
    usual = max(dict.fromkeys(kinds), key=kinds.count, default="")
    return [task for task, kind in zip(tasks, kinds, strict=True) if kind == usual]


def _learned(tasks: Sequence[_Task]) -> Tile | None:
    if not tasks:
        return None
    before, after = _mean([task.before for task in tasks]), _mean([task.after for task in tasks])
    one = tasks[0].after
    missed = [isolated(task.name) for task in tasks if not task.learned]
    sentence = f"Right after its stage a task stands at {_said(one, after)} on average, right before it at "
    sentence += f"{_said(one, before)}."
    if missed:
        sentence += f" Not learned, as far as the error tells: {_listed(missed)}."
    return Tile("Learned", _plain(one, after), _unit(one), sentence)


def _kept(tasks: Sequence[_Task]) -> Tile | None:
    """What the earlier tasks have now, of what they had when they were taught."""
    earlier = [task for task in tasks if task.is_earlier]
    if not earlier:
        return None
    one = earlier[0].now
    then, now = _mean([task.after for task in earlier]), _mean([task.now for task in earlier])
    lost = sorted((task for task in earlier if verdict(task.now, task.after) == "worse"), key=_lost)
    sentence = f"Tasks of earlier stages stood at {_said(one, then)} when they were taught "
    sentence += f"({_change(one, now - then)} since)."
    if lost:
        said = [
            f"{isolated(task.name)} {_change(one, (task.now.value or 0) - (task.after.value or 0))}" for task in lost
        ]
        sentence += f" Lost: {_listed(said)}."
    else:
        sentence += " None is worse beyond its error."
    return Tile("Kept of earlier tasks", _plain(one, now), _unit(one), sentence)


def _general(view: RunView) -> Tile | None:
    measure, found = general_measure(view), _general_change(view)
    if not view.rows or not any(view.measures.get(name) for name in view.general):
        return None
    if not measure:
        return Tile("General ability", ABSENT, "", f"No share to average.{_lost_of_general(view)}")
    names = [name for name in view.general if view.measures.get(name) == measure]
    if found is None:
        gaps = [row for row in (view.rows[0], view.rows[-1]) if average(view, row, measure) is None]
        lacking = [
            isolated(name) for name in names if (score := view.score(gaps[0], name)) is None or score.value is None
        ]
        sentence = f"No average after {gaps[0].title}: no score of {_listed(lacking)}."
        return Tile("General ability", ABSENT, "", sentence)
    base, now, count = found
    many = f"The mean of {count} general set{'s' * (count > 1)}"
    if len(view.rows) == 1:
        return Tile("General ability", points(now), "%", f"{many}; no stage was measured.")
    sentence = f"{many} was {points(base)} % before the first stage.{_lost_of_general(view)}"
    return Tile("General ability", points(now), f"% ({signed(now - base, True)})", sentence)


def _lost_of_general(view: RunView) -> str:
    """Which general sets are worse than at the start, whatever the measure; first what lost most of its own."""
    worse = []
    for name in view.general:
        last, first = view.score(view.rows[-1], name), view.score(view.rows[0], name)
        if last and first and last.value is not None and first.value is not None and verdict(last, first) == "worse":
            change = last.value - first.value
            share = abs(change) if last.is_percent else min(1.0, abs(change) / max(abs(first.value), 1e-9))
            worse.append((-share, name, signed(change, last.is_percent)))
    if worse:
        return f" Lost: {_listed([f'{isolated(name)} {said}' for _, name, said in sorted(worse)])}."
    return " None is worse beyond its error." if len(view.rows) > 1 else ""


def _general_change(view: RunView) -> tuple[float, float, int] | None:
    measure = general_measure(view)
    if not measure or not view.rows:
        return None
    base, now = (average(view, stage, measure) for stage in (view.rows[0], view.rows[-1]))
    count = sum(view.measures.get(name) == measure for name in view.general)
    return None if base is None or now is None else (base, now, count)


def _learned_in_short(tasks: Sequence[_Task]) -> str:
    if not tasks:
        return ""
    learned, one = sum(task.learned for task in tasks), tasks[0].after
    of = f"{learned}" if learned == len(tasks) else f"{learned} of {len(tasks)}"
    said = f"{of} task{'s' * (len(tasks) > 1)} learned ({_round(one, _mean([task.after for task in tasks]))})"
    earlier = [task for task in tasks if task.is_earlier]
    return f"{said}, earlier ones now at {_round(one, _mean([task.now for task in earlier]))}" if earlier else said


def _general_in_short(view: RunView) -> str:
    found = _general_change(view)
    if found is None:
        return ""
    base, now, _ = found
    if len(view.rows) == 1:
        return f"general average of the base {_whole(base)} %"
    return f"general average {_whole(base)} \u2192 {_whole(now)} %"


def _gain(before: Score, after: Score) -> float:
    change = (after.value or 0.0) - (before.value or 0.0)
    return change if after.higher_is_better else -change


def _lost(task: _Task) -> float:
    return _gain(task.after, task.now)


def _mean(scores: Sequence[Score]) -> float:
    return math.fsum(score.value or 0.0 for score in scores) / len(scores)


def _plain(one: Score, value: float) -> str:
    return shown(one, value).replace("-", MINUS)


def _unit(one: Score) -> str:
    return "%" if one.is_percent else one.definition.partition("@")[0]


def _said(one: Score, value: float) -> str:
    return f"{_plain(one, value)} {_unit(one)}"


def _round(one: Score, value: float) -> str:
    """For a line that is read in passing: whole per cents, three figures of anything else."""
    return f"{_whole(value)} %" if one.is_percent else f"{value:.3g} {_unit(one)}"


def _whole(share: float) -> int:
    """Per cents, a half of one rounded up."""
    return math.floor(100 * share + 0.5)


def _change(one: Score, change: float) -> str:
    return signed(change, one.is_percent) + (" points" if one.is_percent else "")


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
