"""Everything a stream stands on, read, checked and identified before anything is trained."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cpt.config import BATCH_DEFAULTS, EvalSource, Group, Stage, Stream, source_fields
from cpt.data.overlap import overlap
from cpt.data.sources import Loaded, load, load_all, wrong_kind
from cpt.drift import DriftPlan
from cpt.errors import CptError, DataError
from cpt.evaluation import Plan
from cpt.models import base_identity, base_tokenizer
from cpt.rewards.spec import identity
from cpt.run_dir import digest
from cpt.seeds import stage_seed
from eval_harness.rows import content_key

Say = Callable[[str], None]

# Arguments that change how training is watched, not what comes out of it: they are no part of an identity.
_WATCHING = {
    "logging_steps",
    "logging_first_step",
    "logging_strategy",
    "report_to",
    "run_name",
    "project",
    "disable_tqdm",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    "trackio_space_id",
    "trackio_bucket_id",
    "trackio_static_space_id",
    "skip_memory_metrics",
    "include_num_input_tokens_seen",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "save_steps",
    "save_total_limit",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "log_completions",
    "num_completions_to_print",
    "log_unique_prompts",
}


@dataclass(frozen=True)
class StageInputs:
    """One stage's rows, the rows its methods name (place -> rows), its seed and its identity."""

    stage: Stage
    rows: Loaded
    method_rows: dict[str, Loaded]
    seed: int
    identity: str
    overlap: dict[str, int]


@dataclass(frozen=True)
class Inputs:
    """The tokenizer, what is measured, the base's identity and every stage's inputs, in order."""

    tokenizer: Any
    evaluation: Plan
    base: str
    stages: list[StageInputs]


def read_inputs(stream: Stream, say: Say) -> Inputs:
    """Read all rows, count test rows that stand in training rows, and identify every stage.

    A stage's identity is the hash of its parent's, its resolved configuration, its rows and its seed; what is
    measured and how training is watched are no part of it. Raises DataError with every problem of the rows, or
    for an overlap where `evaluation.refuse_overlap` is on.
    """
    problems: list[str] = []
    read, sets = _read_stages(stream, problems), _read_sets(stream, problems)
    watched = _read_drift(stream, problems)
    try:
        tokenizer = base_tokenizer(stream)
    except CptError as error:
        problems += error.problems
    problems += _learned_again(stream, read)
    if problems:
        raise DataError(*problems)
    plan = Plan.of(sets, stream.evaluation, tokenizer)
    # What a stage trains on, the rows its methods name included.
    trained = ([row for part in (rows, *methods.values()) for row in part.rows] for rows, methods in read)
    overlaps = [overlap(plan.rows(), rows) for rows in trained]
    _say_overlap(stream, plan, overlaps, say)
    base = parent = digest(base_identity(stream))
    if stream.evaluation.drift and watched:
        plan = replace(plan, drift=DriftPlan.of(stream.evaluation.drift, watched, stream, base, tokenizer))
    stages = []
    for i, (stage, (rows, methods)) in enumerate(zip(stream.stages, read, strict=True), start=1):
        seed = stage_seed(stream.seed, i, stage.name)
        parent = _identity(stream, stage, parent, rows, methods, seed)
        stages.append(StageInputs(stage, rows, methods, seed, parent, overlaps[i - 1]))
    return Inputs(tokenizer, plan, base, stages)


def _read_stages(stream: Stream, problems: list[str]) -> list[tuple[Loaded, dict[str, Loaded]]]:
    """Every stage's rows and those its methods name; what is wrong is added to `problems`."""
    found = []
    for i, stage in enumerate(stream.stages):
        seed = stage_seed(stream.seed, i + 1, stage.name)
        try:
            rows = load_all(stage.data, stream.data_root, f"stages.{i}.data", seed)
            problems += wrong_kind(stage.kind, rows, f"stages.{i}.data")
            named = {f"stages.{i}.{key}": part for key, part in stage.method_sources().items()}
            beside = {key: load_all(part, stream.data_root, key, seed) for key, part in named.items()}
            if kept := beside.get(f"stages.{i}.retain"):
                problems += _both(rows, kept, f"stages.{i}.retain")
            found.append((rows, beside))
        except DataError as error:
            problems += error.problems
    return found


def forgotten(stages: Iterable[tuple[Stage, Loaded]]) -> set[str]:
    """Keys of the rows that unlearn stages among these are to forget."""
    return {content_key(row) for stage, rows in stages if stage.kind == "unlearn" for row in rows.rows}


