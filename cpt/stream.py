"""The stage loop: plan against the run directory, then train, commit, measure and commit each stage.

A kill at any moment loses nothing that was committed: a stage goes on from its newest checkpoint or starts
again from its parent, and an evaluation is measured again without training.
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from cpt.checkpoints import verify_sealed, write_json, write_text
from cpt.config import Stage, Stream
from cpt.disk import readable_disk_errors, require_space
from cpt.errors import RunDirError
from cpt.evaluation import evaluate
from cpt.inputs import Inputs, Say, StageInputs, read_inputs
from cpt.ledger import stages as requests
from cpt.matrix import matrix
from cpt.models import adapter_note, base_folder, lineage, needs_weights_of, save_model
from cpt.processes import Processes, readable_rank_errors, start
from cpt.quiet import quiet
from cpt.report.changes import changes
from cpt.run_dir import Run, StageDir, digest
from cpt.schedule import STATE, goes_on
from cpt.signals import StopRequest, stop_requests
from cpt.stability_gap import FILE as CURVE
from cpt.terminal import speaking
from cpt.train_stage import check_ahead, gathered, release, say_facts, train_stage


@dataclass
class Planned:
    """A stage (or the base, which has none), who it is, and what the run directory holds of it."""

    index: int
    name: str
    identity: str
    folder: StageDir
    stage: Stage | None = None
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether the stage happened, as this identity (the base happens by being there)."""
        record = self.folder.record()
        if record is None or record["identity"] != self.identity:
            return False
        return self.stage is None or self.folder.done() is not None

    def model(self, stream: Stream) -> Path:
        """Where its weights are."""
        return self.folder.model if self.stage else base_folder(stream.model)


def run(
    stream: Stream,
    *,
    new: bool = False,
    run_dir: str | os.PathLike[str] | None = None,
    say: Say | None = None,
) -> Run:
    """Run a stream to its end, or go on with the newest run of its name as far as identities agree.

    new: start another run directory. run_dir: go on in this one. say: receives progress, a line at a time; by default
    it is shown as `cpt run` shows it, with a moving line on a terminal and the time of day in a file.
    Returns the Run. Raises ConfigError and DataError before anything is trained, RunDirError for a directory
    of another stream, TrainingError, and Stopped when a signal asked for it (the same call goes on later).
    """
    with (
        speaking() if say is None else nullcontext(say) as told,
        _working(stream, stream.output_dir, told, stream.processes) as (processes, say, stop),
    ):
        inputs = processes.together(lambda: read_inputs(stream, say))
        if note := adapter_note(stream.model):
            say(note)
        found = Run(processes.on_main(lambda: _open(stream, inputs.base, new, run_dir, say).path))
        with processes.holding(found.lock):
            planned = _planned(stream, found, inputs)
            todo = processes.on_main(lambda: [here.index for here in planned[1:] if not here.finished])
            processes.together(lambda: check_ahead(stream, inputs, [index - 1 for index in todo]))
            processes.on_main(lambda: _settle(found, planned, processes.world, say))
            if stream.evaluation.within.every != "off":
                processes.on_main(lambda: _say_unscored(planned, say))
            _go(stream, found, inputs, planned, say, stop, processes)
        say(f"done: {found.path}")
    return found


@contextmanager
def _working(
    stream: Stream, folder: Path, say: Say, expected: int | None
) -> Iterator[tuple[Processes, Say, StopRequest]]:
    """The processes of this launch, who speaks for them, and whether they were asked to stop."""
    processes = start(expected, bool(stream.training.get("use_cpu")))
    with (
        quiet(),
        readable_rank_errors(processes),
        stop_requests(processes.any) as stop,
        readable_disk_errors(folder),
    ):
        yield processes, say if processes.is_main else _nothing, stop


def _nothing(line: str) -> None:
    """What every process but the first says."""


def _settle(run: Run, planned: list[Planned], launched: int, say: Say) -> None:
    """Move what the stream no longer contains out of the way, say what is kept and what is to do, keep the stream."""
    _refuse_lost_parent(planned)
    redone = _supersede(run, planned, say)
    _say_plan(run, planned, redone, launched, say)


def measure_again(run: Run, stream: Stream, say: Say = print) -> None:
    """Measure a run's finished stages by the stream's evaluation plan; trains nothing.

    Raises RunDirError when the stream's stages are not the run's.
    """
    with _working(stream, run.path, say, None) as (processes, say, stop), processes.holding(run.lock):
        inputs = processes.together(lambda: read_inputs(stream, say))
        planned = _planned(stream, run, inputs)
        processes.on_main(lambda: _require_same(stream, run, planned))
        finished = processes.on_main(lambda: [here.index for here in planned if here.finished])
        _go(stream, run, inputs, [planned[index] for index in finished], say, stop, processes)


