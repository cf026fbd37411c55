"""Train one sft or pretrain stage: rows to tokens, tokens to a plugged TRL trainer, and back."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks
from trl import SFTConfig, SFTTrainer

from cpt.checkpoints import newest
from cpt.data.collator import Collator
from cpt.data.sampler import MixedSampler, steps_for
from cpt.data.stage_data import TASK, StageData
from cpt.data.tokens import TokenSettings
from cpt.errors import ConfigError, DataError
from cpt.methods.base import Method, StageInfo
from cpt.quiet import CALLBACKS
from cpt.trainers.plug import plug

_TOKEN_FIELDS = (
    "max_length",
    "truncation_mode",
    "completion_only_loss",
    "assistant_only_loss",
    "packing",
    "packing_strategy",
)


@dataclass
class Trained:
    """What a finished stage hands back: the model, to be saved and dropped, and what its record should say."""

    model: Any
    facts: dict[str, Any]
    stopped: bool


def token_settings(training: dict[str, Any], prompt: Any) -> TokenSettings:
    """The part of the trainer arguments that decides how rows become tokens."""
    given = {key: training[key] for key in _TOKEN_FIELDS if key in training}
    return TokenSettings(**given, prompt=prompt)


def sft_config(training: dict[str, Any], folder: Path, seed: int) -> SFTConfig:
    """TRL's arguments for a stage: the user's, over defaults that fit the machine, under what a stage decides.

    Raises ConfigError for values that TRL refuses.
    """
    cuda = torch.cuda.is_available() and not training.get("use_cpu")
    defaults: dict[str, Any] = {"logging_steps": 10, "disable_tqdm": True, "report_to": "none"}
    if not cuda:  # TRL's defaults (bf16, checkpointing) are a GPU's and raise here
        defaults |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    decided = {
        # The rows are packed and masked already, by source: TRL must not do it again.
        "packing": False,
        "assistant_only_loss": False,
        "remove_unused_columns": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "save_strategy": "steps",
        "eval_strategy": "no",
        # NaN is watched on the device; the trainer's own filter waits for every step's loss.
        "logging_nan_inf_filter": False,
    }
    try:
        config = SFTConfig(output_dir=str(folder), seed=seed, data_seed=seed, **(defaults | training | decided))
        get_reporting_integration_callbacks(config.report_to)
    except ValueError as error:  # a value that the field's type does not tell apart, e.g. a scheduler's name
        raise ConfigError(f"training: TRL refuses these arguments: {error}") from error
    return config


def train(
    model: Any,
    tokenizer: Any,
    data: StageData,
    stage: StageInfo,
    methods: Sequence[Method],
    training: dict[str, Any],
    folder: Path,
    should_stop: Callable[[], bool],
    on_log: Callable[[dict[str, Any]], None],
) -> Trained:
    """Run the stage in `folder` (checkpoints/, metrics.jsonl), from its newest checkpoint if there is one.

    model comes in as the stage's parent left it and goes out trained. `stopped` is true when should_stop said
    so: a checkpoint is then written. Raises TrainingError on a loss that is not a number, RunDirError on a
    damaged checkpoint.
    """
    torch.manual_seed(stage.seed)
    for method in methods:
        model = method.prepare_model(model, stage)
    args = sft_config(training, folder / "checkpoints", stage.seed)
    _check_attention(model, args, training)
    task_rows = stage.batch_rows - sum(data.quotas.values())
    steps = args.max_steps if args.max_steps > 0 else steps_for(args.num_train_epochs, data.sizes[TASK], task_rows)
    args.max_steps = steps
    checkpoint = newest(folder / "checkpoints")
    log = MetricsLog(folder / "metrics.jsonl", checkpoint, on_log)
    trainer = plug(SFTTrainer)(
        model=model,
        args=args,
        train_dataset=data.dataset(),
        data_collator=Collator(
            tokenizer.pad_token_id, training.get("pad_to_multiple_of"), bool(training.get("packing"))
        ),
        processing_class=tokenizer,
        sampler=MixedSampler(data.sizes, data.quotas, stage.batch_rows, steps, stage.seed),
        methods=methods,
        stage=stage,
        origins=data.names,
    )
    for callback in [c for c in trainer.callback_handler.callbacks if type(c).__name__ in CALLBACKS]:
        trainer.remove_callback(callback)
    trainer.add_callback(_StageCallback(trainer, should_stop, log))
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.refuse_nan(weights=True)
    facts = _facts(trainer, methods, steps, time.perf_counter() - started, checkpoint)
    stopped = trainer.state.global_step < steps
    return Trained(trainer.accelerator.unwrap_model(trainer.model), facts, stopped)


def _check_attention(model: Any, args: SFTConfig, training: dict[str, Any]) -> None:
    flash = str(getattr(model.config, "_attn_implementation", "")).startswith("flash")
    if training.get("packing") and flash and args.per_device_train_batch_size > 1:
        raise DataError(
            "packing with flash attention tells packed rows apart only in batches of one row: set "
            "training.per_device_train_batch_size to 1 (and raise gradient_accumulation_steps), "
            "or model.attn_implementation to sdpa."
        )


def _facts(trainer: Any, methods: Sequence[Method], steps: int, seconds: float, checkpoint: Any) -> dict[str, Any]:
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    state = sum(t.numel() for entry in trainer.optimizer.state.values() for t in entry.values() if t.numel() > 1)
    return {
        "steps": steps,
        "resumed_from": checkpoint.name if checkpoint else None,
        "train_seconds": round(seconds, 3),
        "tokens": int(trainer._total_train_tokens),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "trained_parameters": trained,
        "optimizer_state_elements": state,
        "processes": trainer.accelerator.num_processes,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "arguments": _plain(trainer.args.to_dict()),
        "methods": {getattr(method, "name", method.type): method.facts() for method in methods},
    }


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """What JSON holds of the trainer's arguments, tokens and folders left out."""
    simple = (bool, int, float, str, type(None))
    own = {key: value for key, value in arguments.items() if isinstance(value, simple)}
    return {key: value for key, value in own.items() if not key.endswith(("_token", "_dir")) and value == value}


class _StageCallback(TrainerCallback):
    """Weight edits after each step, a checkpoint and a stop when asked, and lines for the log."""

    def __init__(self, trainer: Any, should_stop: Callable[[], bool], log: "MetricsLog") -> None:
        self.trainer, self.should_stop, self.record = trainer, should_stop, log

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.edit_weights()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_save = False  # the finished model is committed next
        elif self.should_stop():
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.record.add({"step": state.global_step, **kwargs["logs"]})


class MetricsLog:
    """metrics.jsonl of a stage: one JSON object a line; lines beyond the checkpoint resumed from are cut."""

    def __init__(self, file: Path, checkpoint: Path | None, on_log: Callable[[dict[str, Any]], None]) -> None:
        self.file, self.on_log = file, on_log
        reached = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        kept = [line for line in read_metrics(file) if line["step"] <= reached]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def add(self, line: dict[str, Any]) -> None:
        """Append one line and tell the listener."""
        with open(self.file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        self.on_log(line)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; an unfinished last line (a kill) is left out."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
