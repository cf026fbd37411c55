"""Measure a stage's model on everything the stream asks for, once: committed, and cached by what was scored."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt.config import EvalSource, Evaluation, Group, Stream
from cpt.data.sources import Loaded
from cpt.drift import NAME as DRIFT
from cpt.drift import DriftPlan
from cpt.errors import DataError, RunDirError
from cpt.models import open_model
from cpt.processes import Processes
from cpt.progress import counting, still
from cpt.run_dir import StageDir, digest
from cpt.signals import StopRequest
from eval_harness.cache import Cache, CacheError
from eval_harness.errors import Interrupted, ScoringError
from eval_harness.generation import Generation
from eval_harness.items import EvalSet
from eval_harness.measure import MeasureError, check, draw_shots, measure, model_identity, set_definition
from eval_harness.prompts import PromptError, Prompting, encode, one_of_each_form
from eval_harness.results import SCHEMA_VERSION
from eval_harness.rows import Row

CACHE = ".eval_cache.sqlite"


@dataclass(frozen=True)
class Plan:
    """What is measured, after every stage alike: the sets, and an id for each that changes with its meaning."""

    sets: dict[str, EvalSet]
    ids: dict[str, str]
    batch_tokens: int | None
    drift: DriftPlan | None = None

    @classmethod
    def of(
        cls, sources: dict[str, tuple[Group, EvalSource, Loaded, Loaded | None]], evaluation: Evaluation, tokenizer: Any
    ) -> "Plan":
        """The plan of a stream; raises DataError when a measure or the tokenizer does not fit a set's rows."""
        sets = {name: eval_set(name, *source, evaluation) for name, source in sources.items()}
        _check(sets, tokenizer)
        ids = {name: digest([set_definition(one, tokenizer), SCHEMA_VERSION]) for name, one in sets.items()}
        return cls(sets, ids, evaluation.batch_tokens)

    @property
    def id(self) -> str:
        """Changes when anything about the plan does, but for the batch size."""
        return digest([self.ids, self.drift.id if self.drift else None])

    def rows(self) -> dict[str, list[Row]]:
        """Set -> its rows."""
        return {name: part.rows for name, part in self.sets.items()}


def eval_set(
    name: str, group: Group, source: EvalSource, loaded: Loaded, shots: Loaded | None, evaluation: Evaluation
) -> EvalSet:
    """What a source of the stream is to the harness, its rows and shots read."""
    return EvalSet(
        name,
        loaded.rows,
        tuple(source.measures) if source.measures else None,
        group,
        exact_match=source.exact_match,
        prompting=_prompting(source, evaluation),
        generation=Generation(**source.generate.model_dump() | {"stop": tuple(source.generate.stop)}),
        fewshot=shots.rows if shots else [],
    )


def _prompting(source: EvalSource, evaluation: Evaluation) -> Prompting:
    from eval_harness.metrics.text import REASONING

    pattern = REASONING if source.strip_reasoning is True else source.strip_reasoning or None
    return Prompting(evaluation.chat_template, source.system, source.num_fewshot, source.fewshot_seed, pattern)


def _check(sets: dict[str, EvalSet], tokenizer: Any) -> None:
    """Measures by the rows' form, and one row of each form rendered: what can be known before a model is loaded."""
    try:
        check(list(sets.values()))
    except MeasureError as error:
        raise DataError(*str(error).splitlines()) from error
    problems = []
    for name, part in sets.items():
        place = f"evaluation.general.{name}" if part.group == "general" else f"stages.{name}.test"
        how, shots = part.prompting, draw_shots(part)
        for row in one_of_each_form([row for row in part.rows if row.kind != "text"]):
            try:
                encode(tokenizer, row, how.chat_template, system=how.system, shots=shots)
            except PromptError as error:
                problems.append(f"{place}: {error}")
    if problems:
        raise DataError(*problems)


