"""One stage: rows to tokens or prompts, methods to hooks, parent to model, and what to say of it."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpt.config import BATCH_DEFAULTS, GENERATING, Stage, Stream
from cpt.data.memory import Memory
from cpt.data.sources import Loaded, drawn, part_of
from cpt.errors import ConfigError, CptError
from cpt.inputs import Inputs, Say, StageInputs, forgotten
from cpt.methods.base import Method, StageInfo, named_tensors
from cpt.models import (
    base_folder,
    block_count,
    check_adapter,
    context_length,
    open_for_training,
    open_model,
    stands_on_base,
    starts_as_parent,
    tensor_names,
)
from cpt.processes import Processes
from cpt.progress import StageProgress, counting, still
from cpt.rewards.spec import columns, label, resolve
from cpt.schedule import STATE, goes_on
from cpt.writing import Writer
from eval_harness.prompts import definition
from eval_harness.rows import content_key

if TYPE_CHECKING:
    from cpt.data.stage_data import StageData
    from cpt.data.tokens import TokenRows, TokenSettings
    from cpt.signals import StopRequest
    from cpt.trainers.rft import Rewarding
    from cpt.trainers.session import Trained
    from cpt.within import Watch, Work

COMPLETION_TOKENS = {"rft": 512, "sdft": 256}  # TRL's defaults of max_completion_length
DEMONSTRATION = "{prompt}\n\n{privileged_context}"  # and of teacher_prompt_template
COLUMNS = ("answer", "choices")  # what a reward sees of a row beside its prompt and completion


def check_ahead(stream: Stream, inputs: Inputs, numbers: Sequence[int]) -> None:
    """What would show only when a stage (numbered from 0) begins, shown before the first one trains.

    TRL's view of the arguments, the launcher's limits, an adapter on the model's skeleton, reward functions
    imported, one row of each form through the tokenizer. Raises ConfigError or DataError.
    """
    if numbers:
        _check_batches(stream)
    for number in numbers:
        _check_stage(stream, inputs, number)


def _check_batches(stream: Stream) -> None:
    """What a stored stream was read without: whether shares and groups fit the processes of this launch."""
    if found := stream.batch_problems():
        places = (".".join(str(part) for part in place) for place, *_ in found)
        raise ConfigError(
            *(f"{place} = {value!r}: {text}" for place, (_, value, text) in zip(places, found, strict=True))
        )


def _check_stage(stream: Stream, inputs: Inputs, number: int) -> None:
    from cpt.data.tokens import check_rendering

    here = inputs.stages[number]
    place, training = f"stages.{number}", stream.training_of(here.stage)
    with _at(place):
        _refuse_launch(stream, here.stage, _arguments(here.stage, training, Path("unused"), here.seed))
    if here.stage.adapter is not None:
        with _at(f"{place}.adapter"):
            check_adapter(stream.model, here.stage.adapter)
    _check_rows(here, place)
    for i, method in enumerate(here.stage.methods):
        if (patterns := getattr(method, "protected", [])) and method.active:
            named_tensors(tensor_names(stream.model), patterns, f"{place}.methods.{i}.protected")
        if method.active and "blocks" in method.needs and (count := block_count(stream.model)):
            with _at(f"{place}.methods.{i}"):
                method.blocks_read(count)
    _check_rewards(here, place)
    if training.get("packing") and (held := _active_needing(here.stage, "base")):
        raise ConfigError(
            f"{place}.training.packing = true: {', '.join(held)} knows what the base computed of each row alone: "
            "leave packing out"
        )
    if here.stage.kind in GENERATING:
        _prompts(stream, inputs, here, training, f"{place}.data")
    if _active_needing(here.stage, "template"):
        from cpt.data.forgetting import check_templates

        check_templates(here.rows.rows, here.stage.template, f"{place}.data")
    settings = _token_settings(stream, training)
    for where, rows in {f"{place}.data": here.rows, **here.method_rows}.items():
        check_rendering(rows.rows, inputs.tokenizer, settings, where)
    _check_shares(stream, here, place)


def _check_rows(here: StageInputs, place: str) -> None:
    """Every method can do with the stage's rows what it is for."""
    found = [
        f"{place}.methods.{i}.{field} = {getattr(method, field)!r}: {sentence}"
        for i, method in enumerate(here.stage.methods)
        if method.active
        for field, sentence in method.check_rows(here.rows)
    ]
    if found:
        raise ConfigError(*found)


