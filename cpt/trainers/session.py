"""What every trained stage shares around its trainer: arguments, checkpoints found, callbacks, log, facts."""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import DistributedType
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from cpt.checkpoints import newest
from cpt.errors import ConfigError, RunDirError
from cpt.methods.base import Method, StageInfo
from cpt.processes import Processes, check_launch
from cpt.quiet import CALLBACKS
from cpt.trainers import deepspeed


@dataclass
class Trained:
    """What a finished stage hands back: the model, to be saved and dropped, and what its record should say.

    trainer: the trainer itself, for gathering weights that are spread over processes.
    """

    model: Any
    trainer: Any
    facts: dict[str, Any]
    stopped: bool


class Watch(Protocol):
    """What scores the model while it trains and changes nothing of it; `cpt.within.Watch` is one."""

    def begin(self, steps: int, reached: int, spread: str | None = None) -> None:
        """Before step `reached + 1` of `steps`. spread: what leaves each process a part of every weight, if any."""

    def at(self, step: int, model: Any, context: AbstractContextManager[Any]) -> bool:
        """After so many steps, in training's precision. Returns False where the logits are not numbers."""

    def facts(self) -> dict[str, Any]:
        """What the stage's record says of it."""


@dataclass(frozen=True)
class Session:
    """Where a stage is trained and who is told: its folder, when to stop, who hears of log lines, who scores.

    on_step: hears of each optimizer step on the first process, as (taken so far, in all), once before the first.
    """

    folder: Path
    should_stop: Callable[[], bool]
    on_log: Callable[[dict[str, Any]], None]
    processes: Processes = field(default_factory=Processes)
    watch: Watch | None = None
    on_step: Callable[[int, int], None] = lambda step, steps: None

    @property
    def checkpoints(self) -> Path:
        """Where the trainer writes."""
        return self.folder / "checkpoints"


def arguments(config: type, training: dict[str, Any], folder: Path, seed: int, decided: dict[str, Any]) -> Any:
    """TRL's arguments for a stage: the user's, over defaults that fit the machine, under what a stage decides.

    Raises ConfigError for values that TRL refuses.
    """
    cuda = torch.cuda.is_available() and not training.get("use_cpu")
    defaults: dict[str, Any] = {"logging_steps": 10, "disable_tqdm": True, "report_to": "none"}
    defaults["run_name"] = "/".join([*folder.parts[-4:-3], *folder.parts[-2:-1]])  # RUN/NN_NAME, to trackers
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:  # what is not trained has no gradient to wait for
        defaults["ddp_find_unused_parameters"] = False
    if not cuda:  # TRL's defaults (bf16, checkpointing) are a GPU's and raise here
        defaults |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    always = {
        "remove_unused_columns": False,
        "save_strategy": "steps",
        "eval_strategy": "no",
        # NaN is watched on the device; the trainer's own filter waits for every step's loss.
        "logging_nan_inf_filter": False,
    }
    for flag, package in (("use_vllm", "vllm"), ("use_liger_kernel", "liger_kernel")):
        if training.get(flag) and find_spec(package) is None:
            raise ConfigError(f"training.{flag} = true: needs the package {package}, which is not installed")
    try:
        made = config(output_dir=str(folder), seed=seed, data_seed=seed, **(defaults | training | always | decided))
        get_reporting_integration_callbacks(made.report_to)
    except ImportError as error:  # importlib.metadata's PackageNotFoundError among them
        missing = getattr(error, "name", None) or str(error)
        raise ConfigError(f"training: these arguments need a package that is not installed: {missing}") from error
    except ValueError as error:  # a value that the field's type does not tell apart, e.g. a scheduler's name
        raise ConfigError(f"training: TRL refuses these arguments: {error}") from error
    return made


