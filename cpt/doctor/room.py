"""Whether a stream's stages fit: what each holds on a device (`cpt.memory_plan`), and what a run writes to the disk.

Parameters are counted on the model's skeleton: its config, without its weights. What methods freeze is not taken off.
"""

import json
import math
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cpt.adapters.spec import Adapter
from cpt.config import Stream
from cpt.doctor.devices import accelerators, free_and_total
from cpt.doctor.line import Line, absent, fail, ok, warn
from cpt.errors import ConfigError
from cpt.memory_plan import activation_bytes, training_bytes
from cpt.resources import bundled, model_path

_GIB = 2**30
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def trainings(stream: Stream) -> list[tuple[str, dict[str, Any]]]:
    """Every stage's trainer arguments, with the place they stand at."""
    return [(f"stages.{i}.training", stream.training_of(stage)) for i, stage in enumerate(stream.stages)]


@dataclass(frozen=True)
class Sizes:
    """Parameters of a stage's model: all of the base, those in its linear layers, those of the adapter in training.

    width: bytes of one of the base's. adapter: 0 where the weights themselves are trained. shape: hidden, intermediate
    and key-value width and number of layers of a Llama-like model, None for another.
    """

    parameters: int
    linear: int
    adapter: int
    width: int
    shape: tuple[int, int, int, int] | None = None


def sizes(stream: Stream) -> list[Sizes]:
    """Of every stage. Raises what transformers and PEFT raise for a config or an adapter that they cannot build."""
    shapes = [_lora(stream, i) for i in range(len(stream.stages))]
    known: dict[str, Sizes] = {}
    for lora in shapes:
        if (key := json.dumps(lora)) not in known:
            known[key] = _sizes(stream, lora)
    return [known[json.dumps(lora)] for lora in shapes]


def _sizes(stream: Stream, lora: dict[str, Any] | None) -> Sizes:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from cpt.adapters.lora import try_on_skeleton

    trust = {"trust_remote_code": stream.model.trust_remote_code}
    place = str(Path(model_path(stream.model.path)).expanduser())
    config = AutoConfig.from_pretrained(place, revision=stream.model.revision, **trust)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **trust)
    whole = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    added = 0
    if lora is not None:
        try_on_skeleton(model, (), Adapter(mode="new", lora=lora))
        added = sum(p.numel() for p in model.parameters() if p.requires_grad)
    asked = stream.model.dtype
    dtype = str(config.dtype or "float32").removeprefix("torch.") if asked == "auto" else asked
    return Sizes(whole, linear, added, _BYTES.get(dtype, 4), _shape(config))


def _shape(config: Any) -> tuple[int, int, int, int] | None:
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    values = [value for name in names if isinstance(value := getattr(config, name, None), int)]
    if len(values) < len(names):
        return None
    hidden, intermediate, heads, key_heads, layers = values
    return hidden, intermediate, hidden // heads * key_heads, layers


def _lora(stream: Stream, i: int) -> dict[str, Any] | None:
    """Shape of the adapter that stage i trains; of `continue` the last new one's, or the start's; None for weights."""
    adapters = [stage.adapter for stage in stream.stages[: i + 1]]
    if adapters[-1] is None:
        return None
    if (made := next((one for one in reversed(adapters) if one and one.mode != "continue"), None)) is not None:
        return made.lora
    from eval_harness.lineage import read_adapter_config

    start = read_adapter_config(Path(stream.model.adapter or "").expanduser())
    return {key: start[key] for key in ("r", "lora_alpha", "target_modules")}


def zero_settings(training: dict[str, Any]) -> dict[str, Any]:
    """zero_optimization of a stage's DeepSpeed settings, {} without. Raises ConfigError for a file it cannot read."""
    given = training.get("deepspeed")
    if isinstance(given, str):
        if not Path(given).is_file():
            shipped = ", ".join(sorted(file.name for file in (bundled("launch") / "deepspeed").glob("*.json")))
            raise ConfigError(f"training.deepspeed = {given!r}: no such file; {bundled('launch')}/deepspeed: {shipped}")
        try:
            given = json.loads(Path(given).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"training.deepspeed = {training['deepspeed']!r}: is no JSON: {error}") from error
    return given.get("zero_optimization") or {} if isinstance(given, dict) else {}


