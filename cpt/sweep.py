"""A sweep: one stream under several methods, learning rates and seeds, with its baselines, at equal budget, compared.

Every run is an ordinary stream in an ordinary run directory, so a sweep that was stopped goes on, and one run of it can
be looked at, or made elsewhere, by itself. Budgets are equal by construction in rows and optimizer steps: every stage
has `max_steps`, and replayed rows take the place of task rows in a batch of one size. Tokens follow from the rows, and
are shown. Methods are compared at equal new-task score, by curves over the learning rate: one that learned less has
forgotten less for that reason alone.
"""

import copy
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from cpt.config import GENERATING, Stage, Stream, read_raw, refuse_sweep
from cpt.data.spec import Name, Strict, refuse
from cpt.errors import ConfigError, RunDirError
from cpt.explain import every_problem
from cpt.report import summary
from cpt.run_dir import Run
from cpt.validate import problems

Outcome = Literal["done", "to do"]

PLAIN = "sequential"  # the stream without methods
REPLAYED = "sequential_replay"
REPLAY = {"type": "replay", "ratio": 0.25, "earlier": "all"}
ALONE = "specialist_"  # begins the name of a stage that is trained alone
PACE = ("max_steps", "save_steps", "logging_steps")  # in what else must stages agree to be trained as one


class Over(Strict):
    """What varies: every combination is a run."""

    methods: dict[Name, list[Any]] = Field(
        {}, description="name: a list of methods to put on every stage; none given: the stream's own"
    )
    learning_rate: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        [], description="of every stage; none given: the stream's own"
    )
    seed: list[Annotated[int, Field(ge=0)]] = Field([], description="of the stream; none given: the stream's own")


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
        known = (PLAIN, REPLAYED, "joint", "specialist", "own")
        taken = [name for name in self.over.methods if name in known or name.startswith(ALONE)]
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
        if "stream" not in raw and raw.keys() & {"model", "stages"}:
            raise ConfigError(f"{path}: is a stream, one run: cpt run {path}. A sweep names it under `stream:`.")
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
    refuse_sweep(raw, sweep.stream)
    base = Stream.parse(copy.deepcopy(raw))
    if not base.stages:
        raise ConfigError("stages: none: there is nothing to compare")
    rates: Sequence[float | None] = sweep.over.learning_rate or [None]
    seeds: Sequence[int | None] = sweep.over.seed or [None]
    found = dict.fromkeys([*_budget_problems(base), *(_drawn_problems(base) if len(seeds) > 1 else [])])
    planned: list[Planned] = []
    for (method, change), rate, seed in itertools.product(_variants(sweep, base), rates, seeds):
        named = [method, *([] if rate is None else [_plain(rate)])]
        parts = [sweep.name, *named, *([] if seed is None else [f"s{seed}"])]
        name = "-".join(parts)
        if any(one.stream.name == name for one in planned):
            found[f"over.learning_rate: two rates have one name, {named[-1]}: leave one out"] = None
            continue
        try:
            made = change(copy.deepcopy(raw)) | {"name": name} | ({} if seed is None else {"seed": seed})
            stream = Stream.parse(made if rate is None else _at_rate(made, rate))
            if (rate, seed) == (rates[0], seeds[0]):  # the others read the same rows
                found |= dict.fromkeys(problems(stream))
        except ConfigError as error:
            found |= dict.fromkeys(f"{method}: {problem}" for problem in error.problems)
            continue
        alone = method.removeprefix(ALONE) if method.startswith(ALONE) else None
        planned.append(Planned("-".join(named), method, rate, seed, stream, alone))
    if found:
        raise ConfigError(*found)
    return planned


def _at_rate(made: dict[str, Any], rate: float) -> dict[str, Any]:
    for part in [made.setdefault("training", {}), *(stage.get("training") or {} for stage in made["stages"])]:
        part.pop("learning_rate", None)
    made["training"]["learning_rate"] = rate
    return made


def _budget_problems(stream: Stream) -> Iterator[str]:
    for i, stage in enumerate(stream.stages):
        if stream.training_of(stage).get("max_steps", -1) <= 0:
            yield (
                f"stages.{i}.training.max_steps: a sweep compares at equal budget: give every stage its optimizer "
                "steps, for replayed rows make an epoch longer"
            )