def _check_shares(stream: Stream, here: StageInputs, place: str) -> None:
    """A method that adds its own rows alone has as many as every effective batch is to hold of them."""
    found = []
    for i, method in enumerate(here.stage.methods):
        own = [rows for where, rows in here.method_rows.items() if where.startswith(f"{place}.methods.{i}.")]
        share = sum(method.quotas(stream.batch_rows(here.stage)).values()) if method.active else 0
        held = sum(len(rows.rows) for rows in own)
        if own and share > held and not getattr(method, "earlier", None):
            found.append(
                f"{place}.methods.{i}.ratio = {getattr(method, 'ratio', None)}: is {share} rows of every effective "
                f"batch, and there are {held}: give more rows, or a smaller ratio"
            )
    if found:
        raise ConfigError(*found)


def _check_rewards(here: StageInputs, place: str) -> None:
    """Every reward imports, and asks for no column that prompts do not bring."""
    for i, reward in enumerate(here.stage.rewards):
        where = f"{place}.rewards.{i}"
        resolve(reward, where)
        if strange := set(columns(reward, where)) - set(COLUMNS):
            raise ConfigError(
                f"{where} = {reward.type!r}: needs {', '.join(sorted(strange))}, and a reward is given prompts, "
                f"completions, {', '.join(COLUMNS)}. Set it under `arguments:`, or take one of those."
            )


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Put a place before the problems that arise inside."""
    try:
        yield
    except CptError as error:
        raise type(error)(*(f"{place}.{problem}" for problem in error.problems)) from error


def _arguments(stage: Stage, training: dict[str, Any], folder: Path, seed: int) -> Any:
    if stage.kind == "rft":
        from cpt.trainers.rft import grpo_config

        return grpo_config(training, folder, seed, [reward.weight for reward in stage.rewards])
    if stage.kind == "sdft":
        from cpt.trainers.sdft import sdft_config

        return sdft_config(training, folder, seed)
    from cpt.trainers.sft import sft_config

    return sft_config(training, folder, seed)


def _refuse_launch(stream: Stream, stage: Stage, args: Any) -> None:
    """Edits of gradients and weights reach the right tensors, and a training model can be scored, not everywhere."""
    from cpt.trainers.deepspeed import forget, refuse_edits
    from cpt.trainers.session import spreads_weights

    problems = refuse_edits(fresh_methods(stage), args)
    every, spread = stream.evaluation.within.every, spreads_weights(args)
    if spread is not None and isinstance(every, int):
        problems.append(
            f"training: {spread} leaves each process a part of every weight, and evaluation.within.every = {every} "
            "asks for scores while it trains: use DDP or ZeRO-2, or evaluation.within: auto, which skips such a stage"
        )
    asked = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    if asked and (held := _active_needing(stage, "own passes")):
        problems.append(
            f"training.gradient_checkpointing_kwargs.use_reentrant = true: {', '.join(held)} takes gradients of single "
            "tensors, which re-entrant checkpointing refuses: set it to false"
        )
    wrapped = "DeepSpeed" if args.deepspeed_plugin is not None else spread
    if stage.schedule is not None and wrapped:
        problems.append(
            f"schedule = {stage.schedule.type!r}: {wrapped} keeps the optimizer's state in parts of its own form, and "
            "another stage cannot go on from those: use DDP, or an lr_scheduler_type that re-warms"
        )
    if spread is not None and (held := _active_needing(stage, "base", "whole")):
        problems.append(
            f"training: {spread} leaves each process a part of every weight, and {', '.join(held)} asks what the "
            "whole model computes: use DDP or ZeRO-2"
        )
    if wrapped and (held := _active_needing(stage, "own passes")):
        problems.append(
            f"training: under {wrapped} the model runs in the trainer's passes alone, and {', '.join(held)} takes some "
            "of its own: use DDP"
        )
    if getattr(args, "use_vllm", False) and (held := _active_needing(stage, "adapter")):
        problems.append(
            f"training.use_vllm = true: vLLM would be given the adapter as it is before {held[0]} has finished the "
            "stage: leave use_vllm out"
        )
    forget(args)  # the base is measured first
    if problems:
        raise ConfigError(*problems)


def _active_needing(stage: Stage, *needs: str) -> list[str]:
    """Types of the stage's active methods that need one of these."""
    return [method.type for method in stage.methods if method.active and method.needs & set(needs)]


