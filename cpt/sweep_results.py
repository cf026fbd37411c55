"""What came of a sweep: every method at every rate, the rates at which they learned most, all at equal new-task score.

Everything is computed from the files of the finished runs, so it can be shown again at any time.
"""

import itertools
import math
import statistics
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt.report import compare as comparison
from cpt.report import summary
from cpt.report.read import SHARES
from cpt.sweep import Planned, Tokens, done, tokens


@dataclass(frozen=True)
class Row:
    """A method at a learning rate, over its seeds: means, and the standard deviation over seeds where there are two.

    learned: P, mean score of a task right after its stage. kept: BWT_GEM. end: AP; the three by `measure`, which most
    tasks are read by. general: change of the general average since the base, up is better, by `general_measure`. As
    they are (a share: 0 to 1). tokens: trained on by a run, prompts included.
    """

    method: str
    learning_rate: float | None
    seeds: int
    measure: str
    learned: float | None
    kept: float | None
    general: float | None
    end: float | None
    spread: float | None
    tokens: Tokens | None = None
    higher_is_better: bool = True
    general_measure: str = ""

    @property
    def turned(self) -> float:
        """What was learned, up is better; below everything where it is not known."""
        return -math.inf if self.learned is None else self.learned if self.higher_is_better else -self.learned


def results(planned: Sequence[Planned], failed: Collection[str] = ()) -> list[Row]:
    """Of the finished runs, by method and learning rate; joint and specialists are in `references`.

    failed: names of runs that are left out whatever their files say.
    """
    groups: dict[tuple[str, float | None], list[Path]] = {}
    for one, path in _finished(planned, failed):
        if not _is_reference(one):
            groups.setdefault((one.method, one.learning_rate), []).append(path)
    return [_row(method, rate, paths) for (method, rate), paths in groups.items()]


def _finished(planned: Sequence[Planned], failed: Collection[str]) -> list[tuple[Planned, Path]]:
    return [(one, path) for one in planned if one.stream.name not in failed and (path := done(one)) is not None]


def _is_reference(one: Planned) -> bool:
    return one.alone is not None or one.method == "joint"


def _row(method: str, rate: float | None, paths: Sequence[Path]) -> Row:
    matrices = [summary.read(path) for path in paths]
    first = matrices[0]
    measure, general = (_usual(first, first[sets]) for sets in ("tasks", "general"))

    def values(name: str, by: str) -> list[float]:
        """Of every seed, or none."""
        found = [matrix["summary"].get(by, {}).get(name, {}).get("value") for matrix in matrices]
        return [] if None in found else found

    learned, kept, end = (_mean(values(name, measure)) for name in ("plasticity", "bwt_gem", "average_performance"))
    ends = values("average_performance", measure)
    return Row(
        method,
        rate,
        len(matrices),
        measure,
        learned,
        kept,
        _mean(values("general_delta", general)),
        end,
        statistics.stdev(ends) if len(ends) > 1 else None,
        _mean_tokens(map(tokens, paths)),
        _is_higher_better(first, measure),
        general,
    )


def _usual(matrix: Mapping[str, Any], sets: Iterable[str]) -> str:
    """The measure that most of the sets are read by; empty where none is measured."""
    measures = [measure for name in sets if (measure := summary.primary(dict(matrix), name))]
    return max(dict.fromkeys(measures), key=measures.count, default="")


def _mean_tokens(found: Iterable[Tokens]) -> Tokens:
    counts = list(found)
    return Tokens(statistics.fmean(one.number for one in counts), all(one.is_counted for one in counts))


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _is_higher_better(matrix: Mapping[str, Any], measure: str) -> bool:
    scores = matrix["rows"][0]["scores"].values()
    return next((by[measure]["higher_is_better"] for by in scores if measure in by), True)


@dataclass(frozen=True)
class Reference:
    """What joint training, or a specialist, reaches on a task, over its seeds. tokens: trained on by a run."""

    baseline: str
    task: str
    learning_rate: float | None
    measure: str
    score: float
    tokens: Tokens


def references(planned: Sequence[Planned], failed: Collection[str] = ()) -> list[Reference]:
    """Of the finished joint runs and specialists, by task and learning rate."""
    tasks = {stage.name for one in planned for stage in one.stream.stages if stage.test and one.method != "joint"}
    scores: dict[tuple[str, str, float | None, str], list[tuple[float, Tokens]]] = {}
    for one, path in _finished(planned, failed):
        if not _is_reference(one):
            continue
        matrix = summary.read(path)
        for task in [one.alone] if one.alone else [name for name in matrix["general"] if name in tasks]:
            measure = summary.primary(matrix, task) or ""
            value = matrix["rows"][-1]["scores"].get(task, {}).get(measure, {"value": None})["value"]
            if value is not None:
                key = ("specialist" if one.alone else "joint", task, one.learning_rate, measure)
                scores.setdefault(key, []).append((value, tokens(path)))
    return [
        Reference(*key, statistics.fmean(score for score, _ in found), _mean_tokens(count for _, count in found))
        for key, found in scores.items()
    ]