def _learned_again(stream: Stream, read: list[tuple[Loaded, dict[str, Loaded]]]) -> list[str]:
    """Rows that a stage would learn although one before it forgot them."""
    if len(read) < len(stream.stages):  # some could not be read: that is said first
        return []
    problems = []
    for i, (stage, (rows, beside)) in enumerate(zip(stream.stages, read, strict=True)):
        gone = forgotten((one, part) for one, (part, _) in zip(stream.stages[:i], read, strict=False))
        learned = beside if stage.kind == "unlearn" else {f"stages.{i}.data": rows, **beside}
        for place, part in learned.items() if gone else ():
            if same := [row.id for row in part.rows if content_key(row) in gone]:
                problems.append(
                    f"{place}: {len(same)} rows are forgotten by a stage before it ({', '.join(same[:3])}) and would "
                    "be learned again: take them out"
                )
    return problems


def _both(forget: Loaded, retain: Loaded, place: str) -> list[str]:
    """Rows that are to be forgotten and to be kept."""
    ids = {row.id for row in forget.rows}
    if not (same := [row.id for row in retain.rows if row.id in ids]):
        return []
    return [
        f"{place}: {len(same)} rows are among those to forget as well ({', '.join(same[:3])}): take them out of one"
    ]


def _read_sets(stream: Stream, problems: list[str]) -> dict[str, tuple[Group, EvalSource, Loaded, Loaded | None]]:
    """Everything that is measured, by name; what is wrong is added to `problems`."""
    sets = {}
    for name, (group, source) in stream.eval_sources().items():
        place = f"evaluation.general.{name}" if group == "general" else f"stages.{name}.test"
        try:
            rows = load(source, stream.data_root, place, stream.seed)
            shots = None
            if source.fewshot is not None:
                shots = load(source.fewshot, stream.data_root, f"{place}.fewshot", stream.seed)
            sets[name] = (group, source, rows, shots)
        except DataError as error:
            problems += error.problems
    return sets


def _read_drift(stream: Stream, problems: list[str]) -> Loaded | None:
    """The rows on which stages are compared with the base; what is wrong is added to `problems`."""
    if stream.evaluation.drift is None:
        return None
    try:
        return load(stream.evaluation.drift, stream.data_root, "evaluation.drift", stream.seed)
    except DataError as error:
        problems += error.problems
    return None


def _say_overlap(stream: Stream, plan: Plan, overlaps: list[dict[str, int]], say: Say) -> None:
    lines = []
    for name, rows in plan.rows().items():
        where = {stage.name: found[name] for stage, found in zip(stream.stages, overlaps, strict=True) if name in found}
        if where:
            most, names = max(where.values()), ", ".join(where)
            lines.append(f"{most} of {len(rows)} test rows of {name!r} also stand in training rows ({names})")
    if lines and stream.evaluation.refuse_overlap:
        raise DataError(*(f"{line}; evaluation.refuse_overlap is on" for line in lines))
    for line in lines:
        say(f"note: {line}")


def _content(value: Any) -> Any:
    """What an argument stands for: of a path to a JSON file (DeepSpeed's settings), what stands there."""
    if isinstance(value, str) and value.endswith(".json") and Path(value).is_file():
        return json.loads(Path(value).read_text(encoding="utf-8"))
    return value


def _identity(stream: Stream, stage: Stage, parent: str, rows: Loaded, methods: dict[str, Loaded], seed: int) -> str:
    # Rows stand in it by their hash, whatever file they came from; a method that is absent does not stand in it.
    methods_as_set = [m.model_dump(mode="json", exclude=set(source_fields(m))) for m in stage.methods if m.active]
    content = {
        "parent": parent,
        "stage": [stage.name, stage.kind, methods_as_set],
        "training": {
            key: _content(value)
            for key, value in (BATCH_DEFAULTS | stream.training_of(stage)).items()
            if key not in _WATCHING
        },
        "chat_template": stream.evaluation.chat_template,
        "data": rows.fingerprint,
        "method_data": [part.fingerprint for part in methods.values()],
        "seed": seed,
    }
    if stage.kind == "rft":
        content["rewards"] = [
            identity(reward, f"stages.{stream.stages.index(stage)}.rewards.{i}")
            for i, reward in enumerate(stage.rewards)
        ]
        content["kl"] = stage.kl.model_dump() if stage.kl.to != "off" else None
    if stage.kind == "unlearn":
        content["template"] = stage.template.texts, stage.template.redraw
        content["retain_ratio"] = stage.retain_ratio if stage.retain else None
    if stage.schedule is not None:
        content["schedule"] = stage.schedule.model_dump(mode="json")
    if stage.adapter is not None:
        content["adapter"] = stage.adapter.model_dump(mode="json")
    return digest(content)
