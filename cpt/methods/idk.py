"""Teach "I don't know" in the place of the answers to forget.

Paper: TOFU (arXiv 2401.06121), as preference optimisation's simplest form. Cost: a step of supervised training.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from cpt.data.spec import Name
from cpt.methods.base import Method, Term

if TYPE_CHECKING:
    from cpt.methods.step import Step


class IDK(Method):
    """Learn a template answer to every prompt to forget; the answers themselves are not looked at."""

    type: Literal["idk"] = "idk"
    weight: float = Field(1.0, gt=0, description="of the template answers, beside the retain rows' own loss")
    name: Name = Field("idk", description="what logs call it")

    kinds: ClassVar[frozenset[str]] = frozenset({"unlearn"})
    forgets: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        """Template answers."""
        return frozenset({"template"})

    def loss_terms(self, step: "Step") -> dict[str, Term]:
        """The token loss of the template answers: mean over their tokens."""
        total = -step.log_probs[step.rows("template")].sum()
        return {"template": Term(total, "template_tokens", self.weight)}