def _go(
    stream: Stream,
    run: Run,
    inputs: Inputs,
    planned: list[Planned],
    say: Say,
    stop: StopRequest,
    processes: Processes,
) -> None:
    """Train what is not finished, measure what is not measured, in order. The first process alone writes."""
    processes.on_main(lambda: write_text(run.path / "stream.yaml", stream.to_yaml()))
    for here, parent in zip(planned, [None, *planned[:-1]], strict=True):
        if not processes.on_main(partial(getattr, here, "finished")):
            _make(stream, inputs, here, parent, say, stop, processes)
        if stop():
            raise stop.error(f"after stage {here.name!r} was finished")
        model = here.model(stream)
        evaluate(inputs.evaluation, here.folder, model, here.identity, stream, inputs.tokenizer, say, stop, processes)
        processes.on_main(partial(_after, stream, run, planned, here, parent, say))


def _after(stream: Stream, run: Run, planned: list[Planned], here: Planned, parent: Planned | None, say: Say) -> None:
    """Write the matrix as far as it is known, show what changed, let go of weights that nothing needs any more."""
    measured = [p.folder for p in planned if p.finished and p.folder.eval_done()]
    scores = matrix(stream, run, measured)
    write_json(run.path / "matrix.json", scores)
    for line in changes(scores, here.index):
        say(line)
    if stream.retention.models == "all" or parent is None:
        return
    # The parent is trained from and measured: its weights may go, unless kept adapters stand on them.
    kept = [
        stage.folder.model for stage in planned[planned.index(here) :] if stage.stage and stage.folder.model.is_dir()
    ]
    needed = {needs_weights_of(model) for model in kept}
    for earlier in planned[1 : planned.index(here)]:
        if kept and earlier.folder.model not in needed:
            shutil.rmtree(earlier.folder.model, ignore_errors=True)
            shutil.rmtree(earlier.folder.path / STATE, ignore_errors=True)


def _make(
    stream: Stream,
    inputs: Inputs,
    here: Planned,
    parent: Planned | None,
    say: Say,
    stop: StopRequest,
    processes: Processes,
) -> None:
    """Train a stage and commit it; the base only needs its record."""
    processes.on_main(lambda: here.folder.begin(here.record))
    if here.stage is None or parent is None:
        return
    if stop():
        raise stop.error(f"before stage {here.name!r}")
    processes.on_main(lambda: _ready(stream, here, parent))
    start = _start(stream, here, parent)
    made = lineage(start, stream.model) + (", before its anneal" if start.name == STATE else "")
    say(f"[{here.index}/{len(stream.stages)}] {here.name}: {here.stage.kind} from {made}")
    began = time.perf_counter()
    request = processes.on_main(partial(_request, stream, inputs, here))
    with requests.failing(here.folder.run, request if processes.is_main else None, here.name):
        trained = train_stage(stream, inputs, here.index - 1, start, here.folder.path, say, stop, processes)
    if trained.stopped:
        raise stop.error(f"in stage {here.name!r}, with a checkpoint written")
    facts = trained.facts | {"seconds": round(time.perf_counter() - began, 3)}
    weights = gathered(trained)

    def commit() -> None:
        assert here.stage is not None
        forgot = next((m.model_dump(mode="json") for m in here.stage.methods if m.active and m.forgets), {})
        told = requests.trained(here.folder.run, here.name, parent.identity, here.identity, request, forgot)
        here.folder.commit(
            here.identity,
            facts | told,
            lambda folder: save_model(trained.model, inputs.tokenizer, folder, weights),
            stream.retention.checkpoints,
        )

    processes.on_main(commit)
    release(trained)
    say_facts(here.name, facts, say)
    if request is not None:
        say(f"  request {request} is applied, which does not say that the rows are gone: `cpt ledger show`")


def _request(stream: Stream, inputs: Inputs, here: Planned) -> str | None:
    """The id of the request that an unlearn stage carries out."""
    stage = here.stage
    if stage is None or stage.kind != "unlearn":
        return None
    rows = inputs.stages[here.index - 1].rows.rows
    return requests.ask(here.folder.run, rows, stage.requested_by or f"stream {stream.name}", here.name)


def _start(stream: Stream, here: Planned, parent: Planned) -> Path:
    """The weights that a stage starts from: the parent's, or what they were before its anneal."""
    if parent.stage and here.stage and goes_on(parent.stage.schedule, here.stage.schedule):
        return parent.folder.path / STATE
    return parent.model(stream)


def _ready(stream: Stream, here: Planned, parent: Planned) -> None:
    """The parent's weights are what was recorded, and there is room for what the stage writes."""
    start = _start(stream, here, parent)
    if start.name == STATE:
        verify_sealed(start, f"Restore it, or delete {parent.folder.path} to train that stage again.")
    elif parent.stage:
        parent.folder.verify_model()
    _require_space(stream, here)


def _require_space(stream: Stream, here: Planned) -> None:
    """A stage writes its model once, and per checkpoint the model and two moments of optimizer state."""
    assert here.stage is not None
    weights = sum(file.stat().st_size for file in base_folder(stream.model).glob("*.safetensors"))
    training = stream.training_of(here.stage)
    # One more than are kept: the older goes after the newer is sealed. A short stage writes one, if it is stopped.
    short = 0 < training.get("max_steps", 0) <= training.get("save_steps", 500)
    checkpoints = 1 if short else (training.get("save_total_limit") or 2) + 1
    checkpoints += 1 if here.stage.schedule else 0  # what the stage was before its anneal
    require_space(here.folder.path, weights * (1 + 3 * checkpoints), f"stage {here.name!r}")


