"""Measure a stage's model on everything the stream asks for, once: committed, and cached by what was scored."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cpt.checkpoints import write_json
from cpt.config import EvalSource, Evaluation, Group, Stream
from cpt.data.sources import Loaded
from cpt.errors import DataError, RunDirError
from cpt.models import open_model
from cpt.processes import Processes
from cpt.run_dir import StageDir, digest
from cpt.signals import StopRequest
from eval_harness.errors import Interrupted
from eval_harness.measure import EvalSet, MeasureError, check, measure
from eval_harness.prompts import PromptError, definition, encode
from eval_harness.results import SCHEMA_VERSION
from eval_harness.rows import Row
from eval_harness.scoring import ScoringError

CACHE = ".eval_cache"


@dataclass(frozen=True)
class Plan:
    """What is measured, after every stage alike: the sets, and an id for each that changes with its meaning."""

    sets: dict[str, EvalSet]
    ids: dict[str, str]
    batch_tokens: int

    @classmethod
    def of(cls, sources: dict[str, tuple[Group, EvalSource, Loaded]], evaluation: Evaluation, tokenizer: Any) -> "Plan":
        """The plan of a stream; raises DataError when a measure or the tokenizer does not fit a set's rows."""
        sets, ids = {}, {}
        for name, (group, source, loaded) in sources.items():
            sets[name] = EvalSet(
                name,
                loaded.rows,
                tuple(source.measures) if source.measures else None,
                group,
                exact_match=source.exact_match,
                style=evaluation.prompt,
            )
        _check(sets, tokenizer)
        for name, (_, source, loaded) in sources.items():
            content = [loaded.fingerprint, sets[name].measures, source.exact_match]
            ids[name] = digest([*content, definition(tokenizer, evaluation.prompt), SCHEMA_VERSION, version("cpt")])
        return cls(sets, ids, evaluation.batch_tokens)

    @property
    def id(self) -> str:
        """Changes when anything about the plan does, but for the batch size."""
        return digest({name: [self.ids[name], self.sets[name].group] for name in self.sets})

    def rows(self) -> dict[str, list[Row]]:
        """Set -> its rows."""
        return {name: part.rows for name, part in self.sets.items()}


def _check(sets: dict[str, EvalSet], tokenizer: Any) -> None:
    """Measures by the rows' form, and one row of each form rendered: what can be known before a model is loaded."""
    try:
        check(list(sets.values()))
    except MeasureError as error:
        raise DataError(*str(error).splitlines()) from error
    problems = []
    for name, part in sets.items():
        place = f"evaluation.general.{name}" if part.group == "general" else f"stages.{name}.test"
        for row in {row.kind: row for row in part.rows if row.kind != "text"}.values():
            try:
                encode(tokenizer, row, part.style)
            except PromptError as error:
                problems.append(f"{place}: {error}")
    if problems:
        raise DataError(*problems)


def evaluate(
    plan: Plan,
    folder: StageDir,
    model: Path,
    identity: str,
    stream: Stream,
    tokenizer: Any,
    say: Callable[[str], None],
    stop: StopRequest,
    processes: Processes,
) -> None:
    """Measure what eval/DONE does not hold yet, commit it. Sets that were scored before come from the cache.

    With several processes each scores its part of the rows; the first one knows, asks and writes.
    """
    began = time.perf_counter()
    known = processes.on_main(lambda: _known(plan, folder, identity, stream))
    if known is None:
        return
    results, files = known
    missing = [name for name in plan.sets if name not in results]
    there = processes.on_main(model.is_dir)
    if missing and not there:
        say(
            f"  the weights of {folder.path.name} were not kept (retention.models: last): {', '.join(missing)} left out"
        )
    elif missing:
        fresh = _measure(plan, missing, folder, model, stream, tokenizer, stop, processes)
        results |= fresh
        processes.on_main(lambda: _keep(fresh, files))
    facts = {"seconds": round(time.perf_counter() - began, 3), "measured": missing}
    held = {name: results[name] for name in plan.sets if name in results}
    processes.on_main(lambda: folder.commit_eval(plan.id, held, facts))
    how = f"in {facts['seconds']:.1f} s" if missing else "already known"
    if plan.sets:
        say(f"  measured {folder.path.name} on {len(plan.sets)} sets {how}")


def _known(
    plan: Plan, folder: StageDir, identity: str, stream: Stream
) -> tuple[dict[str, Any], dict[str, Path]] | None:
    """Results from the cache and every set's file there; None when the evaluation is committed already."""
    done = folder.eval_done()
    if done and done["plan"] == plan.id:
        return None
    cache = folder.path.parents[2] / CACHE  # beside the runs that share it
    # Two trainings of one identity may differ by bits on another machine: scores belong to weights.
    trained = folder.done()
    spec = stream.model
    about = [trained["model"] if trained else identity, spec.dtype, spec.attn_implementation, spec.quantization]
    files = {name: cache / f"{digest([*about, plan.ids[name]])}.json" for name in plan.sets}
    found = {name: _cached(file) for name, file in files.items()}
    return {name: results for name, results in found.items() if results is not None}, files


def _keep(results: dict[str, dict[str, Any]], files: dict[str, Path]) -> None:
    for name, content in results.items():
        files[name].parent.mkdir(parents=True, exist_ok=True)
        write_json(files[name], content)


def _measure(
    plan: Plan,
    names: list[str],
    folder: StageDir,
    model: Path,
    stream: Stream,
    tokenizer: Any,
    stop: StopRequest,
    processes: Processes,
) -> dict[str, dict[str, Any]]:
    processes.on_main(lambda: folder.verify_model() if folder.done() is not None else None)
    loaded = open_model(model, stream.model)
    try:
        found = measure(
            loaded,
            tokenizer,
            [plan.sets[name] for name in names],
            batch_tokens=plan.batch_tokens,
            should_stop=stop.here,
            shard=processes if processes.world > 1 else None,
        )
    except Interrupted as error:
        raise stop.error(f"while measuring {folder.path.name}") from error
    except (MeasureError, PromptError, ScoringError) as error:
        raise DataError(f"measuring {folder.path.name}: {error}") from error
    return {name: {key: result.to_json() for key, result in by.items()} for name, by in found.items()}


def _cached(file: Path) -> dict[str, Any] | None:
    """A set's results, or None; files appear by rename, so a reader never sees half of one."""
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunDirError(f"{file}: is damaged ({error}). Delete it: what it held is measured again.") from error
