"""What a stage says of its adapter, checked without importing PEFT, and whether the stages' adapters fit together."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from cpt.data.spec import Strict, refuse
from cpt.upstream_fields import check_fields
from eval_harness.quantization import INSTALL, is_installed

if TYPE_CHECKING:
    from cpt.config import ModelSpec, Stage

Problem = tuple[tuple[str | int, ...], Any, str]  # location, value, sentence

DEFAULTS: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}

# Fields of LoraConfig that have one right value here: said, they are dropped; said otherwise, they are refused.
_ONE_VALUE = {"task_type": "CAUSAL_LM", "peft_type": "LORA", "inference_mode": False, "bias": "none"}

_BENEATH = "it changes the weights beneath the adapter, which then is not what its own tensors say"
_NEVER_MERGED = "such an adapter cannot be merged into the weights, and a later stage or an export may need that"
OWNED = {
    "task_type": "stages train causal language models",
    "peft_type": "a stage's adapter is a LoRA",
    "inference_mode": "a stage trains its adapter, and everything else loads it frozen",
    "bias": "biases of the weights are shared by all adapters and cannot be taken apart from them",
    "base_model_name_or_path": "the stream's `model.path` is the base; lineage.json records it",
    "revision": "say it under the stream's `model:`",
    "auto_mapping": "stages train causal language models",
    "peft_version": "the installed one writes it",
    "runtime_config": "it is not saved, so another load would differ",
    "layer_replication": _BENEATH,
    "loftq_config": _BENEATH,
    "corda_config": _BENEATH,
    "eva_config": "it needs a pass over data before training",
    "lora_ga_config": _BENEATH,
    "kasa_config": _BENEATH,
    "lora_bias": _NEVER_MERGED,
    "alora_invocation_tokens": _NEVER_MERGED,
    "use_qalora": _NEVER_MERGED,
    "qalora_group_size": _NEVER_MERGED,
    "arrow_config": "it routes between adapters, and a lineage has one order",
    "megatron_config": "models are those of transformers",
    "megatron_core": "models are those of transformers",
    "monteclora_config": "it draws weights at random while training, outside the stage's seed",
    "velora_config": "it approximates gradients, which methods edit",
    "use_bdlora": "it is for serving over several devices",
}
HEADS = ("lm_head", "embed_out")
ON_HEAD = "TRL reads the head's weight directly, so an adapter on it would never be trained"
STARTS = (True, False, "gaussian", "orthogonal")

# With one of these an adapter is more than a sum beside the weights, so it cannot stand under or on another one.
_ALONE = ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters")


class Adapter(Strict):
    """A LoRA that a stage trains instead of the weights: which one, and for a new one its shape."""

    mode: Literal["continue", "new", "merge_then_new"] = Field(
        description="train the newest adapter on; add one on top; merge what is there and add one"
    )
    lora: dict[str, Any] = Field({}, description="any field of PEFT's LoraConfig; not with continue")

    @model_validator(mode="after")
    def _lora_fits(self) -> "Adapter":
        if self.mode == "continue":
            text = "means nothing with continue: the adapter keeps the shape it was made with"
            refuse(*[(("lora", name), value, text) for name, value in self.lora.items()])
            return self
        given = {k: v for k, v in self.lora.items() if not (k in _ONE_VALUE and v == _ONE_VALUE[k])}
        found: list[Problem] = []
        try:
            given = check_fields(given, "peft:LoraConfig", owned=OWNED, positive=("r", "lora_alpha"))
        except ValidationError as error:
            found += [(("lora", *e["loc"]), e["input"], e["msg"]) for e in error.errors()]
        refuse(*found, *_lora_problems(given))
        object.__setattr__(self, "lora", DEFAULTS | given)
        return self


def _as_adapter(value: Any) -> Any:
    return {"mode": value} if isinstance(value, str) else value


StageAdapter = Annotated[Adapter, BeforeValidator(_as_adapter, json_schema_input_type=str | Adapter)]


def _lora_problems(lora: dict[str, Any]) -> list[Problem]:
    """What field types do not say."""
    found: list[Problem] = []
    for key in sorted({"target_modules", "modules_to_save"} & lora.keys()):
        names = [lora[key]] if key == "target_modules" and isinstance(lora[key], str) else lora[key]
        if key == "modules_to_save" and names is None:
            continue
        if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
            either = " or all-linear" if key == "target_modules" else ""
            found.append((("lora", key), lora[key], f"must be a list of module names{either}"))
        elif on_head := [name for name in names if name.rpartition(".")[2] in HEADS]:
            found.append((("lora", key), on_head[0], f"{ON_HEAD}. Leave it out."))
    dropout = lora.get("lora_dropout", 0.0)
    if isinstance(dropout, float) and not 0 <= dropout < 1:
        found.append((("lora", "lora_dropout"), dropout, "must be at least 0 and less than 1"))
    start = lora.get("init_lora_weights", True)
    if start not in STARTS:
        known = ", ".join(str(one).lower() for one in STARTS)
        found.append((("lora", "init_lora_weights"), start, f"is not for a stage to set: {_BENEATH}. Use {known}."))
    return found


def stands_alone(lora: dict[str, Any]) -> str | None:
    """The field because of which an adapter cannot be active together with another, or None."""
    return next((name for name in _ALONE if lora.get(name)), None)


def not_new(adapter: Adapter | None) -> str | None:
    """Why a stage's update is not B A of a LoRA whose B starts from zero, beside weights that stay; None if it is."""
    if adapter is None or adapter.mode == "continue":
        return "give the stage adapter: new or merge_then_new"
    if more := stands_alone(adapter.lora):
        return f"leave adapter.lora.{more} out"
    if adapter.lora.get("init_lora_weights", True) not in (True, "gaussian"):
        return "leave adapter.lora.init_lora_weights out"
    return None