def _token_settings(stream: Stream, training: dict[str, Any]) -> "TokenSettings":
    from cpt.trainers.sft import token_settings

    return token_settings(training, stream.evaluation.chat_template)


def train_stage(
    stream: Stream,
    inputs: Inputs,
    number: int,
    parent: Path,
    folder: Path,
    say: Say,
    stop: "StopRequest",
    processes: Processes,
) -> "Trained":
    """Train stage `number` (from 0) from the parent's model in its folder, or go on from its checkpoint there."""
    from cpt.data.stage_data import TASK, StageData
    from cpt.data.tokens import tokenise
    from cpt.trainers.session import Session

    here, memory = inputs.stages[number], Memory(folder.parents[1] / "memory")
    training = stream.training_of(here.stage)
    settings = _token_settings(stream, training)
    processes.together(memory.check)

    def load_tokens(rows: Sequence[Any] | Loaded, place: str, most: int | None = None) -> "TokenRows":
        found = memory.without_forgotten(rows if isinstance(rows, Loaded) else _named(here, rows))
        return tokenise(drawn(found, most, here.seed), inputs.tokenizer, settings, place)

    def opened() -> Any:
        return open_for_training(parent, stream.model, here.stage.adapter, folder.name, here.seed)

    info = replace(stage_info(stream, inputs, number), memory=memory.folder)
    info = replace(
        info,
        earlier=tuple((name, memory.without_forgotten(rows)) for name, rows in info.earlier),
        losses=lambda rows: processes.on_main(lambda: _losses(stream, inputs.tokenizer, parent, rows)),
        record=partial(_record, stream, inputs.base, info, here, parent, say),
        adapters_off=_adapters_off(stream, here, parent),
        open_base=lambda: open_model(None, stream.model),
        generate=Writer(
            lambda: open_model(parent, stream.model),
            inputs.tokenizer,
            stream.evaluation.chat_template,
            context_length(stream.model),
            processes,
            here.stage.name,
            stop,
            inputs.evaluation.batch_tokens,
            counting(f"answers for {here.stage.name}", say),
        ),
    )
    data = StageData(load_tokens, place=f"stages.{number}.methods")
    place = f"stages.{number}.data"
    methods = fresh_methods(here.stage)
    if here.stage.kind == "unlearn":
        data = _to_forget(stream, inputs, number, data, training, place)
    elif here.stage.kind in GENERATING:
        data.sources[TASK] = _prompts(stream, inputs, here, training, place)
    else:
        data.sources[TASK] = tokenise(here.rows.rows, inputs.tokenizer, settings, place)
    for method in methods:
        method.prepare_data(data, info)
    still(say)
    counts = {name: rows.counts for name, rows in data.sources.items()}
    _say_counts(counts, say)
    _reset_peak()
    watch = _watch(stream, inputs, number, data, folder, say, processes)
    progress = StageProgress(here.stage.name, {method.label for method in methods}, say)
    session = Session(folder, stop, progress.log, processes, watch, progress.at)
    about = (opened, inputs.tokenizer, data, info, methods, training, session)
    try:
        if here.stage.kind == "rft":
            from cpt.trainers import rft

            trained = rft.train(*about, _rewarding(stream, here, parent))
        elif here.stage.kind == "sdft":
            from cpt.trainers import sdft

            trained = sdft.train(*about)
        elif here.stage.kind == "unlearn":
            from cpt.trainers import unlearn

            trained = unlearn.train(*about)
        else:
            from cpt.trainers import sft

            state = parent if parent.name == STATE else None
            trained = sft.train(*about, here.stage.schedule, state)
    finally:
        progress.end()
    made = getattr(trained.model, "lineage", None)
    trained.facts |= {"rows": counts, "peak_gib": _peak_gib(), "lineage": made.describe() if made else folder.name}
    if not trained.stopped:
        for method in methods:
            method.finish_stage(trained.model, info)
    return trained


