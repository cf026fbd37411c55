"""Which arguments of TRL's trainers a stage may set: names and types from the installed TRL, less what cpt decides."""

from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from cpt.data.spec import refuse
from cpt.suggest import did_you_mean
from cpt.upstream_fields import CHOICES, check_fields, choices, known

# Which of TRL's configuration classes a stage's `training` holds fields of.
CONFIGS = {
    "sft": "trl:SFTConfig",
    "pretrain": "trl:SFTConfig",
    "rft": "trl:GRPOConfig",
    "unlearn": "trl:SFTConfig",
    "sdft": "trl.experimental.sdft:SDFTConfig",
}

# Decided elsewhere, so that two places never disagree: field -> who decides.
OWNED = {
    "output_dir": "the run directory decides where files go (output_dir of the stream)",
    "seed": "every stage derives its seed from the stream's `seed`",
    "data_seed": "every stage derives its seed from the stream's `seed`",
    "do_train": "a stage always trains",
    "do_eval": "measured after the stage by `evaluation`",
    "do_predict": "measured after the stage by `evaluation`",
    "eval_strategy": "measured after the stage by `evaluation`",
    "eval_steps": "measured after the stage by `evaluation`",
    "eval_on_start": "measured after the stage by `evaluation`",
    "eval_packing": "measured after the stage by `evaluation`",
    "load_best_model_at_end": "a stage ends with its last weights",
    "resume_from_checkpoint": "`cpt run` finds the checkpoint itself",
    "save_strategy": "checkpoints are written every `save_steps`; SIGTERM writes one more",
    "save_only_model": "a checkpoint must be enough to resume from",
    "restore_callback_states_from_checkpoint": "`cpt run` restores what a stage needs",
    "ignore_data_skip": "resume repeats no row",
    "logging_nan_inf_filter": "a loss that is not a number always stops the stage",
    "remove_unused_columns": "the stage prepares its own rows",
    "dataset_kwargs": "the stage prepares its own rows",
    "dataset_text_field": "rows are recognised by their fields; map others with `fields:` of the source",
    "dataset_num_proc": "the stage prepares its own rows",
    "shuffle_dataset": "rows are drawn by the stage's own seeded sampler",
    "train_sampling_strategy": "rows are drawn by the stage's own seeded sampler",
    "length_column_name": "rows are drawn by the stage's own seeded sampler",
    "dataloader_drop_last": "every effective batch is full",
    "auto_find_batch_size": "the effective batch is part of what a stage is",
    "padding_free": "packing keeps rows apart by position; use `packing: true`",
    "model_init_kwargs": "say it under the stream's `model:`",
    "trust_remote_code": "say it under the stream's `model:`",
    "chat_template_path": "say it under the stream's `tokenizer:`",
    "pad_token": "say it under the stream's `tokenizer:`",
    "eos_token": "a stage ends answers with the tokenizer's own end token",
    "label_smoothing_factor": "TRL deprecates it, and it hides token losses from methods",
    "accelerator_config": "rows are drawn by the stage's own seeded sampler",
    "dataloader_in_order": "rows are drawn by the stage's own seeded sampler",
    "enable_jit_checkpoint": "SIGTERM writes a checkpoint already",
    "label_names": "the stage prepares its own rows",
    "local_rank": "the launcher decides",
    "ddp_backend": "the processes have met before the trainer begins",
    "ddp_timeout": "the processes have met before the trainer begins",
    "debug": "tracks what only trainer evaluation and TPUs have",
    "eval_delay": "measured after the stage by `evaluation`",
    "per_device_eval_batch_size": "measured after the stage by `evaluation`",
    "prediction_loss_only": "measured after the stage by `evaluation`",
    "eval_do_concat_batches": "measured after the stage by `evaluation`",
    "eval_use_gather_object": "measured after the stage by `evaluation`",
    "eval_accumulation_steps": "measured after the stage by `evaluation`",
    "include_for_metrics": "measured after the stage by `evaluation`",
    "batch_eval_metrics": "measured after the stage by `evaluation`",
    "metric_for_best_model": "measured after the stage by `evaluation`",
    "greater_is_better": "measured after the stage by `evaluation`",
    "bf16_full_eval": "measured after the stage by `evaluation`",
    "fp16_full_eval": "measured after the stage by `evaluation`",
    "hub_token": "export the stage you want with `cpt export`, then push that folder",
    "hub_private_repo": "export the stage you want with `cpt export`, then push that folder",
    "hub_model_id": "export the stage you want with `cpt export`, then push that folder",
    "hub_strategy": "export the stage you want with `cpt export`, then push that folder",
    "hub_always_push": "export the stage you want with `cpt export`, then push that folder",
    "hub_revision": "export the stage you want with `cpt export`, then push that folder",
    "push_to_hub": "export the stage you want with `cpt export`, then push that folder",
}