def stage_bytes(stream: Stream, i: int, size: Sizes, on_cpu: bool, on: str = "device") -> dict[str, float]:
    """Bytes that one process holds in stage i, activations aside: on its device, or what is offloaded to the host.

    Of full weights an rft stage with a `kl` has a second, frozen model, and an sdft stage unless its teacher is `live`;
    of an adapter an sdft stage whose teacher is `ema`, or `base` where the adapter is not a new one.
    Raises ConfigError as `training_bytes`.
    """
    stage, training = stream.stages[i], stream.training_of(stream.stages[i])
    zero = zero_settings(training)
    plan = partial(
        training_bytes,
        optimizer=training.get("optim", "adamw_torch_fused"),
        zero_stage=zero.get("stage", 0),
        offload=_offloaded(zero),
        world=stream.world,
        on=on,
    )
    precision = _precision(size.width, training, on_cpu)
    if not size.adapter:
        found = plan(size.parameters, precision=precision)
        second = stage.kind == "rft" and stage.kl.to != "off"
        second |= stage.kind == "sdft" and training.get("teacher_model_kind") != "live"
        return found | ({"reference": float(size.parameters * size.width)} if second and on == "device" else {})
    base = plan(size.parameters, 0.0, precision)
    if stream.model.quantization and on == "device":
        base["weights"] = whole_weights(size, stream.model.quantization)
    added = plan(size.adapter, precision="float32")  # PEFT trains adapters so
    teacher = training.get("teacher_model_kind", "base") if stage.kind == "sdft" else "live"
    is_new = stage.adapter is not None and stage.adapter.mode == "new"
    second = (teacher == "ema" or (teacher == "base" and not is_new)) and on == "device"
    reference = {"reference": whole_weights(size, stream.model.quantization)} if second else {}
    return {part: base[part] + added[part] for part in base} | reference


def _precision(width: int, training: dict[str, Any], on_cpu: bool) -> str:
    """The name by which `training_bytes` knows it; on a GPU TRL's default is autocast to bf16."""
    if width == 4:
        return "mixed" if training.get("fp16") or training.get("bf16", not on_cpu) else "float32"
    return "bfloat16"


def _offloaded(zero: dict[str, Any]) -> list[str]:
    kept = {"optimizer": "offload_optimizer", "weights": "offload_param"}
    return [part for part, key in kept.items() if (zero.get(key) or {}).get("device", "none") != "none"]


def whole_weights(size: Sizes, quantization: str | None) -> float:
    """Bytes of the base's weights in one piece, as they are measured. The head and embeddings are not quantized."""
    if quantization is None:
        return float(size.parameters * size.width)
    per_weight = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}[quantization]  # a float32 scale per 64 weights of 4 bits
    return size.linear * per_weight + (size.parameters - size.linear) * 2


def activations(size: Sizes, training: dict[str, Any], on_cpu: bool) -> float | None:
    """Bytes of one micro-batch of rows that are all as long as `max_length` allows; None where that is not known."""
    length = training.get("max_length", training.get("max_completion_length", 1024))
    if size.shape is None or length is None:
        return None
    rows = training.get("per_device_train_batch_size", 8)
    return activation_bytes(rows * length, *size.shape, training.get("gradient_checkpointing", not on_cpu))


def check_memory(stream: Stream) -> Line:
    """What the largest stage holds on each device, and the machine for it, against what is free there now."""
    if not stream.stages:
        return ok("no stage trains")
    if lacking := _lacking(stream):
        return absent(f"{lacking} must be fetched first: its size is not known here")
    known, (free, where, on_cpu) = sizes(stream), free_memory(stream)
    try:
        needs = [stage_bytes(stream, i, size, on_cpu) for i, size in enumerate(known)]
        hosts = [sum(stage_bytes(stream, i, size, on_cpu, "host").values()) for i, size in enumerate(known)]
    except ConfigError as error:
        return absent(f"not estimated: {error}")
    i = max(range(len(needs)), key=lambda k: sum(needs[k].values()))
    need, rows = sum(needs[i].values()), activations(known[i], stream.training_of(stream.stages[i]), on_cpu)
    parts = " + ".join(f"{_said(value)} {name}" for name, value in needs[i].items())
    said = f"stage {stream.stages[i].name} holds {_said(need)} ({parts})"
    said += f" and activations, up to {_said(rows)}" if rows is not None else " and activations"
    said += f"; {_said(free)} free {where}"
    if (host := max(hosts) * stream.world) > (free_host := free_main_memory()):
        return fail(f"{said}; {_said(host)} offloaded, {_said(free_host)} free", "offload less: another DeepSpeed file")
    if need > free:
        return fail(said, f"{_smaller(stream, i)}a smaller model, or ZeRO-3 over more devices")
    if (whole := whole_weights(known[i], stream.model.quantization)) > free:
        return fail(f"{said}; measured, the model needs {_said(whole)} in one piece", "a smaller model, or 4 bits")
    if need + (rows or 0) > 0.9 * free:
        return warn(said, "training.gradient_checkpointing=true, and a smaller per_device_train_batch_size")
    return ok(said)