def _open(stream: Stream, base: str, new: bool, run_dir: Any, say: Say) -> Run:
    """The run named, else the newest of the stream's name that was made from this base, else a new one."""
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


def _planned(stream: Stream, run: Run, inputs: Inputs) -> list[Planned]:
    record = {"identity": inputs.base, "name": "base", "model": stream.model.path}
    planned = [Planned(0, "base", inputs.base, run.stage(0, "base"), record=record)]
    for i, here in enumerate(inputs.stages, start=1):
        folder = run.stage(i, here.stage.name)
        record = _record(stream, here, planned[-1].identity)
        planned.append(Planned(i, here.stage.name, here.identity, folder, here.stage, record))
    return planned


def _record(stream: Stream, here: StageInputs, parent: str) -> dict[str, Any]:
    """What stage.json says: who the stage is, what it is made of."""
    return {
        "identity": here.identity,
        "parent": parent,
        "name": here.stage.name,
        "kind": here.stage.kind,
        "seed": here.seed,
        "stage": here.stage.model_dump(mode="json"),
        "training": stream.training_of(here.stage),
        "data": {"label": here.rows.label, "rows": len(here.rows.rows), "sha256": here.rows.fingerprint},
        "method_data": {
            place: {"rows": len(part.rows), "sha256": part.fingerprint} for place, part in here.method_rows.items()
        },
        "overlap": here.overlap,
    }


def _refuse_lost_parent(planned: list[Planned]) -> None:
    """Raise RunDirError, before anything is renamed, when a stage to train starts from weights that were not kept."""
    for parent, here in pairwise(planned):
        if here.finished or not parent.stage or not parent.finished or not here.stage:
            continue
        start = (
            parent.folder.path / STATE if goes_on(parent.stage.schedule, here.stage.schedule) else parent.folder.model
        )
        if not start.is_dir():
            raise RunDirError(
                f"{start}: stage {here.name!r} would start from these weights, which were not kept "
                "(retention.models: last). Use --new to run the stream again from the base."
            )


def _supersede(run: Run, planned: list[Planned], say: Say) -> set[str]:
    """Rename what the stream no longer contains; the names of stages that are made anew in its place."""
    wanted = {here.folder.path: here for here in planned}
    redone, left = set(), list[str]()
    for folder in run.stages():
        here = wanted.get(folder.path)
        record = folder.record()
        if here is None or (record is not None and record["identity"] != here.identity):
            target = run.supersede(folder)
            redone |= {here.name} if here else set()
            left.append(folder.path.name.partition("_")[2])
            say(f"{folder.path.name} belongs to another version of the stream: kept as {target.name}")
    for request in requests.left(run.path, left) if left else ():
        say(f"note: request {request} is superseded with its stage; where the stage is made anew, it is asked anew")
    return redone


def _say_plan(run: Run, planned: list[Planned], redone: set[str], launched: int, say: Say) -> None:
    """Which stages are kept, redone and added."""
    for p in planned[1:]:
        trained_by = (p.folder.done() or {"facts": {}})["facts"].get("processes") if p.finished else None
        if trained_by and trained_by != launched:
            say(f"note: {p.name} was trained by {trained_by} processes, this launch has {launched}: it is kept")
    said = {True: "kept", False: "to do"}
    lines = [f"{p.name} {'redo' if p.name in redone else said[p.finished]}" for p in planned if p.stage]
    say(f"run {run.path}")
    if planned[1:] and all(p.finished for p in planned):
        say(f"every stage is finished: {', '.join(p.name for p in planned[1:])}; nothing to train")
    elif lines:
        say(f"stages: {', '.join(lines)}")


def _say_unscored(planned: list[Planned], say: Say) -> None:
    """Finished stages that have no scores from while they trained: only training them again would make some."""
    for p in planned[1:]:
        if p.finished and not (p.folder.path / CURVE).is_file():
            why = (p.folder.done() or {"facts": {}})["facts"].get("within", {}).get("left_out", "trained without")
            say(f"note: {p.name} was not scored while it trained ({why}): it is kept as it is")


def _require_same(stream: Stream, run: Run, planned: list[Planned]) -> None:
    """Raise RunDirError unless every stage in the run is the stream's stage of that place, name and identity."""
    if run.name != stream.name:
        raise RunDirError(f"{run.path} is a run of stream {run.name!r}, not of {stream.name!r}")
    wanted = {here.folder.path: here.identity for here in planned}
    for folder in run.stages():
        record = folder.record()
        if record is not None and wanted.get(folder.path) != record["identity"]:
            raise RunDirError(
                f"{folder.path}: was trained by another version of the stream, so its scores would not be "
                "this stream's. Change only the evaluation plan, or train again with `cpt run`."
            )