def _drawn_problems(stream: Stream) -> Iterator[str]:
    """Seeds would be measured on other rows each: neither their spread nor a comparison would be of the seeds."""
    places = {stage.name: f"stages.{i}.test" for i, stage in enumerate(stream.stages)}
    for name, (_, source) in stream.eval_sources().items():
        place = places.get(name, f"evaluation.general.{name}")
        for where, rows in ((place, source), (f"{place}.fewshot", source.fewshot)):
            if rows is not None and rows.shuffle and rows.limit is not None:
                yield (
                    f"{where}.shuffle: the stream's seed draws these rows, so every seed would be measured on others: "
                    "leave it out, the first rows are taken then"
                )


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
        found.append(("joint", partial(_joint, base=base, swept=bool(sweep.over.learning_rate))))
    if "specialist" in sweep.baselines:
        for i, stage in enumerate(base.stages):
            found.append((f"{ALONE}{stage.name}", partial(_specialist, number=i)))
    return found


def _with_methods(raw: dict[str, Any], methods: Sequence[Any]) -> dict[str, Any]:
    for stage in raw["stages"]:
        stage["methods"] = copy.deepcopy(list(methods))
    return raw


def _replayed(raw: dict[str, Any]) -> dict[str, Any]:
    """Earlier stages' rows as a share of the tokens; in a stage whose tokens nobody knows, of the rows."""
    for stage in raw["stages"]:
        stage["methods"] = [REPLAY | ({} if stage.get("kind") in GENERATING else {"by": "tokens"})]
    return raw


def _specialist(raw: dict[str, Any], number: int) -> dict[str, Any]:
    """One stage, from the base; of the sets that are scored while it trains, those that it still has."""
    raw["stages"] = [stage] = [_with_methods(raw, [])["stages"][number]]
    evaluation = raw.get("evaluation") or {}
    within = evaluation.get("within")
    if isinstance(within, dict) and within.get("sets"):
        kept = [name for name in within["sets"] if name in {stage["name"], *evaluation.get("general", {})}]
        evaluation["within"] = within | {"sets": kept} if kept else "off"
    return raw


def _joint(raw: dict[str, Any], base: Stream, swept: bool) -> dict[str, Any]:
    """One stage over the rows of all, each stage's in proportion to its steps; every task is measured.

    swept: learning rates vary, so those of the stages are not used. Raises ConfigError where no one stage can stand
    for all.
    """
    if unlike := list(_unlike(base, swept)):
        raise ConfigError(*(f"baselines: joint trains all rows in one stage: {why}" for why in unlike))
    steps = [max(1, base.training_of(stage).get("max_steps", 1)) for stage in base.stages]
    data = []
    for one, taken in zip(base.stages, steps, strict=True):
        weights = [source.weight or source.count or 1.0 for source in one.data]
        for source, weight in zip(one.data, weights, strict=True):
            given = source.model_dump(mode="json", exclude_defaults=True)
            given.pop("count", None)
            share = weight / sum(weights) * (taken * len(steps) / sum(steps))
            data.append(given | {"weight": share, "name": source.name or one.name})
    names = [given["name"] for given in data]
    for i, given in enumerate(data):  # two sources of one stage
        given["name"] = f"{given['name']}_{i}" if names.count(given["name"]) > 1 else given["name"]
    general = raw.setdefault("evaluation", {}).setdefault("general", {})
    general |= {stage["name"]: stage["test"] for stage in raw["stages"] if stage.get("test")}
    first = base.stages[0]
    stage: dict[str, Any] = {"name": "joint", "kind": first.kind, "data": data}
    stage |= {"training": base.training_of(first) | {"max_steps": sum(steps)}}
    stage |= {"schedule": first.schedule.model_dump(mode="json")} if first.schedule else {}
    raw["stages"] = [stage]
    return raw


def _unlike(stream: Stream, swept: bool) -> Iterator[str]:
    """In what stages differ that one stage over the rows of all cannot do."""
    first, *others = stream.stages
    if {stage.kind for stage in stream.stages} not in ({"sft"}, {"pretrain"}) or any(s.adapter for s in stream.stages):
        yield "it needs sft, or pretrain, and no adapters"
    ignored = {*PACE, "learning_rate"} if swept else {*PACE}
    mine = _settings(stream, first, ignored)
    for stage in others:
        theirs = _settings(stream, stage, ignored)
        keys = [key for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)]
        if keys:
            yield f"{first.name} and {stage.name} differ in {', '.join(keys)}"
    for i, stage in enumerate(stream.stages):
        given = {(source.weight is None, source.count is None) for source in stage.data}
        if len(stage.data) > 1 and given not in ({(False, True)}, {(True, False)}):
            yield f"stages.{i}.data needs a weight for each of its sources, to keep their shares there"