def bare_problems(stages: Sequence["Stage"], model: "ModelSpec") -> list[Problem]:
    """Methods that look at a stage's model without its adapters, where that is not the model that they are to see."""
    found: list[Problem] = []
    is_base, beneath = model.adapter is None, model.adapter is not None
    for i, stage in enumerate(stages):
        mode = stage.adapter.mode if stage.adapter else None
        is_base = is_base and mode is not None and not (mode == "merge_then_new" and beneath)
        is_start = mode == "merge_then_new" or (mode == "new" and not beneath)
        beneath = mode is not None
        for j, method in enumerate(stage.methods):
            for of, is_it in (("base", is_base), ("start", is_start)):
                if method.active and f"{of} without adapter" in method.needs and not is_it:
                    found.append((("stages", i, "methods", j, "to"), of, _not_bare(of, mode)))
    return found


def _not_bare(of: str, mode: str | None) -> str:
    here = "trains all weights" if mode is None else f"has adapter: {mode}"
    which = "start" if of == "start" else "stream's base"
    return (
        f"the stage {here}, and its model without adapters is not the {which}: set reference: weights, which keeps a "
        "copy of what the stage trains"
    )


def adapter_problems(stages: Sequence["Stage"], model: "ModelSpec") -> list[Problem]:
    """What does not hold together between the stages' adapters, the start's, and quantization.

    An adapter to continue that is not there; adapters that cannot be stacked; weights to be trained or merged into
    that are quantized; bitsandbytes missing. (location in the stream, value, sentence) for each.
    """
    found: list[Problem] = []
    if model.quantization and not is_installed():
        found.append((("model", "quantization"), model.quantization, f"needs bitsandbytes: {INSTALL}"))
    active: list[dict[str, Any]] = [{}] if model.adapter else []
    for i, stage in enumerate(stages):
        place, adapter = ("stages", i, "adapter"), stage.adapter
        mode = adapter.mode if adapter else None
        found += [(place, mode, text) for text in _quantized_problems(mode, model)]
        if adapter is None:
            active = []
        elif mode == "continue":
            if not active:
                found.append((place, mode, _nothing_to_continue(stages, i)))
                active = [{}]
        else:
            active = [*(active if mode == "new" else []), adapter.lora]
            alone = next((name for name in map(stands_alone, active) if name), None)
            if len(active) > 1 and alone:
                text = f"puts one adapter on another, which {alone} does not allow: use merge_then_new"
                found.append((place, mode, text))
    return found


def _quantized_problems(mode: str | None, model: "ModelSpec") -> list[str]:
    if not model.quantization:
        return []
    held = f"model.quantization is {model.quantization}"
    if mode is None:
        return [f"full weights cannot be trained while {held}: give adapter: new, or drop the quantization"]
    if mode == "merge_then_new":
        return [f"merging would round the sum while {held}: use new or continue (`cpt export --merge` is exact)"]
    return []


def _nothing_to_continue(stages: Sequence["Stage"], i: int) -> str:
    if i == 0:
        return "there is no adapter to continue: the stream starts from plain weights. Use new, or give model.adapter."
    return f"there is no adapter to continue: stage {stages[i - 1].name!r} before it trained full weights. Use new."
