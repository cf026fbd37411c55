"""A stage's LoRA on a model: added reproducibly, tried on the model's skeleton first, saved without the weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpt.adapters.spec import ON_HEAD, Adapter
from cpt.errors import ConfigError
from eval_harness.adapters import activate, adapter_state, add, attach, lora_config, refuse_misfit
from eval_harness.lineage import ADAPTER_CONFIG, ADAPTER_WEIGHTS, FILE, Lineage, LoadError, Part

TRAINED = "default"  # the name of the adapter in training: TRL's GRPOTrainer knows it by this one


def put_on(model: Any, earlier: list[str], newest: Part, adapter: Adapter, seed: int) -> Any:
    """The model with the stage's adapter in training and `earlier` ones active and frozen; returns the PeftModel.

    A new adapter's tensors depend on the seed alone, and the global random state stays as it was. Raises LoadError.
    """
    import torch
    from peft import LoraConfig

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if newest.folder is not None:
            model = attach(model, newest.folder, TRAINED)
        else:
            model = add(model, LoraConfig(task_type="CAUSAL_LM", **adapter.lora), TRAINED, "adapter.lora")
    activate(model, [*earlier, TRAINED], trained=TRAINED)
    return model


def grown(lineage: Lineage, adapter: Adapter, stage: str) -> Lineage:
    """The lineage of what a stage makes of a model; the newest adapter, which it trains, comes last.

    stage: name of its folder, 02_sums. A continued adapter keeps its folder until the stage saves it anew.
    """
    parts = lineage.adapters
    if adapter.mode == "continue":
        last = parts[-1]
        newest = Part(stage, last.folder, trained_in=(*last.trained_in, stage))
        return replace(lineage, adapters=(*parts[:-1], newest))
    if adapter.mode == "merge_then_new":
        parts = lineage.all_merged().adapters
    return replace(lineage, adapters=(*parts, Part(stage, None, trained_in=(stage,))))


def save_adapters(model: Any, lineage: Lineage, folder: Path, state_dict: dict[str, Any] | None) -> None:
    """Write lineage.json and adapters/NN_NAME for each adapter: the trained one from the model, earlier ones copied.

    state_dict: the whole model's tensors where they had to be gathered (ZeRO-3). Equal models give equal bytes.
    """
    from safetensors.torch import save_file

    for part in lineage.adapters[:-1]:
        to = folder / "adapters" / part.name
        to.mkdir(parents=True)
        assert part.folder is not None
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copyfile(part.folder / name, to / name)
    to = folder / "adapters" / lineage.adapters[-1].name
    to.mkdir(parents=True)
    state = {key: tensor.detach().cpu().clone() for key, tensor in adapter_state(model, TRAINED, state_dict).items()}
    save_file(state, to / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    _write(to / ADAPTER_CONFIG, config_json(model.peft_config[TRAINED], lineage.weights))
    _write(folder / FILE, lineage.to_json())


def config_json(config: Any, base: str) -> dict[str, Any]:
    """A LoraConfig as adapter_config.json, for adapters on `base`; sets are sorted, so equal ones give equal bytes."""
    fixed = {"base_model_name_or_path": base, "inference_mode": True}
    return {key: sorted(v) if isinstance(v, set) else v for key, v in (config.to_dict() | fixed).items()}


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def try_on_skeleton(model: Any, parts: tuple[Part, ...], adapter: Adapter | None) -> None:
    """Put a start's adapters and a stage's own on a model without weights (meta device).

    Raises ConfigError for LoRA that matches no module or lies on the head, for LoRA on an embedding that is tied to
    the head, and for a start's adapter whose tensors the model has no place for.
    """
    for part in parts:
        assert part.folder is not None
        _try_part(model, part.folder)
    if adapter is None or adapter.mode == "continue":
        return
    from peft import LoraConfig

    try:
        config = LoraConfig(task_type="CAUSAL_LM", **adapter.lora)
        _refuse_head(add(model, config, TRAINED, "lora"), "lora.target_modules")
    except LoadError as error:
        raise ConfigError(str(error)) from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"lora: PEFT refuses it: {error}") from error


def _try_part(model: Any, folder: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        on_it = add(model, lora_config(folder), TRAINED, str(folder))
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        refuse_misfit(adapter_state(on_it, TRAINED), shapes, folder)
    except (LoadError, SafetensorError, OSError) as error:
        raise ConfigError(str(error)) from error
    _refuse_head(on_it, str(folder))
    on_it.unload()


def _refuse_head(model: Any, place: str) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if isinstance(model.get_output_embeddings(), BaseTunerLayer | ModulesToSaveWrapper):
        raise ConfigError(f"{place}: reaches the head of the model: {ON_HEAD}. Leave it out, or merge it first.")
    tied = getattr(model.config, "tie_word_embeddings", False)
    if tied and isinstance(model.get_input_embeddings(), BaseTunerLayer | ModulesToSaveWrapper):
        raise ConfigError(
            f"{place}: reaches the input embedding, which this model ties to its head: merged, it would change both. "
            "Leave it out."
        )
