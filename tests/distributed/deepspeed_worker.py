"""What each rank runs: the seam of cpt.trainers.deepspeed under transformers' Trainer, stage by stage.

torchrun --nproc_per_node 2 -m tests.distributed.deepspeed_worker FOLDER

One run per launcher and edit, all in one process: rank 0 keeps gradients as the hook sees them, and the weights.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from cpt.methods.step import Tensors
from cpt.processes import check_launch, start
from cpt.trainers.deepspeed import ShardedTensors, gather_weights, install, meet, release

LAUNCH = Path("launch/deepspeed")
EDITED = "model.layers.0.mlp.gate_proj.weight"  # (33, 16): its pieces over two ranks are even, its bias's are not
ODD = "model.layers.0.mlp.gate_proj.bias"  # (33,)
STEPS = 4
RUNS = {  # name -> (launcher, edit)
    **{f"{launcher}_plain": (launcher, "none") for launcher in ("ddp", "zero1", "zero2", "zero3")},
    "zero3_offload_plain": ("zero3_offload", "unseen"),
    **{f"{launcher}_mask": (launcher, "mask") for launcher in ("ddp", "zero1", "zero2", "zero3")},
    **{f"{launcher}_weights": (launcher, "weights") for launcher in ("ddp", "zero1", "zero2")},
    "loaded_mask": ("zero3", "mask"),  # as a stage does it: cut up while it is loaded, never whole
}


def config(launcher: str) -> dict[str, Any] | None:
    """The shipped file of a launcher; tensors as small as these would all stay whole under ZeRO-3."""
    if launcher == "ddp":
        return None
    found = json.loads((LAUNCH / f"{'zero2' if launcher == 'zero1' else launcher}.json").read_text())
    zero = found["zero_optimization"]
    if launcher == "zero1":
        zero["stage"] = 1
    if launcher.startswith("zero3"):
        zero["stage3_param_persistence_threshold"] = 0
    return found


def model() -> LlamaForCausalLM:
    """Tiny, tied, with a tensor of odd size; whole on every rank."""
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"vocab_size": 53, "hidden_size": 16, "intermediate_size": 33, "mlp_bias": True}
    return LlamaForCausalLM(LlamaConfig(**sizes, **shape, tie_word_embeddings=True, max_position_embeddings=32))


def rows() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 53, (64, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def masked(name: str, gradient: torch.Tensor) -> torch.Tensor:
    """Keeps the first 5 entries of two tensors as they were."""
    if name in (EDITED, ODD):
        gradient = gradient.clone()
        gradient[:5] = 0
    return gradient


class Averages:
    """An edit of weights that remembers: an average of the weights so far, and zeros in one column."""

    def __init__(self) -> None:
        self.last: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        mixed = 0.5 * weight + 0.5 * self.last[name] if name in self.last else weight.clone()
        if name == EDITED:
            mixed[:, 3] = 0
        self.last[name] = mixed.clone()
        return mixed


class Editing(Trainer):
    """A Trainer with the seam: gradients before the optimizer's step, under DDP as under DeepSpeed."""

    edit: str
    seen: list[dict[str, torch.Tensor]]

    def training_step(self, *args: Any) -> torch.Tensor:
        engine = getattr(self.accelerator, "deepspeed_engine_wrapped", None)
        if engine is not None:
            install(self, self.on_gradients)
        loss = super().training_step(*args)
        if engine is None and self.accelerator.sync_gradients:
            self.on_gradients()
        return loss

    def tensors(self, gradients: bool) -> Tensors:
        sharded = getattr(self.accelerator, "deepspeed_engine_wrapped", None) is not None
        return (ShardedTensors if sharded else Tensors)(dict(self.model.named_parameters()), gradients)

    def on_gradients(self) -> None:
        if self.edit == "unseen":
            return
        self.seen.append({name: gradient.clone().contiguous() for name, gradient in self.tensors(gradients=True)})
        if self.edit == "mask":
            self.tensors(gradients=True).map(masked)


class WeightEdits(TrainerCallback):
    """After every step: the edit, then what the model and the master hold of one tensor."""

    def __init__(self, trainer: Editing, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        self.trainer, self.change = trainer, change
        self.held: dict[str, torch.Tensor] = {}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            weights = self.trainer.tensors(gradients=False)
            weights.map(self.change)
            self.held["master"] = dict(weights)[EDITED].clone()
            self.held["model"] = dict(self.trainer.model.named_parameters())[EDITED].data.clone()


def train(folder: Path, name: str, launcher: str, edit: str) -> None:
    """One stage: train, keep what was seen, leave nothing for the next."""
    args = TrainingArguments(
        output_dir=str(folder / name),
        deepspeed=config(launcher),
        use_cpu=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=5e-3,
        weight_decay=0.0,
        max_grad_norm=0.5,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    meet(args)
    opened = LlamaForCausalLM.from_pretrained(folder / "start") if name == "loaded_mask" else model()
    trainer = Editing(model=opened, args=args, train_dataset=rows())
    trainer.edit, trainer.seen = edit, []
    edits = WeightEdits(trainer, Averages())
    if edit == "weights":
        trainer.add_callback(edits)
    accelerator = trainer.accelerator
    wanted = "MULTI_CPU" if launcher == "ddp" else "DEEPSPEED"  # nothing is left of the run before
    check_launch(accelerator.distributed_type.value, accelerator.num_processes, deepspeed=launcher != "ddp")
    if accelerator.distributed_type.value != wanted:
        raise RuntimeError(f"{name} runs as {accelerator.distributed_type.value}, not as {wanted}")
    trainer.train()
    weights = gather_weights(trainer)
    if weights is None:
        weights = accelerator.unwrap_model(trainer.model).state_dict()
    if trainer.is_world_process_zero():
        save_file({key: value.clone().contiguous() for key, value in weights.items()}, folder / f"{name}.weights")
        for step, gradients in enumerate(trainer.seen):
            save_file(gradients, folder / f"{name}.gradients{step}")
        save_file(edits.held, folder / f"{name}.held")
    release(trainer)


def main(folder: Path) -> None:
    """Every run of RUNS, one after the other."""
    processes = start(2)
    if processes.is_main:
        model().save_pretrained(folder / "start")
        save_file({k: v.clone().contiguous() for k, v in model().state_dict().items()}, folder / "start.weights")
    processes.wait()
    for name, (launcher, edit) in RUNS.items():
        train(folder, name, launcher, edit)
    processes.end()
    os._exit(0)  # a gloo thread that is still alive when the interpreter goes may abort after success


if __name__ == "__main__":
    main(Path(sys.argv[1]))
