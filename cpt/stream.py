"""The stage loop: plan against the run directory, then train, commit, measure and commit each stage.

A kill at any moment loses nothing that was committed: a stage goes on from its newest checkpoint or starts
again from its parent, and an evaluation is measured again without training.
"""

import gc
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpt.checkpoints import write_json
from cpt.config import Stage, Stream
from cpt.data.overlap import overlap
from cpt.data.sources import Loaded, load, load_all
from cpt.data.spec import Source
from cpt.disk import readable_disk_errors, require_space
from cpt.errors import ConfigError, DataError, RunDirError
from cpt.evaluation import Plan, evaluate
from cpt.matrix import matrix
from cpt.methods.base import Method, StageInfo
from cpt.models import base_folder, base_identity, base_tokenizer, open_model, save_model
from cpt.quiet import quiet
from cpt.run_dir import Run, StageDir, digest
from cpt.seeds import stage_seed
from cpt.signals import StopRequest, stop_requests

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
    "save_steps",
    "save_total_limit",
    "dataloader_num_workers",
    "dataloader_pin_memory",
}

Say = Callable[[str], None]


@dataclass
class Planned:
    """A stage with everything its identity depends on, and what the run directory holds of it."""

    index: int
    name: str
    identity: str
    folder: StageDir
    seed: int = 0
    stage: Stage | None = None
    rows: Loaded | None = None
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether the stage happened, as this identity (the base happens by being there)."""
        record = self.folder.record()
        if record is None or record["identity"] != self.identity:
            return False
        return self.stage is None or self.folder.done() is not None


def run(
    stream: Stream,
    *,
    new: bool = False,
    run_dir: str | os.PathLike[str] | None = None,
    say: Say = print,
) -> Run:
    """Run a stream to its end, or go on with the newest run of its name as far as identities agree.

    new: start another run directory. run_dir: go on in this one. say: receives progress, a line at a time.
    Returns the Run. Raises ConfigError and DataError before anything is trained, RunDirError for a directory
    of another stream, TrainingError, and Stopped when a signal asked for it (the same call goes on later).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("this version runs a stream in one process: start it without a multi-process launcher")
    with quiet(), stop_requests() as stop, readable_disk_errors(stream.output_dir):
        return _run(stream, new, run_dir, say, stop)


def measure_again(run: Run, stream: Stream, say: Say = print) -> None:
    """Measure a run's finished stages by the stream's evaluation plan; trains nothing.

    Raises RunDirError when the stream's stages are not the run's.
    """
    with quiet(), stop_requests() as stop, readable_disk_errors(run.path):
        _run(stream, False, run.path, say, stop, train=False)


def _run(stream: Stream, new: bool, run_dir: Any, say: Say, stop: StopRequest, train: bool = True) -> Run:
    tokenizer = base_tokenizer(stream)
    rows = _read_everything(stream)
    plan = _evaluation_plan(stream, tokenizer)
    overlaps = _check_overlap(stream, rows, plan, say)
    identities = _identities(stream, rows)
    run = _open(stream, identities[0], new, run_dir, say)
    with run.lock():
        planned = _planned(stream, run, identities, rows, overlaps)
        if train:
            _check_ahead(stream, planned, tokenizer)
            _supersede(run, planned, say)
        else:
            planned = _finished_only(run, planned)
        _atomic_text(run.path / "stream.yaml", stream.to_yaml())
        for here, parent in zip(planned, [None, *planned[:-1]], strict=True):
            if not here.finished:
                _make(stream, here, parent, planned, tokenizer, say, stop)
            if stop():
                raise stop.error(f"after stage {here.name!r} was finished")
            model = here.folder.model if here.stage else base_folder(stream.model)
            evaluate(plan, here.folder, model, here.identity, stream, tokenizer, say, stop)
            write_json(run.path / "matrix.json", matrix(stream, run, [p.folder for p in planned[: here.index + 1]]))
            _retain(stream, planned, here)
    say(f"done: {run.path}")
    return run


def _read_everything(stream: Stream) -> list[Loaded]:
    """Rows of every stage, read before anything is trained, with every stage's problems at once."""
    rows, problems = [], []
    for i, stage in enumerate(stream.stages):
        try:
            seed = stage_seed(stream.seed, i + 1, stage.name)
            rows.append(load_all(stage.data, stream.data_root, f"stages.{i}.data", seed))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(*problems)
    return rows


