"""LoRA tensors onto a model and into its weights, by PEFT, with everything checked that PEFT only warns of."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval_harness.lineage import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LoadError, read_adapter_config

# What changes the weights beneath, or depends on the prompt: such an adapter is not what its own tensors say.
_FOREIGN = (
    "layer_replication",
    "megatron_config",
    "alora_invocation_tokens",
    "use_qalora",
    "monteclora_config",
    "velora_config",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
)
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal")  # of init_lora_weights; others change the weights


def attach(model: Any, folder: Path, name: str) -> Any:
    """Put the adapter in a PEFT folder on a model, beside those that are there; returns the PeftModel.

    Raises:
        LoadError: not a LoRA we read, or a tensor that the model has no place for, lacks, or has in another shape.
    """
    from peft import set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    model = add(model, lora_config(folder), name, str(folder))
    try:
        state = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise LoadError(f"{folder / ADAPTER_WEIGHTS}: cannot be read ({type(error).__name__}: {error})") from error
    refuse_misfit(adapter_state(model, name), {key: tuple(tensor.shape) for key, tensor in state.items()}, folder)
    set_peft_model_state_dict(model, state, adapter_name=name)
    return model


def add(model: Any, config: Any, name: str, place: str) -> Any:
    """Put a new adapter of PEFT's LoraConfig on a model, inactive beside others; returns the PeftModel.

    Its tensors are float32 on 16-bit weights, as PEFT has it, but under ZeRO-3, which wants one dtype (as TRL has it).

    Raises:
        LoadError: PEFT finds no such modules, or refuses the combination; `place` leads the sentence.
    """
    from peft import PeftModel, get_peft_model
    from transformers.integrations import is_deepspeed_zero3_enabled

    cast = not is_deepspeed_zero3_enabled()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*ensure_weight_tying.*")
            if isinstance(model, PeftModel):
                model.add_adapter(name, config, autocast_adapter_dtype=cast)
                return model
            return get_peft_model(model, config, adapter_name=name, autocast_adapter_dtype=cast)
    except (ValueError, TypeError) as error:
        raise LoadError(f"{place}: {error}") from error


def lora_config(folder: Path) -> Any:
    """The LoraConfig of a PEFT folder. Raises LoadError for one that changes the weights beneath it."""
    from peft import LoraConfig

    content = read_adapter_config(folder)
    changed = [key for key in _FOREIGN if content.get(key)]
    start = content.get("init_lora_weights")
    if not isinstance(start, bool) and start not in PLAIN_STARTS:
        changed.append(f"init_lora_weights: {start}")
    if content.get("bias", "none") != "none":
        changed.append(f"bias: {content['bias']}")
    if changed:
        raise LoadError(
            f"{folder / ADAPTER_CONFIG}: {', '.join(changed)}: such an adapter changes more than it holds; "
            "merge it where it was trained, or convert it to a plain LoRA with PEFT"
        )
    config = LoraConfig.from_pretrained(str(folder))
    config.base_model_name_or_path, config.task_type, config.inference_mode = None, "CAUSAL_LM", False
    return config


def adapter_state(model: Any, name: str, state_dict: dict[str, Any] | None = None) -> dict[str, Any]:
    """The tensors of one adapter by their names in a PEFT file; state_dict: the whole model's, where gathered."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, state_dict=state_dict, adapter_name=name, save_embedding_layers=False)


def refuse_misfit(model: Mapping[str, Any], file: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Raise LoadError, naming the first few, unless a file's tensors are those that the model has places for."""
    problems = [f"{key} has no module" for key in file if key not in model]
    problems += [f"{key} is missing" for key in model if key not in file]
    for key, shape in file.items():
        if key in model and shape != tuple(model[key].shape):
            problems.append(f"{key} is {list(shape)} and must be {list(model[key].shape)}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise LoadError(
            f"{folder}: was made for another model: {'; '.join(problems[:3])}{more}. Give the base it was trained on."
        )


def merge(model: Any, place: str) -> Any:
    """Merge a PeftModel's adapters into its weights; returns the plain model.

    Raises:
        LoadError: the merged weights are not finite, or they lie in shards.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise LoadError(f"{place}: adapters cannot be merged into weights that ZeRO-3 has split: use ZeRO-2 or export")
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # NaN in the sum
        raise LoadError(f"{place}: cannot be merged: {error}") from error


def activate(model: Any, names: Sequence[str], trained: str | None = None) -> None:
    """Make every adapter of `names` active, and only `trained` learn.

    The newest comes first: what asks PEFT for one name gets that one, and sums keep one order.
    """
    newest_first = list(reversed(names))
    model.set_adapter(newest_first[0])  # the PeftModel's own record, which the next line does not keep
    model.base_model.set_adapter(newest_first)
    model.set_requires_grad(names, requires_grad=False)
    if trained is not None:
        model.set_requires_grad(trained)
