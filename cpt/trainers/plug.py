"""The one seam between methods and TRL's trainers.

`plug(trainer_class, seam)` puts a seam before a TRL trainer. `Seam` holds what every kind of stage shares: rows
from a sampler of ours, token weights and terms over exact counts, edits of gradients and weights, a watch for a
loss that is not a number, checkpoints that can be verified. What a kind adds is in `sft.py` and `rft.py`. With no
method TRL's own loss passes untouched.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler

from cpt.checkpoints import rotate, seal, size_of, write_json
from cpt.data.blocks import blocks, by_number, hidden_of
from cpt.data.recording import backbone
from cpt.errors import TrainingError
from cpt.methods.base import HOOKS, Method, StageInfo, Term
from cpt.methods.step import Step, Tensors
from cpt.trainers.deepspeed import ShardedTensors, install
from cpt.trainers.fsdp import local
from cpt.trainers.rates import Rates
from cpt.trainers.reference import head_of, look

METHOD_STATE = "methods-{}.safetensors"
TERMS = "terms.json"
MODEL_INPUTS = ("input_ids", "labels", "attention_mask", "position_ids")


def overriding(methods: Sequence[Method], hook: str) -> list[Method]:
    """The methods that implement a hook, in YAML order."""
    assert hook in HOOKS
    return [method for method in methods if getattr(type(method), hook) is not getattr(Method, hook)]


def plug(trainer_class: type, seam: "type[Seam]") -> type:
    """A subclass of a TRL trainer (one that scores through TRL's fused head) with the seam in front of it."""
    return type(f"Plugged{trainer_class.__name__}", (seam, trainer_class), {})


class Seam:
    """What a plugged trainer does beside TRL's own work; mixed in before the trainer's class.

    Takes four more keyword arguments: `sampler`, `methods` (active, in YAML order), `stage` (StageInfo) and
    `origins` (names of the sources, the task first); and `rates`, where the stage has a schedule.
    """

    # Of the trainer beneath.
    args: Any
    model: Any
    accelerator: Any
    state: Any
    optimizer: Any
    lr_scheduler: Any
    current_gradient_accumulation_steps: int
    _metrics: Any

    def __init__(
        self,
        *args: Any,
        sampler: Sampler[int],
        methods: Sequence[Method],
        stage: StageInfo,
        origins: Sequence[str],
        rates: Rates | None = None,
        **kwargs: Any,
    ) -> None:
        self.rates = rates
        self._sampler, self._methods, self._stage, self._origins = sampler, methods, stage, tuple(origins)
        self._weighers = overriding(methods, "weigh_tokens")
        self._adders = overriding(methods, "loss_terms")
        self._gradient_editors = _ordered([method for method in methods if method.edits & {"gradients", "drops"}])
        self._weight_editors = _ordered([method for method in methods if "weights" in method.edits])
        self._armed = False
        self._captured: Any = None
        self._window: dict[str, float] = {}
        self._parts: dict[str, Any] = {}
        self._previous: dict[str, float] = {}
        self._hidden: Any = None
        self._layers, self._read, self._given = list[Any](), list[int](), dict[int, torch.Tensor]()
        self.bytes_written = 0  # to checkpoints, by this launch
        super().__init__(*args, **kwargs)
        # The trainer would drop the older checkpoint before the newer one is vouched for: we do it after.
        self._keep_checkpoints = self.args.save_total_limit or 2
        self.args.save_total_limit = None
        # Names are the trainer's model's: a wrapper such as DDP holds the same tensors.
        model = self.model
        self.loaded_dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        self._trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        self._adapters = list(model.active_adapters) if hasattr(model, "peft_config") else []
        self._not_finite = torch.full((), -1, dtype=torch.long, device=self.args.device)
        if self._weighers or self._adders:
            model.register_forward_hook(self._capture, with_kwargs=True)
        if any("hidden" in method.needs for method in methods):
            backbone(model).register_forward_hook(self._capture_hidden)
        self._watch_blocks([method for method in methods if "blocks" in method.needs])

    # ---- rows -----------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._sampler

    def boundary(self, step: int) -> bool:
        """Whether a checkpoint after this many optimizer steps holds everything that the next step needs."""
        return True

    # ---- loss -----------------------------------------------------------------------------------------

    def _capture(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._armed and torch.is_grad_enabled() and "log_probs" in output:
            self._captured = (kwargs, output)

    def _capture_hidden(self, module: Any, args: Any, output: Any) -> None:
        if self._armed and torch.is_grad_enabled():
            self._hidden = output.last_hidden_state

    def _watch_blocks(self, readers: Sequence[Method]) -> None:
        """Have the outputs kept of the blocks that methods read."""
        if not readers:
            return
        self._layers = blocks(self.model)
        self._read = sorted({number for method in readers for number in method.blocks_read(len(self._layers))})
        for number in self._read:
            self._layers[number].register_forward_hook(partial(self._capture_block, number))

    def _capture_block(self, number: int, module: Any, args: Any, output: Any) -> None:
        if self._armed and torch.is_grad_enabled() and (hidden := hidden_of(output)) is not None:
            self._given[number] = hidden

    def _block_outputs(self) -> Any:
        """What the blocks gave in the forward that was captured last. Raises TrainingError where one hid it."""
        found, self._given = self._given, {}
        if missing := sorted(set(self._read) - found.keys()):
            raise TrainingError(
                f"stage {self._stage.name!r}: blocks {missing} gave no output with gradient: this model's gradient "
                "checkpointing hides them; set training.gradient_checkpointing_kwargs: {use_reentrant: false}, or "
                "training.gradient_checkpointing: false"
            )
        return by_number(found, len(self._layers))

    def _watched_loss(self, model: Any, inputs: dict[str, Any], *rest: Any) -> torch.Tensor:
        """TRL's loss, its forward's inputs and outputs kept for the methods."""
        self._assert_trainable()
        self._armed, self._captured = True, None
        loss = super().compute_loss(model, inputs, *rest)  # type: ignore[misc]
        self._armed = False
        if (self._weighers or self._adders) and self._captured is None:
            raise RuntimeError("the trainer's forward gave no token log-probabilities to weigh or add to")
        return loss

    def _captured_step(self, model: Any, origin: Any, row: Any) -> Step:
        """What methods see of the forward that was captured last."""
        inputs, out = self._captured
        hidden, self._captured, self._hidden = self._hidden, None, None
        return Step(
            model=model,
            inputs={key: inputs[key] for key in MODEL_INPUTS if inputs.get(key) is not None},
            origin=origin,
            row=row,
            names=self._origins,
            log_probs=out.log_probs,
            mask=out.label_mask.bool(),
            window=self._window,
            number=self.state.global_step,
            hidden=hidden,
            head=head_of(self.model) if hidden is not None else None,
            blocks=self._block_outputs(),
            look=partial(look, self.model, layers=self._layers, read=self._read),
            previous=self._previous,
        )

    def _terms(self, step: Step) -> torch.Tensor:
        """What the methods' terms add: sums over counts of the effective batch, each logged by name."""
        added = step.log_probs.new_zeros(())
        for method in self._adders:
            for name, term in method.loss_terms(step).items():
                added = added + self._share(f"{method.label}/{name}", term)
            self._log_notes(method, step)
        return added

    def _log_notes(self, method: Method, step: Step) -> None:
        for name, term in step.notes.items():
            self._share(f"{method.label}/{name}", term)
        step.notes.clear()

    def _share(self, name: str, term: Term) -> torch.Tensor:
        """This micro-batch's part of a term: its sum over what it names, logged."""
        if term.over not in self._window:
            known = ", ".join(self._window)
            raise ValueError(f"{name}: over = {term.over!r} is not counted here; counted: {known}")
        value = term.weight * term.total / max(1.0, self._window[term.over])
        self._log_sum(name, value)
        return value

    def _weights(self, step: Step) -> torch.Tensor | None:
        """The product of the methods' token weights, (rows, tokens - 1), or None where all are 1; the step keeps it."""
        weights = []
        for method in self._weighers:
            factors = method.weigh_tokens(step)
            self._log_notes(method, step)
            weights += [] if factors is None else [factors]
        step.factors = torch.stack(weights).prod(0).detach() if weights else None
        return step.factors

    def _log_sum(self, name: str, value: torch.Tensor) -> None:
        """Add to a part of the loss that is logged by name: a sum over the micro-batches of a step, and over ranks."""
        self._parts[name] = self._parts.get(name, 0.0) + value.detach()

    def _log_parts(self) -> None:
        """Once per optimizer step; TRL averages over the steps between two lines of its log."""
        self._previous = {
            name: self.accelerator.reduce(value, reduction="sum").item() for name, value in self._parts.items()
        }
        for name, value in self._previous.items():
            self._metrics["train"][name].append(value)
        self._parts = {}

    # ---- rates ------------------------------------------------------------------------------------------

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The stage's schedule in the place of the trainer's, and the state that it goes on with.

        The trainer calls it once, with the optimizer as it will be, before it reads a checkpoint of this stage.
        """
        if self.rates is not None and self.lr_scheduler is None:
            self.lr_scheduler = self.rates.scheduler(self.optimizer)
            self.rates.go_on(self.optimizer)
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]

    # ---- steps ----------------------------------------------------------------------------------------

    def _assert_trainable(self) -> None:
        """PEFT's disable_adapter() switches requires_grad on again when it leaves."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad is not (name in self._trainable):
                parameter.requires_grad_(name in self._trainable)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        engine = self._engine
        if engine is not None and self._gradient_editors:
            install(self, self._edit_gradients)  # DeepSpeed's backward is also its optimizer step
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        fresh = (self._not_finite < 0) & ~torch.isfinite(loss)
        self._not_finite = torch.where(fresh, self.state.global_step, self._not_finite)
        if engine is None and self.accelerator.sync_gradients:
            self._edit_gradients()
        if self.accelerator.sync_gradients:
            self._log_parts()
        return loss

    @property
    def _engine(self) -> Any:
        """Accelerate's wrapper of DeepSpeed's engine, None under every other launcher."""
        return getattr(self.accelerator, "deepspeed_engine_wrapped", None)

    def _edit_gradients(self) -> None:
        for method in self._gradient_editors:
            gradients = self._tensors(gradients=True)
            method.edit_gradients(gradients, self._stage)
            for name, value in gradients.noted.items():
                self._metrics["train"][f"{method.label}/{name}"].append(float(value))

    def edit_weights(self) -> None:
        """Called by the stage's callback right after each optimizer step."""
        for method in self._weight_editors:
            with torch.no_grad():
                method.edit_weights(self._tensors(gradients=False), self._stage)

    def _tensors(self, gradients: bool) -> Tensors:
        trained = {n: p for n, p in self.model.named_parameters() if n in self._trainable}
        return (Tensors if self._engine is None else ShardedTensors)(trained, gradients)

    def refuse_nan(self, weights: bool = False) -> None:
        """Raise TrainingError if any loss since the start was not a number, or (weights) a weight now is not.

        All ranks must call it. The last step's update shows in no loss: weights are asked before they are kept.
        """
        if weights:
            trained = [p for name, p in self.model.named_parameters() if name in self._trainable]
            held = [local(getattr(p, "ds_tensor", p).detach()) for p in trained]  # of what is spread, this rank's piece
            broken = ~torch.stack([tensor.isfinite().all() for tensor in held]).all()
            fresh = (self._not_finite < 0) & broken.to(self._not_finite.device)
            self._not_finite = torch.where(fresh, self.state.global_step - 1, self._not_finite)
        first = self._not_finite
        if self.args.world_size > 1:
            first = self.accelerator.gather(first.reshape(1)).max()
        if int(first) >= 0:
            error = TrainingError(
                f"stage {self._stage.name!r}: the loss, or a weight, was not a number at step {int(first) + 1}; "
                "nothing after that step is kept. Lower training.learning_rate "
                f"(now {self.args.learning_rate:g}), "
                "set training.max_grad_norm, or train in float32; then run the same command again."
            )
            error.elsewhere = not self.accelerator.is_main_process  # all ranks know it, the first one says it
            raise error

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.refuse_nan()
        super().log(logs, start_time)  # type: ignore[misc]

    # ---- checkpoints ----------------------------------------------------------------------------------

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card per checkpoint: the exported stage gets one."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.refuse_nan(weights=True)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._save_own(folder)
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
            seal(folder)
            self.bytes_written += size_of(folder)
            if self.rates is not None:
                self.bytes_written += self.rates.keep(folder)
            rotate(folder.parent, keep=self._keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _save_own(self, folder: Path) -> None:
        """Write what the trainer does not know of into its checkpoint; rank 0 only."""
        if self._previous:
            write_json(folder / TERMS, self._previous)
        for number, method in enumerate(self._methods):
            if state := method.state_dict():
                save_file(state, folder / METHOD_STATE.format(number))

    def _load_own(self, folder: Path) -> None:
        if (folder / TERMS).is_file():
            self._previous = json.loads((folder / TERMS).read_text(encoding="utf-8"))
        for number, method in enumerate(self._methods):
            file = folder / METHOD_STATE.format(number)
            if file.exists():
                method.load_state_dict(load_file(file))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        kept = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        for name, parameter in self.model.named_parameters():
            if parameter.dtype != kept[name]:  # PEFT makes adapters float32 that TRL trains in bfloat16
                parameter.data = parameter.data.to(kept[name])
        if self._adapters:  # the trainer leaves one adapter active
            self.model.base_model.set_adapter(self._adapters)
        self._assert_trainable()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None:
            self._load_own(Path(checkpoint))


def _ordered(methods: list[Method]) -> list[Method]:
    """`add` before `mask`, YAML order inside each."""
    return sorted(methods, key=lambda method: method.order == "mask")
