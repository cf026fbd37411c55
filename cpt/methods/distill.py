"""Distillation from what the model was: SFT + KL, or learning without forgetting, on the rows of the stage itself.

Papers: Learning without Forgetting, arXiv 1606.09282 (on a language model: KL to the reference on the task's rows).
Cost: with `cached` likely tokens one forward pass over the rows before the stage and 8 bytes per token kept, nothing of
note in a step at temperature 1; with `adapter` or `weights` one forward pass without gradient a step, and for `weights`
a copy of the trained weights.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from cpt.data.spec import Name, refuse
from cpt.methods.base import Method, StageInfo, Term, unused

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cpt.data.stage_data import StageData
    from cpt.methods.step import Step, Tensors


class Distill(Method):
    """Hold the next-token distributions on the stage's own rows near those of a reference, by their divergence.

    The reference is the stream's base, the weights that the stage starts from, or a moving average of the stage's
    own. No general or earlier rows are needed. What the task must change is held back too: compare at equal new-task
    score.
    """

    type: Literal["distill"] = "distill"
    to: Literal["base", "start", "average"] = Field("start", description="whose distributions are kept")
    weight: float = Field(1.0, ge=0, description="of the divergence; 0 switches it off")
    direction: Literal["forward", "reverse"] = Field("forward", description="KL(reference || model), or the reverse")
    temperature: float = Field(1.0, gt=0, description="divides both logits; the divergence counts times its square")
    on: Literal["task", "all"] = Field("task", description="the task's rows, or those that other methods add too")
    reference: Literal["auto", "cached", "weights"] = Field(
        "auto",
        description="the model without its adapters where that is it; else cached: likely tokens, recorded before",
    )
    top_k: int = Field(32, gt=0, description="likely tokens that are recorded; the others are one")
    decay: float = Field(0.999, gt=0, lt=1, description="of the moving average, per optimizer step")
    name: Name = Field("distill", description="what logs call it; two in a stage need two names")

    absent: ClassVar[dict[str, Any]] = {"weight": 0.0}

    _data: Any = PrivateAttr(None)
    _how: str = PrivateAttr("")
    _recordings: dict[str, Any] = PrivateAttr(default_factory=dict)
    _weights: "dict[str, Tensor]" = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _of_the_average(self) -> "Distill":
        if self.to == "average" and self.reference == "cached":
            refuse((("reference",), "cached", "a moving average moves: take auto, or to: start"))
        refuse(*unused(self, {"decay": None if self.to == "average" else "is of to: average alone"}))
        return self

    @property
    def needs(self) -> frozenset[str]:
        """Hidden states; rows known one by one, or the whole model."""
        return frozenset({"hidden", "whole" if self.to == "average" or self.reference == "weights" else "base"})

    @property
    def edits(self) -> frozenset[str]:
        """Weights are looked at after a step for the average alone."""
        return frozenset({"weights"}) if self.to == "average" else frozenset()

    def prepare_data(self, data: "StageData", stage: StageInfo) -> None:
        """Remember where the rows are: other methods may add some after this."""
        self._data = data

    def prepare_model(self, model: "nn.Module", stage: StageInfo) -> "nn.Module":
        """Record likely tokens, or copy the weights, on the weights that the stage starts from."""
        from cpt.methods.weights import copied

        if self.to in stage.adapters_off and self.reference != "cached":
            self._how = "adapter"
        elif self.to == "average" or self.reference == "weights":
            place = f"stages.{stage.name}.methods.{self.name}.reference = 'weights'"
            self._how, self._weights = "weights", copied(model, stage, self.to, place, "take auto")
            if self.to == "average":  # in bfloat16 it would stand still: a step of it is below a rounding
                self._weights = {name: tensor.float() for name, tensor in self._weights.items()}
        else:
            assert stage.record is not None
            self._how, kept = (
                "cached",
                {"of": "top_k", "who": self.to, "k": self.top_k, "temperature": self.temperature},
            )
            for name in self._origins():
                rows = self._data.sources[name]
                self._recordings[name] = stage.record(model, rows, f"{self.name}-{stage.name}-{name}", **kept)
        return model

    def _origins(self) -> list[str]:
        return list(self._data.sources) if self.on == "all" else ["task"]

    def loss_terms(self, step: "Step") -> dict[str, Term]:
        """The divergence: mean over the learned tokens of its rows."""
        over = "tokens" if self.on == "all" else "task_tokens"
        total = sum((self._divergence(step, name) for name in self._origins()), step.log_probs.new_zeros(()))
        step.note("kl", Term(total.detach(), over))
        return {"loss": Term(total, over, self.weight * self.temperature**2)}

    def _divergence(self, step: "Step", name: str) -> "Tensor":
        """Sum over the learned tokens of one origin's rows in this micro-batch."""
        from cpt.losses.divergences import divergence, log_probs_beside, log_probs_of, top_k_divergence

        rows = step.rows(name) & step.mask.any(1)
        where = step.mask[rows]
        hidden, head = step.hidden[rows][:, :-1][where], step.head
        assert head is not None
        if self._how != "cached":
            weights = self._weights if self._how == "weights" else None
            # A pass is made once for a name: averages of another decay are others.
            seen = step.reference(f"average {self.decay}" if self.to == "average" else self.to, weights)
            kept = seen.hidden[rows][:, :-1][where]
            return divergence(head, hidden, seen.head, kept, self.direction, self.temperature).sum()
        tokens, log_probs = self._recordings[name].top_k(step.row[rows].tolist(), hidden.device)
        if self.temperature == 1.0:
            label, known = step.inputs["labels"][rows][:, 1:][where], step.log_probs[rows][where]
            mine = log_probs_beside(head, hidden, tokens, label, known)
        else:
            mine = log_probs_of(head, hidden, tokens, self.temperature)
        return top_k_divergence(mine, log_probs, self.direction).sum()

    def edit_weights(self, weights: "Tensors", stage: StageInfo) -> None:
        """Move the average."""
        if self.to == "average":
            for name, weight in weights:
                self._weights[name].lerp_(weight.to(self._weights[name]), 1 - self.decay)

    def state_dict(self) -> "dict[str, Tensor]":
        """The average; other references follow from the stage's start."""
        return {name: tensor.contiguous() for name, tensor in self._weights.items()} if self.to == "average" else {}

    def load_state_dict(self, state: "dict[str, Tensor]") -> None:
        """Take the average back."""
        for name, tensor in state.items():
            self._weights[name].copy_(tensor)

    def facts(self) -> dict[str, Any]:
        """Where the reference comes from."""
        return {"reference": self._how}
