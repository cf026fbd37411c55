"""The fields of TRL's SFTConfig by name, known without importing it.

Importing SFTConfig costs seconds (it brings torch), so its field names and simple types are read once per
installed version in a process of their own, and kept in the user's cache.
"""

import json
import os
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Union

from pydantic import StrictBool, TypeAdapter, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from cpt.suggest import did_you_mean

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

# Zero or less of these would fail deep inside the trainer.
_POSITIVE = {
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "save_steps",
    "logging_steps",
    "max_length",
    "pad_to_multiple_of",
}

_READ = """
import dataclasses, json, sys
from trl import SFTConfig
fields = {f.name: f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type))
          if not hasattr(f.type, "__args__") else str(f.type) for f in dataclasses.fields(SFTConfig) if f.init}
json.dump(fields, sys.stdout)
"""


def cache_file() -> Path:
    """Where the names of the installed versions are kept."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "cpt" / f"sft_config-trl{version('trl')}-transformers{version('transformers')}.json"


@cache
def known() -> dict[str, str]:
    """Field name -> annotation of every field of the installed SFTConfig."""
    file = cache_file()
    if not file.exists():
        print("reading the field names of TRL's SFTConfig (once per installed version) ...", file=sys.stderr)
        found = subprocess.run([sys.executable, "-c", _READ], capture_output=True, text=True, check=False)
        if found.returncode:
            raise RuntimeError(f"could not import trl.SFTConfig:\n{found.stderr[-2000:]}")
        file.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed: two first runs at once must not read half a file.
        aside = file.with_suffix(f".{os.getpid()}")
        aside.write_text(found.stdout, encoding="utf-8")
        aside.replace(file)
    return json.loads(file.read_text(encoding="utf-8"))


_SIMPLE: dict[str, Any] = {"int": int, "float": float, "bool": StrictBool, "str": str}


@cache
def _adapter(annotation: str) -> TypeAdapter[Any] | None:
    """A check for annotations made of int, float, bool, str and None; None for richer ones."""
    parts = [part.strip() for part in annotation.replace("Optional[", "None|").rstrip("]").split("|")]
    if not all(part in _SIMPLE or part == "None" for part in parts):
        return None
    kinds = tuple(type(None) if part == "None" else _SIMPLE[part] for part in parts)
    union: Any = Union[kinds]  # noqa: UP007  (made of a tuple)
    return TypeAdapter(union)


def check_training(training: dict[str, Any]) -> dict[str, Any]:
    """Refuse unknown fields, fields decided elsewhere and values of a wrong type, all at once.

    Raises a pydantic ValidationError whose locations are the fields' names.
    """
    if not training:
        return training
    checked, problems = {}, []
    for name, value in training.items():
        sentence, checked[name] = _check_field(name, value)
        if sentence:
            error = PydanticCustomError("cpt", "{sentence}", {"sentence": sentence})
            problems.append(InitErrorDetails(type=error, loc=(name,), input=value))
    if problems:
        raise ValidationError.from_exception_data("training", problems)
    return checked


def _check_field(name: str, value: Any) -> tuple[str, Any]:
    if name in OWNED:
        return f"is not for a stage to set: {OWNED[name]}", value
    if name not in known():
        return f"is no field of TRL {version('trl')}'s SFTConfig.{did_you_mean(name, known())}", value
    adapter = _adapter(known()[name])
    if adapter is None:
        return "", value
    try:
        checked = adapter.validate_python(value)
    except ValidationError:
        return f"must be of type {known()[name]}", value
    return ("must be greater than 0" if name in _POSITIVE and checked is not None and checked <= 0 else ""), checked
