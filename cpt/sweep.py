"""A sweep: one stream under several methods, learning rates and seeds, with its baselines, at equal budget, compared.

Every run is an ordinary stream in an ordinary run directory, so a sweep that was stopped goes on, and one run of it can
be looked at, or made elsewhere, by itself. Budgets are equal by construction: every stage has `max_steps`, and replayed
rows take the place of task rows in a batch of one size. Methods are compared at equal new-task score, by curves over
the learning rate: one that learned less has forgotten less for that reason alone.
"""

import copy
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from cpt.checkpoints import write_json
from cpt.config import Stream, read_raw
from cpt.data.spec import Name, Strict, refuse
from cpt.errors import ConfigError, CptError, Stopped
from cpt.explain import every_problem
from cpt.report import compare as comparison
from cpt.report import compare_table, summary
from cpt.run_dir import Run
from cpt.validate import problems

Say = Callable[[str], None]
Outcome = Literal["done", "failed", "to do"]

PLAIN = "sequential"  # the stream without methods
REPLAYED = "sequential_replay"
REPLAY = {"type": "replay", "ratio": 0.25, "earlier": "all"}


class Over(Strict):
    """What varies: every combination is a run."""

    methods: dict[Name, list[Any]] = Field(
        {}, description="name: a list of methods to put on every stage; none given: the stream's own"
    )
    learning_rate: list[float] = Field([], description="of every stage; none given: the stream's own")
    seed: list[int] = Field([], description="of the stream; none given: the stream's own")


class Sweep(Strict):
    """A sweep file."""

    name: Name
    stream: str = Field(description="YAML file, or the name of a shipped recipe")
    overrides: list[str] = Field([], description="key=value, on every run")
    over: Over = Field(default_factory=Over, description="methods, learning rates, seeds")
    baselines: list[Literal["sequential", "sequential_replay", "joint", "specialist"]] = Field(
        [],
        description="the stream without methods; with a quarter of its tokens from earlier stages; one stage of all "
        "rows; each stage alone from the base",
    )

    @model_validator(mode="after")
    def _names_are_free(self) -> "Sweep":
        taken = [name for name in self.over.methods if name in (PLAIN, REPLAYED, "joint", "specialist", "own")]
        refuse(*((("over", "methods", name), name, "is a baseline's name: take another") for name in taken))
        for key in ("learning_rate", "seed"):
            values = getattr(self.over, key)
            twice = [i for i, value in enumerate(values) if value in values[:i]]
            refuse(*((("over", key, i), values[i], "is there twice: each value is a run") for i in twice))
        return self

    @classmethod
    def from_yaml(cls, path: str) -> "Sweep":
        """Read a sweep. Raises ConfigError with every problem."""
        raw = read_raw(path)
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise ConfigError(*every_problem(error, cls, raw)[0]) from error


@dataclass(frozen=True)
class Planned:
    """One run of a sweep. label: of the runs that differ in seed alone. alone: the stage that a specialist learns."""

    label: str
    method: str
    learning_rate: float | None
    seed: int | None
    stream: Stream
    alone: str | None = None


def plan(sweep: Sweep) -> list[Planned]:
    """Every run, validated with its files and rows. Raises ConfigError with all problems of all runs, each once."""
    raw = read_raw(sweep.stream, sweep.overrides)
    base = Stream.parse(copy.deepcopy(raw))
    found: dict[str, None] = dict.fromkeys(_budget_problems(base))
    planned = []
    rates: Sequence[float | None] = sweep.over.learning_rate or [None]
    seeds: Sequence[int | None] = sweep.over.seed or [None]
    for (method, change), rate, seed in itertools.product(_variants(sweep, base), rates, seeds):
        parts = [sweep.name, method]
        parts += [] if rate is None else [_plain(rate)]
        parts += [] if seed is None else [f"s{seed}"]
        made = change(copy.deepcopy(raw)) | {"name": "-".join(parts)}
        made |= {} if seed is None else {"seed": seed}
        if rate is not None:
            for part in [made.setdefault("training", {}), *(stage.get("training") or {} for stage in made["stages"])]:
                part.pop("learning_rate", None)
            made["training"]["learning_rate"] = rate
        try:
            stream = Stream.parse(made)
            found |= dict.fromkeys(problems(stream))
        except ConfigError as error:
            found |= dict.fromkeys(f"{method}: {problem}" for problem in error.problems)
            continue
        label = "-".join(parts[1:-1] if seed is not None else parts[1:])
        alone = method.removeprefix("specialist_") if method.startswith("specialist_") else None
        planned.append(Planned(label, method, rate, seed, stream, alone))
    if found:
        raise ConfigError(*found)
    return planned


