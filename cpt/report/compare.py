"""Runs side by side with intervals: what was learned, what was kept, and whether the difference is noise.

Everything is computed from the files of the runs: matrix.json says which rows and sets there are, eval/SET.json holds
the items. Resampling draws a set's items once for all rows of the matrix, all runs and all seeds, so that AP, BWT and
forgetting move together as they would on another sample of the same sets, and a difference of two runs is paired.
Sets are drawn independently of one another.

Runs that differ in their seed or order only are pooled as a group (`eval_harness.metrics.statistics.pooled`): the
interval shown is the wider of Student's t over runs and the bootstrap of runs and items.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cpt.errors import ConfigError, RunDirError
from cpt.report import summary
from cpt.report.read import SHARES
from eval_harness.metrics import continual
from eval_harness.metrics import statistics as st
from eval_harness.results import Result, ResultError, aggregation

FINAL = "R[T]"  # the formula of a set's score after the last stage
Scores = dict[str, dict[str, Result]]
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class RunFiles:
    """A finished run as its files have it.

    rows   stage 0 first: set -> measure -> Result with its items
    """

    path: Path
    matrix: dict[str, Any]
    stream: dict[str, Any]
    rows: tuple[Scores, ...]

    @classmethod
    def read(cls, path: Path) -> RunFiles:
        """Raises RunDirError: nothing measured, not finished, or a damaged file."""
        matrix = summary.read(path)
        try:
            stream = yaml.safe_load((path / "stream.yaml").read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise RunDirError(f"{path / 'stream.yaml'}: cannot be read ({error}); restore it") from error
        rows, stages = len(matrix["rows"]), len(stream["stages"])
        if rows != stages + 1:
            raise RunDirError(f"{path}: measured after {rows - 1} of {stages} stages; `cpt resume {path}` goes on")
        return cls(path, matrix, stream, tuple(_scores(path, row) for row in matrix["rows"]))

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def tasks(self) -> list[str]:
        return self.matrix["tasks"]

    @property
    def forget(self) -> list[str]:
        """Tests of unlearn stages."""
        return summary.forget(self.matrix)

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells runs of one group apart: seed and order."""
        return self.stream.get("seed", 0), tuple(self.tasks)

    def primary(self, name: str) -> str | None:
        """The measure a set is read by."""
        return summary.primary(self.matrix, name)

    def result(self, row: int, name: str, measure: str) -> Result | None:
        return self.rows[row].get(name, {}).get(measure)

    def picked(self, tasks: Sequence[str]) -> list[int]:
        """Rows of R: the base, the stage after which each task is known, the end of the stream for the last."""
        stages = [row["stage"] for row in self.matrix["rows"]]
        return [0, *(stages.index(task) for task in tasks[:-1]), len(stages) - 1]


@dataclass(frozen=True)
class Group:
    """Runs pooled as one; mostly a single run."""

    label: str
    runs: tuple[RunFiles, ...]

    @cached_property
    def keys(self) -> list[tuple[Any, ...]]:
        return [run.key for run in self.runs]