def _watch(
    stream: Stream, inputs: Inputs, number: int, data: "StageData", folder: Path, say: Say, processes: Processes
) -> "Watch | None":
    """What scores stage `number` (from 0) while it trains: on earlier stages' tests, its own and the general sets."""
    from cpt.stability_gap import FILE
    from cpt.within import Watch

    asked, evaluation = stream.evaluation.within, inputs.evaluation
    if asked.every == "off":
        processes.on_main(lambda: (folder / FILE).unlink(missing_ok=True))  # of a plan before a kill
        return None
    later = {stage.name for stage in stream.stages[number + 1 :]}
    names = [name for name in evaluation.sets if name not in later and name in (asked.sets or evaluation.sets)]
    return Watch(
        asked,
        [evaluation.sets[name] for name in names],
        inputs.tokenizer,
        _work(stream, inputs.stages[number].stage, data),
        window=context_length(stream.model),
        seed=stream.seed,
        file=folder / FILE,
        earlier=[folder.parent / f"{i:02d}_{s.name}" / FILE for i, s in enumerate(stream.stages[:number], start=1)],
        batch_tokens=evaluation.batch_tokens,
        say=say,
        processes=processes,
    )


def _work(stream: Stream, stage: Stage, data: "StageData") -> "Work":
    """What a stage's training is made of, in tokens of its rows. What a model is going to write is not known ahead."""
    from cpt.within import Work

    lengths = {name: part.lengths() for name, part in data.sources.items()}
    rows = stream.batch_rows(stage)
    shares = data.rows_per_batch(rows)
    left = rows if stage.kind in GENERATING else rows - sum(shares.values())
    quotas = {name: shares.get(name, left * size / data.pool) for name, size in data.sizes.items()}
    micro = (BATCH_DEFAULTS | stream.training_of(stage))["per_device_train_batch_size"]
    return Work(
        step=sum(float(part.mean()) * quotas[name] for name, part in lengths.items()),
        batch=micro * max(int(part.max()) for part in lengths.values()),
        forward=1 / 3 if stage.adapter is None else 1 / 2,
        shares=not str(stream.model.attn_implementation or "").startswith("flash"),
    )


def _prompts(stream: Stream, inputs: Inputs, here: StageInputs, training: dict[str, Any], place: str) -> "TokenRows":
    from cpt.data.prompted import demonstrated, prompted

    kind, context = here.stage.kind, context_length(stream.model)
    longest = training.get("max_completion_length", COMPLETION_TOKENS[kind])
    room = context - longest if context else None
    if room is not None and room < 1:
        raise ConfigError(
            f"{place.removesuffix('.data')}.training.max_completion_length = {longest}: the model's context of "
            f"{context} tokens must hold the prompt too: set it lower"
        )
    about = (here.rows.rows, inputs.tokenizer, stream.evaluation.chat_template, room)
    if kind == "sdft":
        return demonstrated(*about, training.get("teacher_prompt_template", DEMONSTRATION), place)
    return prompted(*about, place)


def _rewarding(stream: Stream, here: StageInputs, parent: Path) -> "Rewarding":
    from cpt.rewards.scoring import Scored
    from cpt.trainers.rft import Reference, Rewarding

    rewards = [
        Scored(resolve(reward, f"stages.{here.stage.name}.rewards.{i}"), label(reward), here.stage.name)
        for i, reward in enumerate(here.stage.rewards)
    ]
    weights = [reward.weight for reward in here.stage.rewards]
    kl, reference = here.stage.kl, None
    if kl.to != "off":
        to_base = kl.to == "base"
        is_its_own = stands_on_base if to_base else starts_as_parent
        free = is_its_own(parent, stream.model, here.stage.adapter)
        start = None if to_base else parent
        reference = Reference(kl.weight, None if free else lambda: open_model(start, stream.model))
    return Rewarding(rewards, weights, reference)


