"""Train one unlearn stage: rows to forget by a method's terms, rows to keep by their own loss, in one forward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from cpt.data.stage_data import StageData
from cpt.methods.base import Method, StageInfo
from cpt.methods.step import Step
from cpt.trainers import sft
from cpt.trainers.session import Session, Trained

FORGOTTEN = ("forget", "template")  # origins whose loss is a method's


def train(
    open_model: Callable[[], Any],
    tokenizer: Any,
    data: StageData,
    stage: StageInfo,
    methods: Sequence[Method],
    training: dict[str, Any],
    session: Session,
) -> Trained:
    """As `cpt.trainers.sft.train`; data: made by `cpt.data.forgetting`."""
    return sft.train(open_model, tokenizer, data, stage, methods, training, session, seam=ForgetSeam)


class ForgetSeam(sft.TokenSeam):
    """The seam of stages that forget. Counts of tokens and rows are of the rows that are kept; those to forget and
    their templates are counted by their own names."""

    def _count(self, batches: list[dict[str, torch.Tensor]], device: torch.device) -> dict[str, float]:
        window = super()._count(batches, device)
        for what in ("tokens", "rows"):
            window[what] -= sum(window[f"{name}_{what}"] for name in FORGOTTEN)
        return window

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The methods' terms, and the mean token loss of the rows that are kept; TRL's own loss counts nothing.

        Times the number of ranks, because DDP and DeepSpeed average gradients.
        """
        origin, row = inputs.pop("origin"), inputs.pop("row")
        self._watched_loss(model, inputs, return_outputs, num_items_in_batch)
        step = self._captured_step(model, origin, row)
        return (self._kept(step) + self._terms(step)) * self.accelerator.num_processes

    def _kept(self, step: Step) -> torch.Tensor:
        """The token loss of the rows that are kept, as other methods weigh it."""
        kept = ~(step.rows(FORGOTTEN[0]) | step.rows(FORGOTTEN[1]))
        factors = self._weights(step)
        step.factors = kept.unsqueeze(1).to(step.log_probs) * (1.0 if factors is None else factors)
        value = (step.factors * self._token_losses(step)).sum() / max(1.0, self._window["tokens"])
        if self._window["tokens"]:
            self._log_sum("kept_loss", value)
        return value
