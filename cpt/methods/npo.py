"""NPO: negative preference optimisation, a bounded gradient ascent against what the stage started from.

Paper: arXiv 2404.05868. Cost: a pass over the rows to forget before the stage, which keeps one number a row; then a
step of supervised training. No second model.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr

from cpt.data.spec import Name
from cpt.methods.base import Method, StageInfo, Term

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cpt.data.stage_data import StageData
    from cpt.methods.step import Step


class NPO(Method):
    """-2 / beta x log sigmoid(-beta x (log p - log p_start)), of the answers' summed log-probabilities.

    A row that is much less likely than at the start has hardly a gradient any more. As beta goes to 0 it is gradient
    ascent.
    """

    type: Literal["npo"] = "npo"
    beta: float = Field(0.1, gt=0, description="inverse temperature")
    weight: float = Field(1.0, gt=0, description="of the rows to forget, beside the retain rows' own loss")
    name: Name = Field("npo", description="what logs and the recording call it")

    kinds: ClassVar[frozenset[str]] = frozenset({"unlearn"})
    forgets: ClassVar[bool] = True

    _data: Any = PrivateAttr(None)
    _reference: Any = PrivateAttr(None)

    @property
    def needs(self) -> frozenset[str]:
        """What the stage's start computes of each row."""
        return frozenset({"base"})

    def prepare_data(self, data: "StageData", stage: StageInfo) -> None:
        """Remember where the rows are."""
        self._data = data

    def prepare_model(self, model: "nn.Module", stage: StageInfo) -> "nn.Module":
        """Record how likely the answers are at the start."""
        assert stage.record is not None
        name = f"{self.name}-{stage.name}"
        self._reference = stage.record(model, self._data.sources["task"], name, of="answers", who="start")
        return model

    def loss_terms(self, step: "Step") -> dict[str, Term]:
        """Mean over the rows to forget."""
        from cpt.losses.forgetting import npo

        rows = step.rows("forget")
        summed: Tensor = step.log_probs[rows].sum(1)
        reference = self._reference.summed(step.row[rows].tolist(), summed.device)
        step.note("log_ratio", Term((summed - reference).detach().sum(), "forget_rows"))
        return {"forget": Term(npo(summed, reference, self.beta).sum(), "forget_rows", self.weight)}
