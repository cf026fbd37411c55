"""DPO against the answers to forget: template answers are preferred (IdkDPO).

Papers: arXiv 2305.18290 (DPO), 2401.06121 (with refusals, TOFU). Cost: a pass over the rows to forget and their
templates before the stage, which keeps one number a row; then a step of supervised training on both. No second model.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr

from cpt.data.spec import Name
from cpt.methods.base import Method, StageInfo, Term

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cpt.data.stage_data import StageData
    from cpt.methods.step import Step


class DPO(Method):
    """Prefer a template answer to the answer to forget, against what the stage started from."""

    type: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0, description="inverse temperature")
    weight: float = Field(1.0, gt=0, description="of the rows to forget, beside the retain rows' own loss")
    name: Name = Field("dpo", description="what logs and the recordings call it")

    kinds: ClassVar[frozenset[str]] = frozenset({"unlearn"})
    forgets: ClassVar[bool] = True

    _data: Any = PrivateAttr(None)
    _forget: Any = PrivateAttr(None)
    _template: Any = PrivateAttr(None)

    @property
    def needs(self) -> frozenset[str]:
        """Template answers, and what the stage's start computes of each row."""
        return frozenset({"template", "base"})

    def prepare_data(self, data: "StageData", stage: StageInfo) -> None:
        """Remember where the rows are."""
        self._data = data

    def prepare_model(self, model: "nn.Module", stage: StageInfo) -> "nn.Module":
        """Record how likely both answers are at the start."""
        assert stage.record is not None
        place, how = f"{self.name}-{stage.name}", {"of": "answers", "who": "start"}
        self._forget = stage.record(model, self._data.sources["task"], f"{place}-forget", **how)
        self._template = stage.record(model, self._data.all_templates, f"{place}-template", **how)
        return model

    def loss_terms(self, step: "Step") -> dict[str, Term]:
        """Mean over the rows to forget; a row's template stands in the same micro-batch, in the same order."""
        from cpt.losses.forgetting import dpo

        def of(origin: str, reference: Any) -> "tuple[Tensor, Tensor]":
            rows = step.rows(origin)
            return step.log_probs[rows].sum(1), reference.summed(step.row[rows].tolist(), step.log_probs.device)

        (chosen, chosen_before), (rejected, rejected_before) = (
            of("template", self._template),
            of("forget", self._forget),
        )
        loss = dpo(chosen, rejected, chosen_before, rejected_before, self.beta)
        gain = (chosen - chosen_before) - (rejected - rejected_before)
        step.note("margin", Term(gain.detach().sum(), "forget_rows"))
        return {"preference": Term(loss.sum(), "forget_rows", self.weight)}