def prepared(open_model: Callable[[], Any], args: Any, methods: Sequence[Method], stage: StageInfo) -> Any:
    """The model as the stage's methods want it, on the weights that the stage starts from."""
    deepspeed.meet(args)
    torch.manual_seed(stage.seed)
    stage = replace(stage, device=args.device)
    if stage.record is not None:
        precision = next((name for name in ("bf16", "fp16") if getattr(args, name)), None)
        stage = replace(stage, record=partial(stage.record, precision=precision, device=args.device))
    model = open_model()
    for method in methods:
        model = method.prepare_model(model, stage)
    return model


def train_to_end(trainer: Any, methods: Sequence[Method], session: Session) -> Trained:
    """Run the trainer from its newest checkpoint, or from the start, to its last step or until a stop is asked for.

    Raises TrainingError on a loss that is not a number, RunDirError on a
    checkpoint that is damaged or was written by another number of processes.
    """
    checkpoint = session.processes.on_main(lambda: _to_go_on_from(session.checkpoints, trainer.args.world_size))
    accelerator = trainer.accelerator
    check_launch(
        accelerator.distributed_type.value,
        accelerator.num_processes,
        deepspeed=bool(trainer.args.deepspeed),
        fsdp=bool(trainer.args.fsdp),
    )
    main = trainer.accelerator.is_main_process
    log = MetricsLog(session.folder / "metrics.jsonl", checkpoint, session.on_log) if main else None
    for callback in [c for c in trainer.callback_handler.callbacks if type(c).__name__ in CALLBACKS]:
        trainer.remove_callback(callback)
    _keep_tracked(trainer, session.folder)
    trainer.add_callback(_StageCallback(trainer, session, log))
    if trainer.rates is not None and checkpoint is not None:
        session.processes.on_main(lambda: trainer.rates.keep(checkpoint))  # a kill may have come between the two
    started = time.perf_counter()
    if session.watch is not None:
        session.watch.begin(trainer.args.max_steps, _step_of(checkpoint), spreads_weights(trainer.args))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    _end_tracking(trainer.args.report_to)
    trainer.refuse_nan(weights=True)
    facts = _facts(trainer, methods, time.perf_counter() - started, checkpoint)
    facts["within"] = session.watch.facts() if session.watch else {"left_out": "evaluation.within is off"}
    stopped = trainer.state.global_step < trainer.args.max_steps
    return Trained(trainer.accelerator.unwrap_model(trainer.model), trainer, facts, stopped)


def close(trained: Trained) -> None:
    """Drop the trainer, its engine and the model; all ranks."""
    trainer, trained.trainer, trained.model = trained.trainer, None, None
    deepspeed.release(trainer)
    trainer.accelerator.free_memory()


def spreads_weights(args: Any) -> str | None:
    """What of these trainer arguments, or of the launcher, leaves each process a part of every weight, if anything."""
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.hf_ds_config.is_zero3():
        return "ZeRO-3"
    return "FSDP" if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" else None


def _to_go_on_from(folder: Path, world: int) -> Path | None:
    """The newest checkpoint. Every process keeps its random state in a file of it: as many must read as wrote."""
    checkpoint = newest(folder)
    if checkpoint is None:
        return None
    writers = max(1, len(list(checkpoint.glob("rng_state_*.pth"))))
    if writers != world:
        raise RunDirError(
            f"{checkpoint}: was written by {writers} processes, and {world} are running: a stage goes on with as many "
            f"as it began with. Start {writers}, or delete {checkpoint.parent} to train the stage again from its start."
        )
    return checkpoint