@dataclass(frozen=True)
class Quantity:
    """One line of the comparison: a score after the last stage, or a metric of the matrix.

    sets       whose items it depends on, all read by `measure`
    values     one per run, in the order of all runs; None where undefined, and `reason` says why
    drawn      (resamples, runs); None where nothing can be resampled
    n          items of the smallest set
    is_share   the measure is one that tables show in percent
    higher_is_better   of the quantity: a change is turned so that up is better, forgetting is not
    """

    section: str
    name: str
    formula: str
    measure: str
    sets: tuple[str, ...]
    values: tuple[float | None, ...]
    drawn: Array | None
    n: int
    is_share: bool
    higher_is_better: bool
    reason: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Groups, their quantities, and for each quantity an estimate per group and a difference to the first."""

    groups: tuple[Group, ...]
    quantities: tuple[Quantity, ...]
    estimates: tuple[tuple[st.Pooled | None, ...], ...]
    differences: tuple[tuple[st.Pooled | None, ...], ...]
    notes: tuple[str, ...]


def compare(
    groups: Mapping[str, Sequence[Path]],
    *,
    measure: str | None = None,
    level: float = st.LEVEL,
    resamples: int = st.RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare finished runs; the first group is what the others are compared with.

    Args:
        groups: label -> run directories; several in one are pooled.
        measure: read every set by this one; None is each set's first, and for the metrics of the matrix the one that
            most of the sets are read by.
        level, resamples, seed: of the intervals. Cost: about resamples x tasks^2 microseconds a run.

    Raises:
        RunDirError: a run that is not finished, or damaged.
        ConfigError: fewer than two runs, other tasks, unlike definitions or items, one run twice; all at once.
    """
    read = tuple(Group(label, tuple(RunFiles.read(path) for path in paths)) for label, paths in groups.items())
    runs = [run for group in read for run in group.runs]
    if not runs:
        raise ConfigError("compare: no run; give two or more, or --group NAME=RUN,RUN")
    chosen, notes = _chosen(runs, measure)
    problems = [*_unlike_groups(read), *_unlike_sets(runs, chosen)]
    if not chosen:
        what = f"measure {measure!r}" if measure else "set and measure"
        problems.append(f"compare: no {what} that all runs have; known: {', '.join(_measures(runs)) or 'none'}")
    if problems:
        raise ConfigError(*problems)
    quantities = tuple(_quantities(runs, chosen, _Draws(runs, resamples, seed)))
    how: dict[str, Any] = {"level": level, "seed": seed}
    spans = spans_of(read)
    estimates = tuple(tuple(_pooled(one, span, **how) for span in spans) for one in quantities)
    differences = tuple(
        tuple(_difference(one, read[0], spans[0], group, span, **how) for group, span in _later(read, spans))
        for one in quantities
    )
    return Comparison(read, quantities, estimates, differences, tuple(notes))


