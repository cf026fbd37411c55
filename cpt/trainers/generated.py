"""The seam of stages that learn from what the model itself writes: what rewarded and self-distilled ones share."""

from typing import Any

import torch
from accelerate.utils import is_peft_model
from trl.models import prepare_deepspeed, prepare_fsdp

from cpt.data.added import AddedRows
from cpt.errors import ConfigError
from cpt.trainers.plug import Seam

# Of `generation_kwargs`: what the trainer counts on itself, by the field that says it.
DECIDED = {
    "num_return_sequences": "num_generations",
    "max_new_tokens": "max_completion_length",
    "max_length": "max_completion_length",
}


def check_generation(training: dict[str, Any]) -> None:
    """Raise ConfigError for generation arguments that would give other completions than the trainer counts."""
    given = training.get("generation_kwargs") or {}
    if wrong := [name for name in DECIDED if name in given]:
        raise ConfigError(
            *(f"training.generation_kwargs.{n} = {given[n]!r}: say it as training.{DECIDED[n]}" for n in wrong)
        )


class GeneratedSeam(Seam):
    """Checkpoints stand between generations; rows that methods add get a forward of their own.

    Takes one more keyword argument: `added`, those rows, or None.
    """

    _step: int  # micro-batches so far; TRL's name

    def __init__(self, *args: Any, added: AddedRows | None, **kwargs: Any) -> None:
        self._added_rows = added
        self._at_one: dict[str, Any] = {}  # what a forward takes to score at temperature 1
        super().__init__(*args, **kwargs)

    @property
    def causal(self) -> Any:
        """The causal language model beneath an adapter."""
        return self.model.get_base_model() if is_peft_model(self.model) else self.model

    def tokens_seen(self) -> int:
        """Tokens of all prompts and completions so far, over all ranks."""
        return int(self.state.num_input_tokens_seen)

    def boundary(self, step: int) -> bool:
        """True where the next step generates anew: completions that wait to be learned from are in no checkpoint."""
        micro_batches = step * self.args.gradient_accumulation_steps
        return micro_batches % (self.args.steps_per_generation * self.args.num_iterations) == 0

    def beside(self, model: Any) -> Any:
        """Another model, frozen, where this launch has its own."""
        model = model.eval().requires_grad_(False)
        if getattr(self, "is_deepspeed_enabled", False):
            return prepare_deepspeed(model, self.accelerator)
        if getattr(self, "is_fsdp_enabled", False):
            return prepare_fsdp(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def _begin_window(self) -> None:
        """Count the added rows of the effective batch at hand."""
        self._window = self._added_rows.window(self.state.global_step) if self._added_rows else {}

    def _of_added_rows(self, model: Any, loss: torch.Tensor) -> torch.Tensor:
        """The mean token loss of this micro-batch's added rows and the methods' terms on them; 0 without any."""
        micro = self._step % self.current_gradient_accumulation_steps
        rows, rank = self._added_rows, self.accelerator.process_index
        batch = rows.batch(self.state.global_step, micro, rank) if rows else None
        if batch is None:
            return loss.new_zeros(())
        batch = {key: value.to(loss.device) for key, value in batch.items()}
        origin, row = batch.pop("origin"), batch.pop("row")
        self._armed = True  # for hidden states
        with self.accelerator.autocast():
            out = model(**batch, fused_lm_head=True, **self._at_one)
        self._armed = False
        self._captured = (batch, out)
        step = self._captured_step(model, origin, row)
        factors = self._weights(step)
        token_loss = -step.log_probs if factors is None else -step.log_probs * factors
        value = token_loss.sum() / max(1.0, self._window["tokens"])
        self._log_sum("added_rows_loss", value)
        return value + self._terms(step)