def _to_forget(
    stream: Stream, inputs: Inputs, number: int, data: "StageData", training: dict[str, Any], place: str
) -> "StageData":
    """The rows of an unlearning stage: those to forget, their templates where a method asks for them, those kept."""
    from cpt.data.forgetting import RETAIN, forget_data, passes
    from cpt.data.tokens import tokenise

    here, settings = inputs.stages[number], _token_settings(stream, training)
    batch_rows, rows = stream.batch_rows(here.stage), here.rows.rows

    def encode(rows: Sequence[Any], place: str) -> "TokenRows":
        return tokenise(rows, inputs.tokenizer, settings, place)

    template = here.stage.template if _active_needing(here.stage, "template") else None
    made = forget_data(data, rows, encode, template, passes(training, batch_rows, len(rows)), here.seed, place)
    if here.stage.retain is not None:
        rows_per_batch = round(here.stage.retain_ratio * batch_rows)
        made.add(RETAIN, data.load(here.stage.retain, f"stages.{number}.retain", None), rows_per_batch)
    return made


def _named(here: StageInputs, sources: Sequence[Any]) -> Loaded:
    """The rows of sources that a method names: read with the stage's inputs, so what is trained on was hashed."""
    named = zip(here.stage.method_sources().values(), here.method_rows.values(), strict=True)
    return next(rows for known, rows in named if known == sources)


def stage_info(stream: Stream, inputs: Inputs, number: int) -> StageInfo:
    """What methods may know of stage `number` (from 0)."""
    here, before = inputs.stages[number], inputs.stages[:number]
    schedules = [one.stage.schedule for one in inputs.stages[max(0, number - 1) : number + 1]]
    start = before[-1].identity if before else inputs.base
    gone = forgotten((one.stage, one.rows) for one in inputs.stages[: number + 1])
    return StageInfo(
        index=number + 1,
        name=here.stage.name,
        kind=here.stage.kind,
        seed=here.seed,
        batch_rows=stream.batch_rows(here.stage),
        world=stream.world,
        earlier=tuple(
            (one.stage.name, rows)
            for one in before
            if one.stage.kind != "unlearn" and (rows := _without(one.rows, gone)).rows
        ),
        identities={one.stage.name: one.identity for one in before},
        parent=f"{start}/{STATE}" if before and goes_on(*schedules) else start,
        base=inputs.base,
        stream_seed=stream.seed,
        rows=here.rows,
        rendering=definition(inputs.tokenizer, stream.evaluation.chat_template),
    )


def _without(loaded: Loaded, gone: set[str]) -> Loaded:
    """The rows that no stage so far is to forget."""
    return part_of(loaded, [row for row in loaded.rows if content_key(row) not in gone]) if gone else loaded


def _adapters_off(stream: Stream, here: StageInputs, parent: Path) -> frozenset[str]:
    """What the stage's model is without its adapters."""
    asked = {"base": stands_on_base, "start": starts_as_parent}
    return frozenset(name for name, is_it in asked.items() if is_it(parent, stream.model, here.stage.adapter))


def _losses(stream: Stream, tokenizer: Any, parent: Path, rows: Loaded) -> list[float]:
    """Mean token loss of every row under the parent's model; one forward pass over them."""
    import torch

    from eval_harness.prompts import encode
    from eval_harness.scoring import score

    encoded = [encode(tokenizer, row, stream.evaluation.chat_template) for row in rows.rows]
    model = open_model(parent, stream.model).to("cuda" if torch.cuda.is_available() else "cpu")
    scores = score(model, encoded, context=context_length(stream.model))
    return [-one.log_prob / max(1, one.tokens) if one is not None else 0.0 for one in scores]