def _settings(stream: Stream, stage: Stage, ignored: Collection[str]) -> dict[str, Any]:
    training = {f"training.{key}": value for key, value in stream.training_of(stage).items() if key not in ignored}
    return training | {"schedule": stage.schedule}


def _plain(value: float) -> str:
    """A learning rate as names allow it: 0.001 is lr1e-3."""
    mantissa, _, exponent = f"{value:e}".partition("e")
    digits = mantissa.rstrip("0").rstrip(".").replace(".", "_")
    return f"lr{digits}e{int(exponent)}"


# ---- in files ----------------------------------------------------------------------------------------


def outcome(one: Planned) -> Outcome:
    """Whether a run has every stage trained and measured, by its files."""
    return "to do" if done(one) is None else "done"


def done(one: Planned) -> Path | None:
    """Its run directory, once every stage is trained and measured and the matrix holds them all; else None.

    A damaged file makes a run one that is to do: running it says what is wrong, or mends it.
    """
    found, stages = newest(one), len(one.stream.stages) + 1
    if found is None:
        return None
    try:
        base, *later = found.stages() or [found.stage(0, "base")]
        over = [base, *(stage for stage in later if stage.done())]
        plans = [measured["plan"] for stage in over if (measured := stage.eval_done())]
        whole = len(plans) == stages == len(summary.read(found.path)["rows"]) and len(set(plans)) == 1
    except RunDirError:
        return None
    return found.path if whole and _is_of(found, one.stream) else None


def _is_of(found: Run, stream: Stream) -> bool:
    """Whether a run was made from the stream as it is now: another version's scores are of other settings."""
    file = found.path / "stream.yaml"
    return file.is_file() and file.read_text(encoding="utf-8") == stream.to_yaml()


def newest(one: Planned) -> Run | None:
    """Its run directory, if there is one that can be read."""
    try:
        return Run.newest(one.stream.output_dir, one.stream.name)
    except RunDirError:
        return None


@dataclass(frozen=True)
class Tokens:
    """That a run trained on. is_counted: False where some were estimated; then they are shown with a ~."""

    number: float
    is_counted: bool

    def __str__(self) -> str:
        return f"{'' if self.is_counted else '~'}{self.number:.3g}"


def tokens(run: Path) -> Tokens:
    """Of all stages of a run.

    An sft or pretrain stage that went on from a checkpoint has counted those of its last launch: the steps before it
    are taken to have had as many each.
    """
    number, is_counted = 0.0, True
    for stage in Run(run).stages()[1:]:
        facts = (stage.done() or {"facts": {}})["facts"]
        counted, before = facts.get("tokens") or 0, re.fullmatch(r"checkpoint-(\d+)", facts.get("resumed_from") or "")
        if before and (stage.record() or {}).get("kind") not in GENERATING:
            counted *= facts["steps"] / max(1, facts["steps"] - int(before[1]))
            is_counted = False
        number += counted
    return Tokens(number, is_counted)


def listed(planned: Sequence[Planned]) -> str:
    """A line a run: whether it is done."""
    return summary.aligned([["run", "state"], *([one.stream.name, outcome(one)] for one in planned)], left=True)


def folder(sweep: Sweep, planned: Sequence[Planned]) -> Path:
    """Where sweep.json and sweep.txt lie: beside the runs."""
    return planned[0].stream.output_dir / f"{sweep.name}.sweep"


def to_yaml(planned: Sequence[Planned], folder: Path) -> None:
    """Each run's stream as a file, to be started by itself, e.g. on several processes; those of no run are removed."""
    wanted = {file_of(folder, one): one for one in planned}
    (folder / "streams").mkdir(parents=True, exist_ok=True)
    for stale in set((folder / "streams").glob("*.yaml")) - wanted.keys():
        stale.unlink()
    for file, one in wanted.items():
        file.write_text(one.stream.to_yaml(), encoding="utf-8")


def file_of(folder: Path, one: Planned) -> Path:
    """Where a run's stream lies, to be started by itself."""
    return folder / "streams" / f"{one.stream.name}.yaml"