def _evaluation_plan(stream: Stream, tokenizer: Any) -> Plan:
    problems, sets = [], {}
    for name, (group, source) in stream.eval_sources().items():
        place = f"evaluation.general.{name}" if group == "general" else f"stages.{name}.test"
        try:
            sets[name] = (group, source, load(source, stream.data_root, place, stream.seed))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(*problems)
    return Plan.of(sets, stream.evaluation, tokenizer)


def _check_overlap(stream: Stream, rows: list[Loaded], plan: Plan, say: Say) -> dict[str, dict[str, int]]:
    """Test rows that stand in training rows: counted, said, and refused when the user wants that."""
    found = {
        stage.name: {name: n for name, loaded in plan.rows().items() if (n := overlap(loaded, train.rows))}
        for stage, train in zip(stream.stages, rows, strict=True)
    }
    lines = [
        f"{n} of {len(plan.rows()[name])} test rows of {name!r} also stand in the training rows of {stage!r}"
        for stage, counts in found.items()
        for name, n in counts.items()
    ]
    if lines and stream.evaluation.refuse_overlap:
        raise DataError(*(f"{line} (evaluation.refuse_overlap is on)" for line in lines))
    for line in lines:
        say(f"note: {line}")
    return found


def _identities(stream: Stream, rows: list[Loaded]) -> list[str]:
    """Each stage's identity: hash of parent, resolved stage, data and seed; the base's of its files."""
    chain = [digest(base_identity(stream))]
    for i, (stage, loaded) in enumerate(zip(stream.stages, rows, strict=True), start=1):
        training = {k: v for k, v in stream.training_of(stage).items() if k not in _WATCHING}
        content = {
            "parent": chain[-1],
            "stage": stage.model_dump(mode="json", exclude={"test", "training", "data"}),
            "training": training,
            "prompt": stream.evaluation.prompt,
            "data": loaded.fingerprint,
            "method_data": _method_fingerprints(stream, stage, i),
            "seed": stage_seed(stream.seed, i, stage.name),
        }
        chain.append(digest(content))
    return chain


def _method_fingerprints(stream: Stream, stage: Stage, index: int) -> list[str]:
    """Fingerprints of the sources that methods name in their fields."""
    sources = _method_sources(stage, index)
    return [load_all(value, stream.data_root, place).fingerprint for place, value in sources]


def _method_sources(stage: Stage, index: int) -> Iterator[tuple[str, list[Source]]]:
    """The sources that methods name in their fields, each list with its place."""
    for j, method in enumerate(stage.methods):
        for key in type(method).model_fields:
            value = getattr(method, key)
            if isinstance(value, list) and value and all(isinstance(item, Source) for item in value):
                yield f"stages.{index - 1}.methods.{j}.{key}", value


def _check_ahead(stream: Stream, planned: list[Planned], tokenizer: Any) -> None:
    """What would show only when a later stage begins, shown before the first one trains: TRL's view of the
    arguments, and one row of each form through the tokenizer. Raises ConfigError or DataError."""
    for here in planned:
        if here.stage is None or here.rows is None or here.finished:
            continue
        from cpt.data.tokens import check_rendering
        from cpt.trainers.sft import sft_config, token_settings

        place, training = f"stages.{here.index - 1}", stream.training_of(here.stage)
        try:
            sft_config(training, here.folder.checkpoints, here.seed)
        except ConfigError as error:
            raise ConfigError(*(f"{place}.{problem}" for problem in error.problems)) from error
        settings = token_settings(training, stream.evaluation.prompt)
        check_rendering(here.rows.rows, tokenizer, settings, f"{place}.data")
        for where, sources in _method_sources(here.stage, here.index):
            check_rendering(load_all(sources, stream.data_root, where).rows, tokenizer, settings, where)