def _budget_problems(stream: Stream) -> Iterator[str]:
    for i, stage in enumerate(stream.stages):
        if stream.training_of(stage).get("max_steps", -1) <= 0:
            yield (
                f"stages.{i}.training.max_steps: a sweep compares at equal budget: give every stage its optimizer "
                "steps, for replayed rows make an epoch longer"
            )
    if not stream.stages:
        yield "stages: none: there is nothing to compare"


Change = Callable[[dict[str, Any]], dict[str, Any]]


def _variants(sweep: Sweep, base: Stream) -> list[tuple[str, Change]]:
    """Name -> how the raw stream becomes that variant."""
    found: list[tuple[str, Change]] = []
    if PLAIN in sweep.baselines:
        found.append((PLAIN, lambda raw: _with_methods(raw, [])))
    if REPLAYED in sweep.baselines:
        found.append((REPLAYED, _replayed))
    if not sweep.over.methods:
        found.append(("own", lambda raw: raw))
    for name, methods in sweep.over.methods.items():
        found.append((name, partial(_with_methods, methods=methods)))
    if "joint" in sweep.baselines:
        found.append(("joint", lambda raw: _joint(raw, base)))
    if "specialist" in sweep.baselines:
        for i, stage in enumerate(base.stages):
            found.append((f"specialist_{stage.name}", partial(_specialist, number=i)))
    return found


def _with_methods(raw: dict[str, Any], methods: Sequence[Any]) -> dict[str, Any]:
    for stage in raw["stages"]:
        stage["methods"] = copy.deepcopy(list(methods))
    return raw


def _replayed(raw: dict[str, Any]) -> dict[str, Any]:
    """Earlier stages' rows as a share of the tokens; in an rft stage, whose tokens nobody knows, of the rows."""
    for stage in raw["stages"]:
        stage["methods"] = [REPLAY | ({} if stage.get("kind") == "rft" else {"by": "tokens"})]
    return raw


def _specialist(raw: dict[str, Any], number: int) -> dict[str, Any]:
    raw["stages"] = [_with_methods(raw, [])["stages"][number]]
    return raw


def _joint(raw: dict[str, Any], base: Stream) -> dict[str, Any]:
    """One stage over the rows of all, each stage's as often, with the steps of all; every task is measured."""
    kinds = {stage.kind for stage in base.stages}
    if len(kinds) > 1 or kinds == {"rft"} or any(stage.adapter for stage in base.stages):
        raise ConfigError("baselines: joint trains all rows in one stage: it needs sft, or pretrain, and no adapters")
    dumped = [stage.model_dump(mode="json", exclude_defaults=True) for stage in base.stages]
    data = []
    for stage, full in zip(base.stages, dumped, strict=True):
        weights = [source.weight or 1.0 for source in stage.data]
        for source, given, weight in zip(full["data"], stage.data, weights, strict=True):
            source.pop("count", None)
            data.append(source | {"weight": weight / sum(weights), "name": given.name or stage.name})
    steps = sum(base.training_of(stage)["max_steps"] for stage in base.stages)
    training = base.training_of(base.stages[0]) | {"max_steps": steps}
    names = [source["name"] for source in data]
    for i, source in enumerate(data):  # two sources of one stage
        source["name"] = f"{source['name']}_{i}" if names.count(source["name"]) > 1 else source["name"]
    general = raw.setdefault("evaluation", {}).setdefault("general", {})
    general |= {stage["name"]: stage["test"] for stage in raw["stages"] if stage.get("test")}
    raw["stages"] = [{"name": "joint", "kind": base.stages[0].kind, "data": data, "training": training}]
    return raw


def _plain(value: float) -> str:
    """A learning rate as names allow it: 0.001 is lr1e-3."""
    mantissa, _, exponent = f"{value:e}".partition("e")
    digits = mantissa.rstrip("0").rstrip(".").replace(".", "_")
    return f"lr{digits}e{int(exponent)}"


# ---- running --------------------------------------------------------------------------------------------


def run_sweep(planned: Sequence[Planned], folder: Path, say: Say) -> dict[str, str]:
    """Run what is not finished, in order; one that cannot go on is recorded and the others go on. Why, by name.

    Raises Stopped when a signal asked for it; the same command goes on.
    """
    from cpt.stream import run

    failed: dict[str, str] = {}
    for number, one in enumerate(planned, start=1):
        say(f"sweep: {number} of {len(planned)}, {one.stream.name}")
        try:
            run(one.stream, say=_briefly(say) if outcome(one) == "done" else say)
        except Stopped:
            raise
        except Exception as error:  # one run's end is not the sweep's
            said = error.problems if isinstance(error, CptError) else (f"{type(error).__name__}: {error}",)
            failed[one.stream.name] = "; ".join(said)
            say(f"failed: {failed[one.stream.name]}")
        _keep(planned, failed, folder)
    return failed


