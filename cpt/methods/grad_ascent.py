"""Gradient ascent on the rows to forget; with retain rows it is gradient difference.

Papers: arXiv 2210.01504 (ascent), 2401.06121 (GradDiff, TOFU). Cost: a step of supervised training.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from cpt.data.spec import Name
from cpt.methods.base import Method, Term

if TYPE_CHECKING:
    from cpt.methods.step import Step


class GradAscent(Method):
    """Raise the token loss of the rows to forget. Nothing bounds it: a baseline, which collapses if it goes on.

    With the stage's `retain` rows it is GradDiff.
    """

    type: Literal["grad_ascent"] = "grad_ascent"
    weight: float = Field(1.0, gt=0, description="of the rows to forget, beside the retain rows' own loss")
    name: Name = Field("grad_ascent", description="what logs call it")

    kinds: ClassVar[frozenset[str]] = frozenset({"unlearn"})
    forgets: ClassVar[bool] = True

    def loss_terms(self, step: "Step") -> dict[str, Term]:
        """The token loss of the rows to forget, turned round: mean over their tokens."""
        total = step.log_probs[step.rows("forget")].sum()
        return {"forget": Term(total, "forget_tokens", self.weight)}