def _smaller(stream: Stream, i: int) -> str:
    """The override that makes a stage smaller, if it is not made yet."""
    if stream.stages[i].adapter is None:
        return f"stages.{stream.stages[i].name}.adapter=new (with model.quantization=4bit if need be), "
    return "" if stream.model.quantization else "model.quantization=4bit, "


def _lacking(stream: Stream) -> str | None:
    """The name of a base or an adapter whose config is not on this machine."""
    from huggingface_hub import try_to_load_from_cache

    start = stream.model.adapter
    if start is not None and not Path(start).expanduser().is_dir():
        return start
    path = Path(model_path(stream.model.path)).expanduser()
    here = path.is_dir() or isinstance(try_to_load_from_cache(stream.model.path, "config.json"), str)
    return None if here else stream.model.path


def free_memory(stream: Stream) -> tuple[float, str, bool]:
    """Bytes that one process may use where the stream trains, the place in words, and whether that is the CPU."""
    devices = [] if all(training.get("use_cpu") for _, training in trainings(stream)) else accelerators()
    if used := devices[: stream.world]:
        where = used[0] if len(used) == 1 else f"each of {len(used)} devices"
        return min(free_and_total(device)[0] for device in used), f"on {where}", False
    each = f" for each of {stream.world} processes" if stream.world > 1 else ""
    return free_main_memory() / stream.world, f"in main memory{each}", True


def free_main_memory(group: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that are free on the machine, or in the container where that is less (cgroup v2)."""
    import psutil

    free = float(psutil.virtual_memory().available)
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
        free = min(free, float(most) - float(used.read_text()))
    return free


def disk_bytes(stream: Stream, stages: list[Sizes]) -> float:
    """Bytes of a whole run: models that are kept, and the checkpoints of the stage that writes most."""
    models = [_saved(size) for size in stages]
    kept = sum(models) if stream.retention.models == "all" else 2 * max(models)
    checkpoints = [
        _saved(size) * 3 * _checkpoints(stream.training_of(stage))
        for size, stage in zip(stages, stream.stages, strict=True)
    ]
    return kept + (sum(checkpoints) if stream.retention.checkpoints else max(checkpoints))


def _saved(size: Sizes) -> float:
    return size.adapter * 4 if size.adapter else size.parameters * size.width


def _checkpoints(training: dict[str, Any]) -> int:
    """How many there are at a time: one more than are kept, and of a stage shorter than `save_steps` one."""
    short = 0 < training.get("max_steps", 0) <= training.get("save_steps", 500)
    return 1 if short else (training.get("save_total_limit") or 2) + 1


def check_disk_room(stream: Stream, folder: Path) -> Line:
    """What a run writes against what is free on the disk."""
    if not stream.stages:
        return ok("no stage writes weights")
    if lacking := _lacking(stream):
        return absent(f"{lacking} must be fetched first: its size is not known here")
    need = disk_bytes(stream, sizes(stream))
    free = shutil.disk_usage(folder).free
    said = f"a run writes {_said(need)} of models and checkpoints; {_said(free)} free in {folder}"
    if need > free:
        return fail(said, "retention.models=last training.save_total_limit=1, or output_dir=FOLDER on another disk")
    return ok(said)


def _said(size: float) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB / 10 else f"{math.ceil(size / 2**20)} MiB"