def _open(stream: Stream, base: str, new: bool, run_dir: Any, say: Say) -> Run:
    if run_dir is not None:
        run = Run.open(run_dir)
        if run.name != stream.name:
            raise RunDirError(
                f"{run.path} is a run of stream {run.name!r}, not of {stream.name!r}: leave --run out, or use "
                f"name={run.name}"
            )
        record = run.stage(0, "base").record()
        if record and record["identity"] != base:
            raise RunDirError(f"{run.path} was made from another base model or tokenizer: use --new")
        return run
    found = None if new else Run.newest(stream.output_dir, stream.name)
    if found is not None:
        record = found.stage(0, "base").record()
        if record is None or record["identity"] == base:
            return found
        say(f"{found.path} was made from another base model or tokenizer: starting a new run")
    return Run.create(stream.output_dir, stream.name, digest(stream.model_dump(mode="json")))


def _planned(
    stream: Stream, run: Run, identities: list[str], rows: list[Loaded], overlaps: dict[str, dict[str, int]]
) -> list[Planned]:
    base = Planned(0, "base", identities[0], run.stage(0, "base"))
    base.record = {"identity": base.identity, "name": "base", "model": stream.model.path}
    planned = [base]
    for i, stage in enumerate(stream.stages, start=1):
        here = Planned(i, stage.name, identities[i], run.stage(i, stage.name))
        here.seed, here.stage, here.rows = stage_seed(stream.seed, i, stage.name), stage, rows[i - 1]
        here.record = {
            "identity": here.identity,
            "parent": identities[i - 1],
            "name": stage.name,
            "kind": stage.kind,
            "seed": here.seed,
            "stage": stage.model_dump(mode="json"),
            "training": stream.training_of(stage),
            "data": {
                "label": rows[i - 1].label,
                "rows": len(rows[i - 1].rows),
                "sha256": rows[i - 1].fingerprint,
            },
            "overlap": overlaps[stage.name],
        }
        planned.append(here)
    return planned


def _supersede(run: Run, planned: list[Planned], say: Say) -> None:
    """Rename what the stream no longer contains, and say what is kept, redone and added."""
    wanted = {here.folder.path: here for here in planned}
    redone = set()
    for folder in run.stages():
        here = wanted.get(folder.path)
        record = folder.record()
        if here is None or (record is not None and record["identity"] != here.identity):
            target = run.supersede(folder)
            redone |= {here.name} if here else set()
            say(f"{folder.path.name} belongs to another version of the stream: kept as {target.name}")
    said = {True: "kept", False: "to do"}
    lines = [f"{p.name} {'redo' if p.name in redone else said[p.finished]}" for p in planned if p.stage]
    say(f"run {run.path}")
    if planned[1:] and all(p.finished for p in planned):
        say(f"every stage is finished: {', '.join(p.name for p in planned[1:])}; nothing to train")
    elif lines:
        say(f"stages: {', '.join(lines)}")


def _finished_only(run: Run, planned: list[Planned]) -> list[Planned]:
    for here in planned:
        record = here.folder.record()
        if record is not None and record["identity"] != here.identity:
            raise RunDirError(
                f"{here.folder.path}: was trained by another version of the stream, so its scores would not be "
                "this stream's. Change only the evaluation plan, or train again with `cpt run`."
            )
    return [here for here in planned if here.finished]


def _make(
    stream: Stream,
    here: Planned,
    parent: Planned | None,
    planned: list[Planned],
    tokenizer: Any,
    say: Say,
    stop: Any,
) -> None:
    """Train a stage and commit it; the base only needs its record."""
    here.folder.begin(here.record)
    if here.stage is None or parent is None:
        return
    if stop():
        raise stop.error(f"before stage {here.name!r}")
    if parent.stage:
        parent.folder.verify_model()
    _check_space(stream, run_path=here.folder.path.parent, stage=here)
    start = parent.folder.model if parent.stage else base_folder(stream.model)
    say(f"[{here.index}/{len(stream.stages)}] {here.name}: {here.stage.kind} from {parent.name}")
    began = time.perf_counter()
    trained = _train(stream, here, planned, start, tokenizer, say, stop)
    if trained.stopped:
        raise stop.error(f"in stage {here.name!r}, with a checkpoint written")
    facts = trained.facts | {"seconds": round(time.perf_counter() - began, 3), "peak_gib": _peak_gib()}
    here.folder.commit(
        here.identity,
        facts,
        lambda folder: save_model(trained.model, tokenizer, folder),
        stream.retention.checkpoints,
    )
    _say_facts(here, facts, say)