def _record(
    stream: Stream,
    base: str,
    info: StageInfo,
    here: StageInputs,
    parent: Path,
    say: Say,
    model: Any,
    rows: "TokenRows",
    name: str,
    *,
    of: str = "regions",
    who: str = "base",
    key: str | None = None,
    make: bool = True,
    precision: str | None,
    device: Any,
    **how: Any,
) -> Any:
    """What a model computes on the rows; recorded in RUN/memory unless it is there already.

    of: "regions", "features" or "top_k", whose further arguments follow. who: "base", or "start", the weights that
    the stage starts from. key: identity of that model, where another stage has recorded it. make: False gives None
    where it is not recorded. precision: bf16 or fp16
    where training computes under autocast. The base is the model itself where that has not moved yet, the model
    without its adapters where those stand on it, else loaded beside it for the while.
    """
    import torch

    from cpt.data import activations
    from cpt.data.recording import Recorder, launched
    from cpt.run_dir import digest

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision or "")
    made = key or (base if who == "base" else info.parent)
    settings = {"of": of, "model": made, "precision": precision, "layer": "last", **how}
    about = {**settings, "count": len(rows.dataset), "rows": rows.ids, "aggregate": of == "regions"}
    content = [rows.dataset[:]["input_ids"], rows.dataset[:]["labels"]]
    assert info.memory is not None
    folder = info.memory / f"{name}-{digest([settings, content])[:16]}"
    if not make and not (folder / "about.json").is_file():
        return None
    with _as_base(stream, here, parent, model) if who == "base" else nullcontext(model) as whole:
        if of == "regions" and how.get("passes") == 1 and not (folder / "about.json").is_file():
            size = activations.scratch_bytes(rows.dataset, whole) / 2**20
            say(f"  {name}: one pass over {len(rows.dataset)} rows keeps {size:,.1f} MiB in {folder} until it is done")
        return getattr(activations, f"record_{of}")(
            Recorder(whole.to(device), rows.dataset, folder, **launched()),
            about,
            autocast=lambda: torch.autocast(torch.device(device).type, dtype) if dtype else nullcontext(),
            **how,
        )


@contextmanager
def _as_base(stream: Stream, here: StageInputs, parent: Path, model: Any) -> Iterator[Any]:
    from cpt.trainers.reference import without_adapters

    if stands_on_base(parent, stream.model, here.stage.adapter):
        with without_adapters(model):
            yield model
    elif parent == base_folder(stream.model) and here.stage.adapter is None and stream.model.adapter is None:
        yield model
    else:
        yield open_model(None, stream.model)


def gathered(trained: "Trained") -> dict[str, Any] | None:
    """The trained weights on the first process where they are spread over several; None where each has them all."""
    from cpt.trainers.deepspeed import gather_weights

    return gather_weights(trained.trainer)


def release(trained: "Trained") -> None:
    """Let go of trainer, engine and model: the next load must not meet a sharding configuration of this one."""
    from cpt.trainers.session import close

    close(trained)
    gc.collect()


def fresh_methods(stage: Stage) -> list[Method]:
    """New instances of a stage's active methods: the configured ones never hold state."""
    return [type(method).model_validate(method.model_dump()) for method in stage.methods if method.active]


def say_facts(name: str, facts: dict[str, Any], say: Say) -> None:
    """One line about a trained stage, and the methods' notes."""
    share = facts["trained_parameters"] / facts["parameters"]
    rate = facts["tokens"] / max(facts["train_seconds"], 1e-9)
    trained = f"{facts['steps']} steps, {share:.0%} of {facts['parameters']:,} parameters"
    scoring = facts["within"].get("seconds", 0) / max(facts["train_seconds"], 1e-9)
    took = f"{facts['train_seconds']:.1f} s" + (f" ({scoring:.1%} of it scoring)" if scoring else "")
    say(f"  {name}: {trained}, {took}, {rate:,.0f} tokens/s")
    for method, found in facts["methods"].items():
        if "note" in found:
            say(f"  {method}: {found['note']}")
    for reward, found in facts.get("rewards", {}).items():
        if found["raised"]:
            share = f"{found['raised']} of {found['rows']} completions"
            say(f"  warning: reward {reward} raised on {share}, which score 0: {found['first']}")


def _say_counts(counts: dict[str, dict[str, int]], say: Say) -> None:
    for name, found in counts.items():
        for kind, text in (
            ("dropped_too_long", "prompts leave no room for a completion in the model's context and are left out"),
            ("dropped_without_target", "rows have no answer left within max_length and are left out"),
            ("truncated", "rows are cut at max_length"),
            ("lost_characters", "characters do not survive the tokenizer"),
        ):
            if found.get(kind):
                say(f"  warning: {name}: {found[kind]} {text} ({found['rows']} rows)")


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
