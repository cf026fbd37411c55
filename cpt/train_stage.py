"""One stage: rows to tokens, methods to hooks, parent to model, and what to say of it."""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpt.config import Stage, Stream
from cpt.data.sources import Loaded, drawn
from cpt.errors import ConfigError
from cpt.inputs import Inputs, Say, StageInputs
from cpt.methods.base import Method, StageInfo
from cpt.models import open_model

if TYPE_CHECKING:
    from cpt.data.tokens import TokenRows
    from cpt.trainers.sft import Trained


def check_ahead(stream: Stream, inputs: Inputs, number: int) -> None:
    """What would show only when the stage begins, shown before the first one trains.

    TRL's view of the arguments, and one row of each form through the tokenizer. Raises ConfigError or DataError.
    """
    from cpt.data.tokens import check_rendering
    from cpt.trainers.sft import sft_config, token_settings

    here = inputs.stages[number]
    place, training = f"stages.{number}", stream.training_of(here.stage)
    try:
        sft_config(training, Path("unused"), here.seed)
    except ConfigError as error:
        raise ConfigError(*(f"{place}.{problem}" for problem in error.problems)) from error
    settings = token_settings(training, stream.evaluation.prompt)
    for where, rows in {f"{place}.data": here.rows, **here.method_rows}.items():
        check_rendering(rows.rows, inputs.tokenizer, settings, where)


def train_stage(
    stream: Stream,
    inputs: Inputs,
    number: int,
    parent: Path,
    folder: Path,
    say: Say,
    stop: Callable[[], bool],
) -> "Trained":
    """Train stage `number` (from 0) from the parent's model in its folder, or go on from its checkpoint there."""
    from cpt.data.stage_data import TASK, StageData
    from cpt.data.tokens import tokenise
    from cpt.trainers.sft import token_settings, train

    here = inputs.stages[number]
    training = stream.training_of(here.stage)
    settings = token_settings(training, stream.evaluation.prompt)

    def load_tokens(rows: Sequence[Any] | Loaded, place: str, most: int | None = None) -> "TokenRows":
        found = rows if isinstance(rows, Loaded) else _named(here, rows)
        return tokenise(drawn(found, most, here.seed), inputs.tokenizer, settings, place)

    info = stage_info(stream, inputs.stages, number)
    data = StageData(load_tokens)
    data.sources[TASK] = tokenise(here.rows.rows, inputs.tokenizer, settings, f"stages.{number}.data")
    methods = fresh_methods(here.stage)
    for method in methods:
        method.prepare_data(data, info)
    counts = {name: rows.counts for name, rows in data.sources.items()}
    _say_counts(counts, say)
    _reset_peak()
    model = open_model(parent, stream.model)
    trained = train(model, inputs.tokenizer, data, info, methods, training, folder, stop, _progress(say))
    trained.facts |= {"rows": counts, "peak_gib": _peak_gib()}
    if not trained.stopped:
        for method in methods:
            method.finish_stage(trained.model, info)
    return trained


def _named(here: StageInputs, sources: Sequence[Any]) -> Loaded:
    """The rows of sources that a method names: read with the stage's inputs, so what is trained on was hashed."""
    named = zip(here.stage.method_sources().values(), here.method_rows.values(), strict=True)
    return next(rows for known, rows in named if known == sources)


def stage_info(stream: Stream, stages: Sequence[StageInputs], number: int) -> StageInfo:
    """What methods may know of stage `number` (from 0)."""
    here = stages[number]
    return StageInfo(
        index=number + 1,
        name=here.stage.name,
        kind=here.stage.kind,
        seed=here.seed,
        batch_rows=stream.batch_rows(here.stage),
        earlier=tuple((before.stage.name, before.rows) for before in stages[:number]),
    )


def fresh_methods(stage: Stage) -> list[Method]:
    """New instances of a stage's active methods: the configured ones never hold state."""
    return [type(method).model_validate(method.model_dump()) for method in stage.methods if method.active]


def say_facts(name: str, facts: dict[str, Any], say: Say) -> None:
    """One line about a trained stage, and the methods' notes."""
    share = facts["trained_parameters"] / facts["parameters"]
    rate = facts["tokens"] / max(facts["train_seconds"], 1e-9)
    trained = f"{facts['steps']} steps, {share:.0%} of {facts['parameters']:,} parameters"
    say(f"  {name}: {trained}, {facts['train_seconds']:.1f} s, {rate:,.0f} tokens/s")
    for method, found in facts["methods"].items():
        if "note" in found:
            say(f"  {method}: {found['note']}")


def _say_counts(counts: dict[str, dict[str, int]], say: Say) -> None:
    for name, found in counts.items():
        for kind, text in (
            ("dropped_without_target", "rows have no answer left within max_length and are left out"),
            ("truncated", "rows are cut at max_length"),
            ("lost_characters", "characters do not survive the tokenizer"),
        ):
            if found.get(kind):
                say(f"  warning: {name}: {found[kind]} {text} ({found['rows']} rows)")


def _progress(say: Say) -> Callable[[dict[str, Any]], None]:
    """About five lines a stage: how far, step, loss."""
    seen = {"next": 0.0}

    def show(line: dict[str, Any]) -> None:
        if "loss" not in line or line["epoch"] < seen["next"]:
            return
        seen["next"] = line["epoch"] + 0.2
        say(f"  {line['epoch']:4.0%}  step {line['step']}  loss {line['loss']:.4f}")

    return show


def _reset_peak() -> None:
    """Forget the device's peak of earlier stages; that of a process on the CPU cannot be reset."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_gib() -> float:
    """Peak memory: the device's in this stage where there is one, else this process's resident peak so far."""
    import resource

    import torch

    gc.collect()
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