def labels(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """Every run as a group of its own: by its stream's name where no other has it, else by its folder's, or its path.

    Raises RunDirError: nothing measured. ConfigError: one run twice.
    """
    problems = list(_given_twice(paths))
    if problems:
        raise ConfigError(*problems)
    streams = [summary.read(path)["stream"] for path in paths]
    named = [name if streams.count(name) == 1 else path.name for name, path in zip(streams, paths, strict=True)]
    labelled = [name if named.count(name) == 1 else str(path) for name, path in zip(named, paths, strict=True)]
    return {label: [path] for label, path in zip(labelled, paths, strict=True)}


# ---- what is compared --------------------------------------------------------------------------------


def _scores(path: Path, row: Mapping[str, Any]) -> Scores:
    folder = path / "stages" / f"{row['index']:02d}_{row['stage']}" / "eval"
    return {name: _set(folder / f"{name}.json") for name in row["scores"]}


def _set(file: Path) -> dict[str, Result]:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        return {measure: Result.from_json(result) for measure, result in stored.items()}
    except (OSError, ValueError, ResultError) as error:
        step = f"`cpt eval {file.parents[3]}` measures again"
        raise RunDirError(f"{file}: cannot be read ({error}); {step}") from error


def _chosen(runs: Sequence[RunFiles], measure: str | None) -> tuple[dict[str, str], list[str]]:
    """Set -> the measure it is read by, for sets that all runs have; and notes about the others."""
    first = runs[0]
    names = list(dict.fromkeys(name for run in runs for name in [*run.tasks, *run.forget, *run.matrix["general"]]))
    by = {name: measure or first.primary(name) for name in names}
    found = {name: m for name, m in by.items() if m and all(run.result(0, name, m) for run in runs)}
    left_out = [name for name in names if name not in found]
    return found, [f"not in every run by one measure, left out: {', '.join(left_out)}"] if left_out else []


def _measures(runs: Sequence[RunFiles]) -> list[str]:
    return sorted({measure for run in runs for by in run.rows[0].values() for measure in by})


def _unlike_groups(groups: Sequence[Group]) -> Iterator[str]:
    runs = [run for group in groups for run in group.runs]
    if len(runs) < 2:
        yield "compare: one run; give two or more, `cpt report` shows a single one"
    paths = [run.path.resolve() for run in runs]
    yield from _given_twice(paths)
    for group in groups:
        if len(set(group.keys)) < len(group.runs) and len(set(paths)) == len(paths):
            yield f"--group {group.label}: two runs of one seed and order are one sample; pool runs that differ in them"
    for run in runs[1:]:
        if sorted(run.tasks) != sorted(runs[0].tasks):
            said = " and ".join(", ".join(one.tasks) or "none" for one in (runs[0], run))
            yield f"compare: {runs[0].name} and {run.name} have other tasks ({said}); their averages do not compare"


def _given_twice(paths: Sequence[Path]) -> Iterator[str]:
    real = [path.resolve() for path in paths]
    twice = [path for path in dict.fromkeys(real) if real.count(path) > 1]
    for path in twice:
        yield f"compare: {path.name} is given twice, and a run is no other than itself; name two runs"


def _unlike_sets(runs: Sequence[RunFiles], chosen: Mapping[str, str]) -> Iterator[str]:
    """A set must be measured by one definition on the same items in every row of every run."""
    for name, measure in chosen.items():
        first = runs[0].result(0, name, measure)
        if first is None:
            continue
        for run in runs:
            for row, stage in enumerate(run.matrix["rows"]):
                other = run.result(row, name, measure)
                if other is None:
                    continue
                place = f"{name} {measure} of {run.name} after {stage['stage']}"
                if other.definition != first.definition:
                    yield (
                        f"{place}: its definition is {other.definition}, that of {runs[0].name} {first.definition}; "
                        "`cpt eval RUN --stream STREAM` measures both by one plan"
                    )
                    break
                if other.per_item.keys() != first.per_item.keys():
                    odd = len(other.per_item.keys() ^ first.per_item.keys())
                    yield (
                        f"{place}: other items than in {runs[0].name}: {odd} are in one of them only; "
                        "`cpt eval RUN --stream STREAM` measures both on one set"
                    )
                    break


# ---- resampling --------------------------------------------------------------------------------------


class _Draws:
    """A set's scores after every stage of every run, over resamples of its items."""

    def __init__(self, runs: Sequence[RunFiles], resamples: int, seed: int) -> None:
        self.runs, self.resamples, self.seed = runs, resamples, seed
        self.known: dict[tuple[str, str], list[list[Array | None]] | None] = {}

    def of(self, name: str, measure: str) -> list[list[Array | None]] | None:
        """Run -> row -> (resamples,), None where the row was not measured; None where a value is not of its items."""
        if (name, measure) not in self.known:
            self.known[name, measure] = self._draw(name, measure)
        return self.known[name, measure]

    def _draw(self, name: str, measure: str) -> list[list[Array | None]] | None:
        cells = [[run.result(row, name, measure) for row in range(len(run.rows))] for run in self.runs]
        there = [result for by in cells for result in by if result is not None]
        kinds = {aggregation(result) for result in there}
        if len(kinds) != 1 or None in kinds:
            return None
        items = sorted(there[0].per_item)
        values = np.array([[result.per_item[item] for item in items] for result in there])
        weights = np.array([[result.weights.get(item, 1.0) for item in items] for result in there])
        below = weights if kinds == {"ratio_of_sums"} else None
        seed = (self.seed, zlib.crc32(name.encode()))  # of the name, not its place: all runs draw alike
        drawn = st.resampled(values * weights, below, resamples=self.resamples, seed=seed).T
        found = iter(np.exp(drawn) if kinds == {"exp_of_mean"} else drawn)
        return [[None if result is None else next(found) for result in by] for by in cells]


def _quantities(runs: Sequence[RunFiles], chosen: Mapping[str, str], draws: _Draws) -> Iterator[Quantity]:
    first = runs[0]
    tasks = [name for name in first.tasks if name in chosen]
    general = [name for name in chosen if name not in [*tasks, *first.forget]]
    parts = {"tasks": tasks, "to forget": [name for name in first.forget if name in chosen], "general": general}
    for part, names in parts.items():
        for name in names:
            yield _final(f"{part}, after the last stage", name, chosen[name], runs, draws)
    section = "the stream"
    measure, read = _common(runs, tasks, chosen)
    if measure:
        for function in (continual.average_performance, continual.bwt_gem, continual.forgetting_max):
            yield _metric(section, function, measure, read, runs, draws)
    measure, read = _common(runs, general, chosen)
    if measure:
        yield _general(section, measure, read, runs, draws)


def _common(runs: Sequence[RunFiles], names: Sequence[str], chosen: Mapping[str, str]) -> tuple[str | None, list[str]]:
    """The measure that most of the sets are read by, and those sets that all runs have it for."""
    listed = [chosen[name] for name in names]
    measure = max(dict.fromkeys(listed), key=listed.count, default=None)
    return measure, [name for name in names if measure and all(run.result(0, name, measure) for run in runs)]


def _final(section: str, name: str, measure: str, runs: Sequence[RunFiles], draws: _Draws) -> Quantity:
    results = [run.result(len(run.rows) - 1, name, measure) for run in runs]
    values = tuple(None if result is None else result.value for result in results)
    drawn = draws.of(name, measure)
    last = None if drawn is None else _columns([by[-1] for by in drawn])
    reason = next((r.note for r in results if r is not None and r.value is None), None)
    return _quantity(section, name, FINAL, measure, [name], runs, values, last, reason)


def _metric(
    section: str,
    function: Callable[..., continual.Summary],
    measure: str,
    tasks: Sequence[str],
    runs: Sequence[RunFiles],
    draws: _Draws,
) -> Quantity:
    """A metric of R, by the functions that matrix.json is made with: once on the scores, once on every resample."""
    of_sets = {name: draws.of(name, measure) for name in tasks}
    signed = {} if function is continual.average_performance else {"higher_is_better": _higher(runs, tasks, measure)}
    found, columns = [], []
    for at, run in enumerate(runs):
        order = [task for task in run.tasks if task in tasks]
        picked = run.picked(order)
        found.append(function([[_value(run, row, task, measure) for task in order] for row in picked], **signed))
        columns.append(_over_resamples(function, of_sets, at, picked, order, signed))
    is_level = function is continual.average_performance
    better = _higher(runs, tasks, measure) if is_level else function is not continual.forgetting_max
    return _summarised(section, found, columns, measure, tasks, runs, higher_is_better=better)


def _over_resamples(
    function: Callable[..., continual.Summary],
    of_sets: Mapping[str, list[list[Array | None]] | None],
    at: int,
    picked: Sequence[int],
    order: Sequence[str],
    signed: Mapping[str, bool],
) -> Array | None:
    cells = [[drawn[at][row] if (drawn := of_sets[task]) is not None else None for task in order] for row in picked]
    if any(cell is None for by in cells for cell in by):
        return None
    matrices = np.array(cells).transpose(2, 0, 1).tolist()
    values = [function(matrix, **signed).value for matrix in matrices]
    return None if None in values else np.array(values, dtype=float)


def _general(section: str, measure: str, names: Sequence[str], runs: Sequence[RunFiles], draws: _Draws) -> Quantity:
    """Change of general ability since stage 0, over the last stage."""
    higher = _higher(runs, names, measure)
    of_sets = [draws.of(name, measure) for name in names]
    found, columns = [], []
    for at, run in enumerate(runs):
        ends = [{name: _value(run, row, name, measure) for name in names} for row in (0, len(run.rows) - 1)]
        found.append(continual.general_delta(ends, higher_is_better=higher))
        cells = [(drawn[at][0], drawn[at][-1]) if drawn is not None else (None, None) for drawn in of_sets]
        changes = [now - base for base, now in cells if base is not None and now is not None]
        whole = len(changes) == len(names)
        columns.append((1 if higher else -1) * np.mean(changes, axis=0) if whole else None)
    return _summarised(section, found, columns, measure, names, runs, higher_is_better=True)


def _summarised(
    section: str,
    found: Sequence[continual.Summary],
    columns: Sequence[Array | None],
    measure: str,
    sets: Sequence[str],
    runs: Sequence[RunFiles],
    *,
    higher_is_better: bool,
) -> Quantity:
    formula = found[0].formula
    reason = next((one.reason for one in found if one.reason), None)
    values = tuple(one.value for one in found)
    one = _quantity(section, formula.split(" = ")[0], formula, measure, sets, runs, values, _columns(columns), reason)
    return replace(one, higher_is_better=higher_is_better)


def _quantity(
    section: str,
    name: str,
    formula: str,
    measure: str,
    sets: Sequence[str],
    runs: Sequence[RunFiles],
    values: tuple[float | None, ...],
    drawn: Array | None,
    reason: str | None,
) -> Quantity:
    results = [result for run in runs for by in run.rows for s in sets if (result := by.get(s, {}).get(measure))]
    return Quantity(
        section,
        name,
        formula,
        measure,
        tuple(sets),
        values,
        drawn,
        min(result.n for result in results),
        measure.startswith(SHARES),
        results[0].higher_is_better,
        reason,
    )


def _columns(parts: Sequence[Array | None]) -> Array | None:
    there = [part for part in parts if part is not None]
    return np.stack(there, axis=1) if len(there) == len(parts) else None


def _value(run: RunFiles, row: int, name: str, measure: str) -> float | None:
    result = run.result(row, name, measure)
    return None if result is None else result.value


def _higher(runs: Sequence[RunFiles], names: Sequence[str], measure: str) -> bool:
    return runs[0].rows[0][names[0]][measure].higher_is_better


# ---- groups ------------------------------------------------------------------------------------------


def spans_of(groups: Sequence[Group]) -> list[slice]:
    """Where each group's runs stand among all runs."""
    ends = np.cumsum([len(group.runs) for group in groups])
    return [slice(int(end) - len(group.runs), int(end)) for end, group in zip(ends, groups, strict=True)]


def _later(groups: Sequence[Group], spans: Sequence[slice]) -> list[tuple[Group, slice]]:
    return list(zip(groups, spans, strict=True))[1:]


def _pooled(one: Quantity, span: slice, *, level: float, seed: int) -> st.Pooled | None:
    values = _known(one.values[span])
    if values is None:
        return None
    return st.pooled(values, _drawn(one, span), one.n, level=level, seed=seed)


def _difference(
    one: Quantity, a: Group, of_a: slice, b: Group, of_b: slice, *, level: float, seed: int
) -> st.Pooled | None:
    first, second = _known(one.values[of_a]), _known(one.values[of_b])
    if first is None or second is None:
        return None
    drawn_a, drawn_b = _drawn(one, of_a), _drawn(one, of_b)
    paired = len(first) == len(second) == 1 or (len(first) == len(second) and set(a.keys) == set(b.keys))
    if paired and len(first) > 1:  # run i of both is that of one seed and order
        place = [b.keys.index(key) for key in a.keys]
        second, drawn_b = [second[i] for i in place], None if drawn_b is None else drawn_b[:, place]
    return st.pooled_difference(first, second, drawn_a, drawn_b, one.n, paired=paired, level=level, seed=seed)


def _known(values: Sequence[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) and all(map(math.isfinite, known)) else None


def _drawn(one: Quantity, span: slice) -> Array | None:
    return None if one.drawn is None else one.drawn[:, span]