def _briefly(say: Say) -> Say:
    """Of a run that is finished: that it is, not its tables and notes once more."""

    def heard(line: str) -> None:
        if not line.startswith((" ", "note: ")):
            say(line)

    return heard


def outcome(one: Planned) -> Outcome:
    """Whether a run has every stage trained and measured, by its files."""
    found = newest(one)
    if found is None or not _is_of(found, one.stream):
        return "to do"
    done = [stage for stage in found.stages() if stage.eval_done() is not None]
    return "done" if len(done) == len(one.stream.stages) + 1 else "to do"


def _is_of(found: Run, stream: Stream) -> bool:
    """Whether a run was made from the stream as it is now: another version's scores are of other settings."""
    file = found.path / "stream.yaml"
    return file.is_file() and file.read_text(encoding="utf-8") == stream.to_yaml()


def newest(one: Planned) -> Run | None:
    """Its run directory, if there is one."""
    return Run.newest(one.stream.output_dir, one.stream.name)


def listed(planned: Sequence[Planned]) -> str:
    """A line a run: whether it is done."""
    return summary.aligned([["run", "state"], *([one.stream.name, outcome(one)] for one in planned)], left=True)


def _keep(planned: Sequence[Planned], failed: Mapping[str, str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    runs = {}
    for one in planned:
        found = newest(one)
        state = "failed" if one.stream.name in failed else outcome(one)
        runs[one.stream.name] = {
            "label": one.label,
            "method": one.method,
            "learning_rate": one.learning_rate,
            "seed": one.seed,
            "state": state,
            "why": failed.get(one.stream.name),
            "run": str(found.path) if found else None,
        }
    write_json(folder / "sweep.json", {"runs": runs, "results": [vars(row) for row in results(planned)]})


# ---- what came of it ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A method at a learning rate, over its seeds: means, and the standard deviation over seeds where there are two.

    learned: P, mean score of a task right after its stage. kept: BWT_GEM. general: change of the general average since
    the base. end: AP. All of the measure that most tasks are read by, as it is (a share: 0 to 1). tokens: trained on by
    a run, prompts included.
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
    tokens: float | None = None


def results(planned: Sequence[Planned]) -> list[Row]:
    """Of the finished runs, by method and learning rate; joint and specialists are in `references`."""
    groups: dict[tuple[str, float | None], list[Path]] = {}
    for one in planned:
        found = newest(one)
        if one.alone is None and one.method != "joint" and found and outcome(one) == "done":
            groups.setdefault((one.method, one.learning_rate), []).append(found.path)
    return [
        replace(
            _row(method, rate, [summary.read(path) for path in paths]), tokens=statistics.fmean(map(_tokens, paths))
        )
        for (method, rate), paths in groups.items()
    ]


def _tokens(run: Path) -> int:
    """Trained on by all stages of a run."""
    return sum(int(facts.get("tokens") or 0) for facts in summary.facts(run).values())


def _row(method: str, rate: float | None, matrices: Sequence[dict[str, Any]]) -> Row:
    measures = [summary.primary(matrices[0], task) for task in matrices[0]["tasks"]]
    measure = max(set(measures), key=measures.count) or ""
    tables = [matrix["summary"].get(measure, {}) for matrix in matrices]

    def mean(name: str) -> float | None:
        values = [table.get(name, {}).get("value") for table in tables]
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if len(known) == len(values) else None

    ends = [table.get("average_performance", {}).get("value") for table in tables]
    known = [value for value in ends if value is not None]
    spread = statistics.stdev(known) if len(known) > 1 else None
    learned, kept, general, end = map(mean, ("plasticity", "bwt_gem", "general_delta", "average_performance"))
    return Row(method, rate, len(matrices), measure, learned, kept, general, end, spread)


def references(planned: Sequence[Planned]) -> list[tuple[str, str, float | None, float | None]]:
    """(baseline, task, learning rate, mean score over seeds) of the joint runs and of the specialists."""
    scores: dict[tuple[str, str, float | None], list[float]] = {}
    for one in planned:
        found = newest(one)
        if found is None or outcome(one) != "done" or not (one.alone or one.method == "joint"):
            continue
        matrix = summary.read(found.path)
        mine = _tasks(planned)
        tasks = [one.alone] if one.alone else [name for name in matrix["general"] if name in mine]
        for task in tasks:
            measure = summary.primary(matrix, task) or ""
            value = matrix["rows"][-1]["scores"].get(task, {}).get(measure, {"value": None})["value"]
            if value is not None:
                kind = "specialist" if one.alone else "joint"
                scores.setdefault((kind, task, one.learning_rate), []).append(value)
    return [(kind, task, rate, statistics.fmean(values)) for (kind, task, rate), values in scores.items()]


def _tasks(planned: Sequence[Planned]) -> set[str]:
    return {stage.name for one in planned for stage in one.stream.stages if stage.test and one.method != "joint"}


def at_equal_score(rows: Sequence[Row]) -> tuple[float, dict[str, float | None]] | None:
    """The highest new-task score that every method reaches, and what each has left of general ability there.

    Between two learning rates it is interpolated over the new-task score; None for a method whose curve does not pass
    it on both sides. None with less than two methods, or where nothing is known.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.learned is not None and row.general is not None:
            curves.setdefault(row.method, []).append((row.learned, row.general))
    if len(curves) < 2:
        return None
    score = min(max(learned for learned, _ in curve) for curve in curves.values())
    return score, {method: _at(sorted(curve), score) for method, curve in curves.items()}


def _at(curve: Sequence[tuple[float, float]], score: float) -> float | None:
    exact = [kept for learned, kept in curve if learned == score]
    if exact:
        return max(exact)
    for (low, before), (high, after) in itertools.pairwise(curve):
        if low < score < high:
            return before + (after - before) * (score - low) / (high - low)
    return None


def text(planned: Sequence[Planned], failed: Mapping[str, str]) -> str:
    """Tables of at most 80 columns: every method and rate, the best rate of each, all at equal new-task score."""
    rows = results(planned)
    if not rows:
        return "no run of the stream is finished yet"
    percent = rows[0].measure in ("exact_match", "acc")

    def number(value: float | None, signed: bool = False) -> str:
        if value is None:
            return "-"
        return f"{100 * value if percent else value:{'+' if signed else ''}.{1 if percent else 3}f}"

    def shown(rate: float | None) -> str:
        return "-" if rate is None else f"{rate:g}"

    head = ["method", "rate", "seeds", "learned", "kept", "general", "at the end", "sd", "tokens"]
    lines = [head]
    for row in sorted(rows, key=lambda row: (row.method, row.learning_rate or 0.0)):
        values = [number(row.learned), number(row.kept, True), number(row.general, True)]
        values += [number(row.end), number(row.spread), "-" if row.tokens is None else f"{row.tokens:.3g}"]
        lines.append([row.method, shown(row.learning_rate), str(row.seeds), *values])
    parts = [f"{rows[0].measure}{', %' if percent else ''}: learned P, kept BWT_GEM, general dG_i, at the end AP"]
    parts += [summary.aligned(lines)]
    best = {row.method: row for row in sorted(rows, key=lambda row: (row.learned is not None, row.learned or 0.0))}
    rates = [f"{name} {row.learning_rate:g}" for name, row in best.items() if row.learning_rate is not None]
    parts += [f"learned most at: {', '.join(rates)}"] if rates else []
    if equal := at_equal_score(rows):
        score, left = equal
        said = ", ".join(f"{name} {number(value, True)}" for name, value in left.items())
        parts += [f"general ability at equal new-task score {number(score)}: {said}"]
    if found := references(planned):
        table = [["baseline", "task", "rate", "score"]]
        table += [
            [kind, task, "-" if rate is None else f"{rate:g}", number(value)] for kind, task, rate, value in found
        ]
        parts += ["", summary.aligned(table)]
    parts += [f"failed: {name}: {why}" for name, why in failed.items()]
    return "\n".join([*parts, "", compared(planned, best)])


def compared(planned: Sequence[Planned], best: Mapping[str, Row]) -> str:
    """The methods at the rate at which each learned most, seeds pooled, with intervals over items: `cpt compare`."""
    groups: dict[str, list[Path]] = {}
    for one in planned:
        row, found = best.get(one.method), newest(one)
        if row is not None and row.learning_rate == one.learning_rate and found and outcome(one) == "done":
            groups.setdefault(one.label, []).append(found.path)
    return compare_table.text(comparison.compare(groups)) if len(groups) > 1 else ""


def folder(sweep: Sweep, planned: Sequence[Planned]) -> Path:
    """Where sweep.json and sweep.txt lie: beside the runs."""
    return planned[0].stream.output_dir / f"{sweep.name}.sweep"


def as_json(path: Path) -> dict[str, Any]:
    """sweep.json of a folder."""
    return json.loads((path / "sweep.json").read_text(encoding="utf-8"))


def to_yaml(planned: Sequence[Planned], folder: Path) -> None:
    """Each run's stream as a file, to be started by itself, e.g. on several processes."""
    (folder / "streams").mkdir(parents=True, exist_ok=True)
    for one in planned:
        target = folder / "streams" / f"{one.stream.name}.yaml"
        target.write_text(yaml.safe_dump(one.stream.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