# GRPOConfig's alone.
OWNED |= {
    "beta": "say it under the stream's `kl:`",
    "sync_ref_model": "the reference of `kl:` is the base or the stage's start",
    "ref_model_mixup_alpha": "the reference of `kl:` is the base or the stage's start",
    "ref_model_sync_steps": "the reference of `kl:` is the base or the stage's start",
    "reward_weights": "say it as `weight:` of each reward",
    "num_generations_eval": "measured after the stage by `evaluation`",
    "log_completions_hub_repo": "completions stay in the run directory",
    "chat_template_kwargs": "prompts are rendered as the evaluation renders them: change the stream's `tokenizer:`",
    "max_tool_calling_iterations": "a stage's rows bring no tools",
    "log_multimodal": "a stage's rows are text",
    "use_transformers_paged": "TRL deprecates it: `use_transformers_continuous_batching`",
    "vllm_importance_sampling_cap": "TRL deprecates it: `vllm_importance_sampling_clip_max`",
}

# SDFTConfig's alone.
OWNED |= {
    "max_prompt_length": "no prompt is cut: rows that leave no room for a completion are left out and counted",
    "use_teacher_server": "the teacher is a model of the stage's own processes",
}

# What of these makes no sense, in words; the trainer would fail deep inside, or train something else in silence.
_IN_WORDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps"),
        (lambda value: value >= 0, "must be at least 0"),
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (lambda value: 0 <= value < 1, "must be at least 0 and below 1")),
    "max_steps": (lambda value: value > 0 or value == -1, "must be greater than 0; left out, num_train_epochs decides"),
    **dict.fromkeys(("num_train_epochs", "distillation_is_clip"), (lambda value: value > 0, "must be greater than 0")),
    **dict.fromkeys(
        ("distillation_alpha", "teacher_update_rate"), (lambda value: 0 <= value <= 1, "must be from 0 to 1")
    ),
    "num_loss_tokens_to_skip": (lambda value: value >= 0, "must be at least 0"),
}

# Zero or less of these would fail deep inside the trainer.
_POSITIVE = {
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "save_steps",
    "logging_steps",
    "max_length",
    "pad_to_multiple_of",
    "num_generations",
    "num_iterations",
    "steps_per_generation",
    "generation_batch_size",
    "max_completion_length",
    "temperature",
    "distillation_topk",
    "teacher_sync_steps",
}


def check_training(training: dict[str, Any], kind: str) -> dict[str, Any]:
    """A stage's own arguments, checked against its kind's trainer.

    Raises a pydantic ValidationError whose locations are the fields' names, all problems at once.
    """
    if not training:
        return training
    checked = check_fields(training, CONFIGS[kind], owned=OWNED, positive=_POSITIVE)
    found: list[tuple[tuple[str], Any, str]] = [
        ((name,), value, _IN_WORDS[name][1])
        for name, value in checked.items()
        if name in _IN_WORDS and isinstance(value, int | float) and not _IN_WORDS[name][0](value)
    ]
    for name in CHOICES & checked.keys():
        given = checked[name] if isinstance(checked[name], list) else [checked[name]]
        for value in given:
            if isinstance(value, str) and value not in (known := choices(name)):
                found.append(
                    ((name,), value, f"is none of its values.{did_you_mean(value, known)} Known: {', '.join(known)}.")
                )
    if checked.get("bf16") and checked.get("fp16"):
        found.append((("fp16",), True, "excludes bf16, which is true too: keep one"))
    refuse(*found)
    return checked


def check_shared(training: dict[str, Any]) -> dict[str, Any]:
    """A stream's arguments for all its stages: each must be a field of one kind's trainer.

    Raises as `check_training`.
    """
    parts: dict[str, dict[str, Any]] = {"sft": {}, "rft": {}, "sdft": {}}
    for name, value in training.items():
        parts[_kind_of(name)][name] = value
    checked: dict[str, Any] = {}
    found = []
    for kind, part in parts.items():
        try:
            checked |= check_training(part, kind)
        except ValidationError as error:
            found += [(e["loc"], e["input"], e["msg"]) for e in error.errors()]
    refuse(*found)
    return {name: checked[name] for name in training}


def _kind_of(name: str) -> str:
    """The first kind whose trainer has the field, else the one that has a field spelt nearly so, else sft."""
    kinds = ("sft", "rft", "sdft")
    having = (kind for kind in kinds if name in known(CONFIGS[kind]))
    if (found := next(having, None)) is not None:
        return found
    if name in OWNED:
        return "rft"
    return next((kind for kind in kinds if did_you_mean(name, known(CONFIGS[kind]))), "sft")


def fitting(training: dict[str, Any], kind: str) -> dict[str, Any]:
    """The part of a stream's arguments that a stage of this kind has a field for."""
    return {name: value for name, value in training.items() if name in known(CONFIGS[kind])}