def _facts(trainer: Any, methods: Sequence[Method], seconds: float, checkpoint: Any) -> dict[str, Any]:
    sizes = {name: _elements(p) for name, p in trainer.model.named_parameters()}
    trained = sum(sizes[name] for name, p in trainer.model.named_parameters() if p.requires_grad)
    facts = {
        "steps": trainer.args.max_steps,
        "resumed_from": checkpoint.name if checkpoint else None,
        "train_seconds": round(seconds, 3),
        "tokens": trainer.tokens_seen(),
        "parameters": sum(sizes.values()),
        "trained_parameters": trained,
        "bytes_written": trainer.bytes_written,
        "processes": trainer.accelerator.num_processes,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "arguments": _plain(trainer.args.to_dict()),
        "methods": {method.label: method.facts() for method in methods},
    }
    if trainer.accelerator.distributed_type != DistributedType.DEEPSPEED:  # DeepSpeed keeps it in shards
        state = getattr(trainer.optimizer, "state", {})
        facts["optimizer_state_elements"] = sum(
            t.numel() for entry in state.values() for t in entry.values() if torch.is_tensor(t) and t.numel() > 1
        )
    return facts


def _keep_tracked(trainer: Any, folder: Path) -> None:
    """TensorBoard's files lie in the stage's folder: its default is a folder that goes with the checkpoints."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder / "tensorboard")


def _end_tracking(report_to: Sequence[str]) -> None:
    """Close W&B's run: left open, the next stage would go on in it, with steps that W&B drops as past."""
    if "wandb" in report_to:
        import wandb

        wandb.finish()


def _elements(parameter: Any) -> int:
    """Elements of a tensor, also where ZeRO-3 holds a piece of it here, or bitsandbytes packs two of 4 bits in one."""
    if (packed := getattr(parameter, "quant_state", None)) is not None:
        return math.prod(packed.shape)
    return getattr(parameter, "ds_numel", parameter.numel())


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """What JSON holds of the trainer's arguments, tokens and folders left out."""
    simple = (bool, int, float, str, type(None))
    own = {key: value for key, value in arguments.items() if isinstance(value, simple)}
    return {key: value for key, value in own.items() if not key.endswith(("_token", "_dir")) and value == value}


class _StageCallback(TrainerCallback):
    """Weight edits after each step; scores within the stage; checkpoints and stops at boundaries; lines for the log."""

    def __init__(self, trainer: Any, session: Session, log: "MetricsLog | None") -> None:
        self.trainer, self.record, self.watch = trainer, log, session.watch
        self.should_stop, self.on_step = session.should_stop, session.on_step
        self.save_due = self.stop_due = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell(state)
        self._score(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.edit_weights()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell(state)
        self._score(state.global_step)  # its line is on the disk before a checkpoint of the step is
        if state.global_step >= state.max_steps:
            control.should_save = False  # the finished model is committed next
            return
        self.stop_due = self.stop_due or self.should_stop()
        keep = self.trainer.rates is not None and state.global_step == self.trainer.rates.keep_after
        self.save_due = self.save_due or control.should_save or self.stop_due or keep
        control.should_save = False
        if self.save_due and self.trainer.boundary(state.global_step):
            control.should_save, self.save_due = True, False
            control.should_training_stop = self.stop_due

    def _tell(self, state: Any) -> None:
        if self.record is not None:
            self.on_step(state.global_step, state.max_steps)

    def _score(self, step: int) -> None:
        if self.watch is None:
            return
        if not self.watch.at(step, self.trainer.model, self.trainer.accelerator.autocast()):
            self.trainer.refuse_nan(weights=True)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.record is not None:
            self.record.add({"step": state.global_step, **kwargs["logs"]})


class MetricsLog:
    """metrics.jsonl of a stage: one JSON object a line; lines beyond the checkpoint resumed from are cut."""

    def __init__(self, file: Path, checkpoint: Path | None, on_log: Callable[[dict[str, Any]], None]) -> None:
        self.file, self.on_log = file, on_log
        kept = [line for line in read_metrics(file) if line["step"] <= _step_of(checkpoint)]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def add(self, line: dict[str, Any]) -> None:
        """Append one line and tell the listener."""
        with open(self.file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        self.on_log(line)


def _step_of(checkpoint: Path | None) -> int:
    """Optimizer steps that a checkpoint was written after; 0 without one."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; an unfinished last line (a kill) is left out."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
