"""What DeepSpeed does otherwise: its backward is also its optimizer step, and its tensors lie in pieces.

Gradients are edited between engine.backward and engine.step. A weight is set twice, in the optimizer's fp32 master
and in the tensor that the model computes with: the master alone reaches the model one step later. Imports deepspeed
only where it is at work.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper

from cpt.methods.base import Method
from cpt.methods.step import Tensors
from cpt.trainers import fsdp

if TYPE_CHECKING:
    from torch import Tensor


COMPILING = 900  # seconds that an extension may take; on two cores it is one or two minutes


class EditingEngine(DeepSpeedEngineWrapper):
    """Accelerate's wrapper with a hook where all gradients of the effective batch are there and averaged."""

    def __init__(self, engine: Any, on_gradients: Callable[[], None]) -> None:
        super().__init__(engine)
        self.on_gradients = on_gradients

    def backward(self, loss: "Tensor", sync_gradients: bool = True, **kwargs: Any) -> None:
        """One micro-batch; with the last of an effective batch also the edit, clipping and the optimizer step."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)
        if sync_gradients:
            self.on_gradients()
            self.engine.step()


def install(trainer: Any, on_gradients: Callable[[], None]) -> None:
    """Have the trainer's engine call `on_gradients` before each optimizer step; the engine must be there already."""
    wrapped = trainer.accelerator.deepspeed_engine_wrapped
    if not isinstance(wrapped, EditingEngine):
        trainer.accelerator.deepspeed_engine_wrapped = EditingEngine(wrapped.engine, on_gradients)


class ShardedTensors(Tensors):
    """Trainable tensors under ZeRO-1, 2 and 3: iteration gathers one at a time, in fp32; only `map` writes.

    Every rank goes through all of them. Gradients are there inside the hook of `install`, weights between steps.
    """

    def __iter__(self) -> Iterator[tuple[str, "Tensor"]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

        whole = safe_get_full_grad if self._gradients else safe_get_full_fp32_param
        for name, parameter in self._parameters.items():
            tensor = whole(parameter)
            if tensor is not None:
                yield name, tensor

    def weight(self, name: str) -> "Tensor":
        """The weight that a gradient is of, in fp32, gathered."""
        from deepspeed.utils import safe_get_full_fp32_param

        found: Tensor = safe_get_full_fp32_param(self._parameters[name])
        return found

    def map(self, change: Callable[[str, "Tensor"], "Tensor"]) -> None:
        """Replace every tensor by `change(name, tensor)`. Weights of ZeRO-3 are refused before training starts."""
        for name, tensor in self:
            self._set(self._parameters[name], change(name, tensor))

    def _set(self, parameter: Any, value: "Tensor") -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_grad

        if self._gradients:
            safe_set_full_grad(parameter, _padded(parameter, value))
            return
        safe_set_full_fp32_param(parameter, value)
        parameter.data.copy_(value)


def _padded(parameter: Any, value: "Tensor") -> "Tensor":
    """ZeRO-3 cuts a tensor into equal pieces, and takes its own from a value that must reach as far as the last."""
    if not hasattr(parameter, "ds_tensor"):
        return value
    import torch

    missing = parameter.ds_tensor.numel() * torch.distributed.get_world_size() - value.numel()
    return torch.nn.functional.pad(value.flatten(), (0, max(0, missing)))


def refuse_edits(methods: Sequence[Method], args: Any) -> list[str]:
    """Why methods' edits, or the finished weights, would not reach the right tensors under these trainer arguments.

    args: transformers' TrainingArguments, made under the launcher. Returns sentences, [] if all is well.
    """
    gradients, weights, drops = ([m.type for m in methods if of in m.edits] for of in ("gradients", "weights", "drops"))
    problems = []
    if args.fp16 and gradients:
        problems.append(_refused(gradients, "gradients", "fp16, which scales them", "use bf16 or float32"))
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        for kind, names in {"gradients": gradients + drops, "weights": weights}.items():
            if names:
                problems.append(_refused(names, kind, "FSDP, where it is untested", "use DDP or ZeRO-2"))
    plugin = args.deepspeed_plugin
    if plugin is not None and drops:
        problems.append(_refused(drops, "gradients", "DeepSpeed, whose optimizer holds all tensors as one", "use DDP"))
    return problems + (_under_deepspeed(plugin.hf_ds_config, gradients, weights) if plugin is not None else [])


def _under_deepspeed(config: Any, gradients: list[str], weights: list[str]) -> list[str]:
    problems = []
    if config.is_offload() and gradients:
        problems.append(_refused(gradients, "gradients", "DeepSpeed's offload, where it is untested", "do not offload"))
    if config.is_offload() and weights:
        problems.append(_refused(weights, "weights", "DeepSpeed's offload, where it is untested", "do not offload"))
    if config.is_zero3() and weights:
        problems.append(_refused(weights, "weights", "ZeRO-3, where it is untested", "use DDP or ZeRO-2"))
    if "RANK" not in os.environ:
        problems.append(
            "training.deepspeed: needs a launcher, also for one process: torchrun --nproc_per_node 1 -m cpt run STREAM"
        )
    key = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    if config.is_zero3() and not config.get_value(key):
        problems.append(f"deepspeed: {key} must be true, or the stage's model cannot be gathered and written")
    return problems


def _refused(names: list[str], kind: str, where: str, instead: str) -> str:
    return f"methods: {', '.join(names)} edits {kind}, which cannot be done under {where}: {instead}, or leave it out"


def gather_weights(trainer: Any) -> dict[str, Any] | None:
    """The model's whole state dict on the first process where training spreads it (ZeRO-3, FSDP), {} on the others;
    None where each process holds it whole. All processes must call it."""
    accelerator = trainer.accelerator
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED and accelerator.state.deepspeed_plugin.zero_stage != 3:
        return None
    if kind == DistributedType.FSDP:
        return fsdp.gather(trainer)
    if kind != DistributedType.DEEPSPEED:
        return None
    return accelerator.get_state_dict(trainer.model_wrapped) or {}


def meet(args: Any) -> None:
    """Before weights are loaded: under ZeRO-3 loading cuts them up, over the ranks that DeepSpeed knows of by then."""
    if args.deepspeed_plugin is not None:
        import deepspeed

        drop_stale_locks()
        deepspeed.init_distributed(dist_backend="gloo" if args.use_cpu else None, auto_mpi_discovery=False)


def drop_stale_locks() -> None:
    """Remove what a process that was killed while it compiled an extension left: every later one would wait for it."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        with suppress(FileNotFoundError):  # another process of this launch was faster
            if time.time() - lock.stat().st_mtime > COMPILING:
                lock.unlink()


def forget(args: Any) -> None:
    """Drop the settings that would make the next `from_pretrained` shard (and hang); a no-op without DeepSpeed."""
    if args.deepspeed_plugin is None:
        return
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    if args.deepspeed:  # set by the trainer, not by the launcher: the next stage may train without
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def release(trainer: Any) -> None:
    """Let go of a trainer's engine and its settings. The next stage builds an engine of its own."""
    if trainer.args.deepspeed_plugin is not None:
        trainer.accelerator.free_memory()
    forget(trainer.args)