def _check_space(stream: Stream, run_path: Path, stage: Planned) -> None:
    """A stage writes its model once, and per checkpoint the model and two moments of optimizer state."""
    weights = sum(file.stat().st_size for file in base_folder(stream.model).glob("*.safetensors"))
    kept = int(stream.training_of(stage.stage).get("save_total_limit") or 2) if stage.stage else 0
    require_space(run_path, weights * (1 + 3 * (kept + 1)), f"stage {stage.name!r}")


def _train(
    stream: Stream, here: Planned, planned: list[Planned], start: Path, tokenizer: Any, say: Say, stop: Any
) -> Any:
    from cpt.data.stage_data import TASK, StageData
    from cpt.data.tokens import tokenise
    from cpt.trainers.sft import token_settings, train

    assert here.stage is not None
    assert here.rows is not None
    training = stream.training_of(here.stage)
    settings = token_settings(training, stream.evaluation.prompt)

    def load_tokens(sources: Any, place: str) -> Any:
        return tokenise(load_all(sources, stream.data_root, place, here.seed).rows, tokenizer, settings, place)

    info = StageInfo(
        index=here.index,
        name=here.name,
        kind=here.stage.kind,
        seed=here.seed,
        batch_rows=stream.batch_rows(here.stage),
        earlier=tuple((p.name, tuple(p.stage.data)) for p in planned[: here.index] if p.stage),
    )
    data = StageData(load_tokens)
    data.sources[TASK] = tokenise(here.rows.rows, tokenizer, settings, f"stages.{here.index - 1}.data")
    methods = fresh_methods(here.stage)
    for method in methods:
        method.prepare_data(data, info)
    counts = {name: rows.counts for name, rows in data.sources.items()}
    _say_counts(counts, say)
    model = open_model(start, stream.model)
    trained = train(model, tokenizer, data, info, methods, training, here.folder.path, stop, _progress(here, say))
    trained.facts["rows"] = counts
    for method in methods:
        method.finish_stage(trained.model, info)
    return trained


def fresh_methods(stage: Stage) -> list[Method]:
    """New instances of a stage's active methods: the configured ones never hold state."""
    return [type(method).model_validate(method.model_dump()) for method in stage.methods if method.active]


def _say_counts(counts: dict[str, dict[str, int]], say: Say) -> None:
    for name, found in counts.items():
        for kind, text in (
            ("dropped_without_target", "rows have no answer left within max_length and are left out"),
            ("truncated", "rows are cut at max_length"),
            ("lost_characters", "characters do not survive the tokenizer"),
        ):
            if found.get(kind):
                say(f"  warning: {name}: {found[kind]} {text} ({found['rows']} rows)")


def _say_facts(here: Planned, facts: dict[str, Any], say: Say) -> None:
    share = facts["trained_parameters"] / facts["parameters"]
    rate = facts["tokens"] / max(facts["train_seconds"], 1e-9)
    trained = f"{facts['steps']} steps, {share:.0%} of {facts['parameters']:,} parameters"
    say(f"  {here.name}: {trained}, {facts['train_seconds']:.1f} s, {rate:,.0f} tokens/s")
    for method, found in facts["methods"].items():
        if "note" in found:
            say(f"  {method}: {found['note']}")


def _progress(here: Planned, say: Say) -> Callable[[dict[str, Any]], None]:
    """About five lines a stage: step, loss, learning rate."""
    seen = {"next": 0.0}

    def show(line: dict[str, Any]) -> None:
        if "loss" not in line or line.get("epoch", 1.0) < seen["next"]:
            return
        seen["next"] = line["epoch"] + 0.2
        say(f"  {line['epoch']:4.0%}  step {line['step']}  loss {line['loss']:.4f}")

    return show


def _retain(stream: Stream, planned: list[Planned], here: Planned) -> None:
    """With retention.models = last, the parent's weights go once this stage and its scores are committed."""
    if stream.retention.models == "last" and here.index > 1:
        import shutil

        shutil.rmtree(planned[here.index - 1].folder.model, ignore_errors=True)


def _atomic_text(file: Path, text: str) -> None:
    aside = file.with_name(f".{file.name}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)


def _peak_gib() -> float:
    """Peak memory of this process so far: the device's where there is one, else resident."""
    import resource

    import torch

    gc.collect()
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
