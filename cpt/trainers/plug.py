"""The one seam between methods and TRL's trainers.

`plug(trainer_class)` returns a subclass that draws rows in exact shares, calls the methods' hooks, watches for a
loss that is not a number, and makes checkpoints verifiable. With no method TRL's own loss passes untouched.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler

from cpt.checkpoints import rotate, seal
from cpt.data.sampler import MixedSampler
from cpt.errors import TrainingError
from cpt.methods.base import HOOKS, Method, StageInfo
from cpt.methods.step import Step, Tensors

METHOD_STATE = "methods-{}.safetensors"


def overriding(methods: Sequence[Method], hook: str) -> list[Method]:
    """The methods that implement a hook, in YAML order."""
    assert hook in HOOKS
    return [method for method in methods if getattr(type(method), hook) is not getattr(Method, hook)]


def plug(trainer_class: type) -> type:
    """Subclass a TRL trainer (one that scores through its fused head, as SFTTrainer does) with the seam.

    The subclass takes three more keyword arguments: `sampler` (MixedSampler), `methods` (active, in YAML
    order), `stage` (StageInfo), and `origins` (names of the sources, the task first).
    """

    class Plugged(trainer_class):  # type: ignore[misc, valid-type]
        def __init__(
            self,
            *args: Any,
            sampler: MixedSampler,
            methods: Sequence[Method],
            stage: StageInfo,
            origins: Sequence[str],
            **kwargs: Any,
        ) -> None:
            self._sampler, self._methods, self._stage, self._origins = sampler, methods, stage, tuple(origins)
            self._weighers = overriding(methods, "weigh_tokens")
            self._adders = overriding(methods, "loss_terms")
            self._gradient_editors = _ordered(overriding(methods, "edit_gradients"))
            self._weight_editors = _ordered(overriding(methods, "edit_weights"))
            self._captured: Any = None
            self._window: dict[str, float] = {}
            super().__init__(*args, **kwargs)
            # The trainer would drop the older checkpoint before the newer one is vouched for: we do it after.
            self._keep_checkpoints = self.args.save_total_limit or 2
            self.args.save_total_limit = None
            # Names are the trainer's model's: a wrapper such as DDP holds the same tensors.
            self._trainable = {name for name, p in self.model.named_parameters() if p.requires_grad}
            self._not_finite = torch.full((), -1, dtype=torch.long, device=self.args.device)
            if self._weighers or self._adders:
                self.model.register_forward_hook(self._capture)

        # ---- rows -------------------------------------------------------------------------------------

        def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
            return self._sampler

        def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
            """Also counts what the whole effective batch holds, over all ranks: what sums are divided by."""
            batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
            if self._weighers or self._adders:
                self._window = self._count(batches, device)
            return batches, items

        def _count(self, batches: list[dict[str, torch.Tensor]], device: torch.device) -> dict[str, float]:
            counts = torch.zeros(len(self._origins), 2, device=device)
            for batch in batches:
                learned = batch["labels"][:, 1:].ne(-100).sum(1)
                per_row = torch.stack([learned, torch.ones_like(learned)], dim=1).to(counts)
                counts.index_add_(0, batch["origin"].to(device), per_row)
            if self.args.world_size > 1:
                counts = self.accelerator.reduce(counts, reduction="sum")
            table = dict(zip(self._origins, counts.tolist(), strict=True))
            window = {f"{name}_tokens": tokens for name, (tokens, _) in table.items()}
            window |= {f"{name}_rows": rows for name, (_, rows) in table.items()}
            tokens, rows = counts.sum(0).tolist()
            return window | {"tokens": tokens, "rows": rows}

        # ---- loss -------------------------------------------------------------------------------------

        def _capture(self, module: Any, args: Any, output: Any) -> None:
            if self._armed and torch.is_grad_enabled() and "log_probs" in output:
                self._captured = output

        _armed = False

        def compute_loss(
            self,
            model: Any,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            origin, row = inputs.pop("origin"), inputs.pop("row")
            self._armed, self._captured = True, None
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            self._armed = False
            if "attention_mask" not in inputs:  # TRL counts one packed row per micro-batch; here there are B
                self._total_train_tokens += inputs["input_ids"].numel() - inputs["input_ids"].size(1)
            if not (self._weighers or self._adders):
                return loss
            if self._captured is None:
                raise RuntimeError("the trainer's forward gave no token log-probabilities to weigh or add to")
            return loss + self._added(model, inputs, origin, row)

        def _added(self, model: Any, inputs: dict[str, Any], origin: Any, row: Any) -> torch.Tensor:
            """What token weights and terms add to TRL's loss: sums over counts of the effective batch.

            Times the number of ranks, because DDP and DeepSpeed average gradients.
            """
            out, self._captured = self._captured, None
            keep = ("input_ids", "labels", "attention_mask", "position_ids")
            step = Step(
                model=model,
                inputs={key: inputs[key] for key in keep if key in inputs},
                origin=origin,
                row=row,
                names=self._origins,
                log_probs=out.log_probs,
                mask=out.label_mask.bool(),
                window=self._window,
                number=self.state.global_step,
            )
            added = self._reweighed(step)
            for method in self._adders:
                for name, term in method.loss_terms(step).items():
                    value = term.weight * term.total / max(1.0, self._window[term.over])
                    # TRL averages what is logged over micro-batches; a term is a sum over them, and over ranks.
                    logged = self.accelerator.reduce(value.detach(), reduction="sum")
                    whole = logged.item() * self.current_gradient_accumulation_steps
                    self._metrics["train"][f"{method.type}/{name}"].append(whole)
                    added = added + value
            return added * self.accelerator.num_processes

        def _reweighed(self, step: Step) -> torch.Tensor:
            """(product of weights - 1) x token loss: TRL's scalar, which holds weight 1, stays whole."""
            weights = [w for method in self._weighers if (w := method.weigh_tokens(step)) is not None]
            if not weights:
                return step.log_probs.new_zeros(())
            factors = torch.stack(weights).prod(0).detach()
            token_loss = -step.log_probs
            if self.args.loss_type == "dft":
                token_loss = token_loss * step.log_probs.exp().detach()
            return ((factors - 1.0) * token_loss).sum() / max(1.0, self._window["tokens"])

        # ---- steps ------------------------------------------------------------------------------------

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            # PEFT's disable_adapter() switches requires_grad on again when it leaves.
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad is not (name in self._trainable):
                    parameter.requires_grad_(name in self._trainable)
            loss = super().training_step(model, inputs, num_items_in_batch)
            fresh = (self._not_finite < 0) & ~torch.isfinite(loss)
            self._not_finite = torch.where(fresh, self.state.global_step, self._not_finite)
            if self._gradient_editors and self.accelerator.sync_gradients:
                for method in self._gradient_editors:
                    method.edit_gradients(self._tensors(gradients=True), self._stage)
            return loss

        def edit_weights(self) -> None:
            """Called by the stage's callback right after each optimizer step."""
            for method in self._weight_editors:
                with torch.no_grad():
                    method.edit_weights(self._tensors(gradients=False), self._stage)

        def _tensors(self, gradients: bool) -> Tensors:
            trained = {n: p for n, p in self.model.named_parameters() if n in self._trainable}
            return Tensors(trained, gradients)

        def refuse_nan(self, weights: bool = False) -> None:
            """Raise TrainingError if any loss since the start was not a number, or (weights) a weight now is not.

            All ranks must call it. The last step's update shows in no loss: weights are asked before they are kept.
            """
            if weights:
                trained = [p for name, p in self.model.named_parameters() if name in self._trainable]
                broken = ~torch.stack([p.detach().isfinite().all() for p in trained]).all()
                fresh = (self._not_finite < 0) & broken.to(self._not_finite.device)
                self._not_finite = torch.where(fresh, self.state.global_step - 1, self._not_finite)
            first = self._not_finite
            if self.args.world_size > 1:
                first = self.accelerator.gather(first.reshape(1)).max()
            if int(first) >= 0:
                raise TrainingError(
                    f"stage {self._stage.name!r}: the loss, or a weight, was not a number at step {int(first) + 1}; "
                    f"nothing after that step is kept. Lower training.learning_rate (now {self.args.learning_rate:g}), "
                    "set training.max_grad_norm, or train in float32; then run the same command again."
                )

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            self.refuse_nan()
            super().log(logs, start_time)

        # ---- checkpoints ------------------------------------------------------------------------------

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """No card per checkpoint: the exported stage gets one."""

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            self.refuse_nan(weights=True)
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                for number, method in enumerate(self._methods):
                    if state := method.state_dict():
                        save_file(state, folder / METHOD_STATE.format(number))
                (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
                seal(folder)
                rotate(folder.parent, keep=self._keep_checkpoints)
            self.accelerator.wait_for_everyone()

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is None:
                return
            for number, method in enumerate(self._methods):
                file = Path(checkpoint) / METHOD_STATE.format(number)
                if file.exists():
                    method.load_state_dict(load_file(file))

    Plugged.__name__ = Plugged.__qualname__ = f"Plugged{trainer_class.__name__}"
    return Plugged


def _ordered(methods: list[Method]) -> list[Method]:
    """`add` before `mask`, YAML order inside each."""
    return sorted(methods, key=lambda method: method.order == "mask")