def at_equal_score(rows: Sequence[Row]) -> tuple[float, dict[str, float | None]] | None:
    """The best new-task score that every method reaches, and what each has left of general ability there.

    Between two neighbouring learning rates it is interpolated over the new-task score; of several crossings (a rate
    may be too low or too high for a score) the one that keeps most. None for a method whose curve does not pass the
    score on both sides. None with less than two methods, or where nothing is known.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda row: row.learning_rate or 0.0):
        if row.learned is not None and row.general is not None:
            curves.setdefault(row.method, []).append((row.turned, row.general))
    if len(curves) < 2:
        return None
    score = min(max(learned for learned, _ in curve) for curve in curves.values())
    shown = score if rows[0].higher_is_better else -score
    return shown, {method: _at(curve, score) for method, curve in curves.items()}


def _at(curve: Sequence[tuple[float, float]], score: float) -> float | None:
    """curve: (learned, kept) by learning rate."""
    found = [kept for learned, kept in curve if learned == score]
    for (low, before), (high, after) in itertools.pairwise(curve):
        if min(low, high) < score < max(low, high):
            found.append(before + (after - before) * (score - low) / (high - low))
    return max(found, default=None)


def text(planned: Sequence[Planned], failed: Mapping[str, str]) -> str:
    """Tables of at most 80 columns: every method and rate, the best rate of each, all at equal new-task score."""
    rows = results(planned, failed)
    parts = _of_methods(rows) if rows else ["no run of the stream is finished yet"]
    if found := references(planned, failed):
        table = [["baseline", "task", "rate", "score", "tokens"]]
        table += [
            [one.baseline, one.task, _rate(one.learning_rate), _number(one.score, one.measure), str(one.tokens)]
            for one in found
        ]
        parts += ["", summary.aligned(table)]
    parts += [wrapped(line) for line in _unlike_launches(planned, failed)]
    return "\n".join([*parts, *(wrapped(f"failed: {name}: {why}") for name, why in failed.items())])


def _of_methods(rows: Sequence[Row]) -> list[str]:
    measure, general = rows[0].measure, rows[0].general_measure
    lines = [["method", "rate", "seeds", "learned", "kept", "general", "at the end", "sd", "tokens"]]
    for row in sorted(rows, key=lambda row: (row.method, row.learning_rate or 0.0)):
        scores = [_number(row.learned, measure), _number(row.kept, measure, "+"), _number(row.general, general, "+")]
        scores += [_number(row.end, measure), _number(row.spread, measure), str(row.tokens or "-")]
        lines.append([row.method, _rate(row.learning_rate), str(row.seeds), *scores])
    said = f"{_unit(measure)}: learned P, kept BWT_GEM, at the end AP; {_unit(general)}: general dG_i"
    if measure == general:
        said = f"{_unit(measure)}: learned P, kept BWT_GEM, general dG_i, at the end AP"
    parts = [wrapped(said), summary.aligned(lines)]
    best = _best(rows)
    rates = [f"{name} {row.learning_rate:g}" for name, row in best.items() if row.learning_rate is not None]
    parts += [wrapped(f"learned most at: {', '.join(rates)}")] if rates else []
    if equal := at_equal_score(rows):
        score, left = equal
        at = ", ".join(f"{name} {_number(value, general, '+')}" for name, value in left.items())
        parts += [wrapped(f"general ability at equal new-task score {_number(score, measure)}: {at}")]
    return parts


def _best(rows: Sequence[Row]) -> dict[str, Row]:
    """Every method at the rate at which it learned most; of equal ones the one that keeps more."""

    def order(row: Row) -> tuple[float, float]:
        return row.turned, -math.inf if row.general is None else row.general

    return {row.method: row for row in sorted(rows, key=order)}


def _unlike_launches(planned: Sequence[Planned], failed: Collection[str]) -> Iterator[str]:
    """Runs of other numbers of processes had other batches: their budgets are not equal."""
    counts: dict[int, list[str]] = {}
    for one, path in _finished(planned, failed):
        for count in {facts.get("processes") or 1 for facts in summary.facts(path).values()}:
            counts.setdefault(count, []).append(one.stream.name)
    if len(counts) > 1:
        said = "; ".join(f"{count}: {', '.join(names)}" for count, names in sorted(counts.items()))
        yield f"warning: trained by unlike numbers of processes, so with unlike batches ({said}). Set `processes`."


def _number(value: float | None, measure: str, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{100 * value:{sign}.1f}" if measure.startswith(SHARES) else f"{value:{sign}.3f}"


def _unit(measure: str) -> str:
    return f"{measure or 'nothing measured'}{', %' * measure.startswith(SHARES)}"


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:g}"


def wrapped(line: str) -> str:
    return textwrap.fill(line, summary.WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def compared(planned: Sequence[Planned], failed: Collection[str]) -> comparison.Comparison | None:
    """The methods at the rate at which each learned most, seeds pooled, with intervals over items; None of one alone.

    Raises CptError where runs cannot be compared.
    """
    best = _best(results(planned, failed))
    groups: dict[str, list[Path]] = {}
    for one, path in _finished(planned, failed):
        row = best.get(one.method)
        if row is not None and row.learning_rate == one.learning_rate:
            groups.setdefault(one.label, []).append(path)
    return comparison.compare(groups) if len(groups) > 1 else None