class _NotKept(Exception):
    """Something must be scored, and the weights are gone."""


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
    """Measure what eval/DONE does not hold yet, commit it. Rows that were scored before come from the cache, and
    the model is loaded only if one was not.

    With several processes each scores its part of the rows; the first one knows, asks and writes.
    """
    began = time.perf_counter()
    done = processes.on_main(folder.eval_done)
    if done and done["plan"] == plan.id:
        return
    opened: set[str] = set()

    def opening() -> Any:
        if not processes.on_main(model.is_dir):
            raise _NotKept
        processes.on_main(lambda: folder.verify_model() if folder.done() is not None else None)
        return open_model(model, stream.model)

    # Two trainings of one identity may differ by bits on another machine: scores belong to weights.
    trained = processes.on_main(folder.done)
    weights = _model_identity(trained["model"] if trained else identity, stream)
    asked = _Asked(plan, opening, weights, tokenizer, opened.update, counting(f"measuring {folder.path.name}", say))
    try:
        found = asked.results(list(plan.sets), folder, stop, processes)
    except _NotKept:  # then set by set: some may be known
        found = {}
        for name in plan.sets:
            try:
                found |= asked.results([name], folder, stop, processes)
            except _NotKept:
                why = f"the weights of {folder.path.name} were not kept (retention.models: last)"
                say(f"  {why}: {name} left out")
    if plan.drift is not None:
        try:
            found[DRIFT] = asked.drift(plan.drift, model, opening, stream, folder, stop, processes)
        except _NotKept:
            say(f"  the weights of {folder.path.name} were not kept (retention.models: last): {DRIFT} left out")
    still(say)
    measured = [name for name in found if name in opened]
    facts = {"seconds": round(time.perf_counter() - began, 3), "measured": measured}
    processes.on_main(lambda: folder.commit_eval(plan.id, found, facts))
    how = f"in {facts['seconds']:.1f} s" if measured else "already known"
    if found:
        say(f"  measured {folder.path.name} on {len(found)} sets {how}")


def _model_identity(weights: Any, stream: Stream) -> str:
    import torch

    spec, device = stream.model, "cuda" if torch.cuda.is_available() else "cpu"
    about = {"dtype": spec.dtype, "attention": spec.attn_implementation, "quantization": spec.quantization}
    return model_identity(digest(weights), device=device, **about)


@dataclass(frozen=True)
class _Asked:
    """A plan, and the model that it is asked of."""

    plan: Plan
    model: Callable[[], Any]
    identity: str
    tokenizer: Any
    scoring: Callable[[set[str]], None]
    progress: Callable[[int, int], None] | None

    def results(
        self, names: list[str], folder: StageDir, stop: StopRequest, processes: Processes
    ) -> dict[str, dict[str, Any]]:
        try:
            found = measure(
                self.model,
                self.tokenizer,
                [self.plan.sets[name] for name in names],
                batch_tokens=self.plan.batch_tokens,
                should_stop=stop.here,
                shard=processes if processes.world > 1 else None,
                cache=Cache(folder.path.parents[2] / CACHE),  # beside the runs that share it
                identity=self.identity,
                asking=self.scoring,
                progress=self.progress,
            )
        except Interrupted as error:
            raise stop.error(f"while measuring {folder.path.name}") from error
        except (MeasureError, PromptError, ScoringError) as error:
            raise DataError(f"measuring {folder.path.name}: {error}") from error
        except CacheError as error:
            raise RunDirError(str(error)) from error
        return {name: {key: result.to_json() for key, result in by.items()} for name, by in found.items()}

    def drift(
        self,
        drift: DriftPlan,
        model: Path,
        opening: Callable[[], Any],
        stream: Stream,
        folder: StageDir,
        stop: StopRequest,
        processes: Processes,
    ) -> dict[str, Any]:
        try:
            cache = Cache(folder.path.parents[2] / CACHE)
            return drift.measure(model, self.identity, opening, stream, self.tokenizer, cache, stop, processes)
        except CacheError as error:
            raise RunDirError(str(error)) from error
