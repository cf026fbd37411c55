"""SimNPO: lower the length-normalised likelihood of the answers to forget, without a reference model.

Paper: arXiv 2410.07163. Cost: a step of supervised training.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from cpt.data.spec import Name
from cpt.methods.base import Method, Term

if TYPE_CHECKING:
    from cpt.methods.step import Step


class SimNPO(Method):
    """-2 / beta x log sigmoid(-beta x mean log p - beta x margin): bounded from below, and no reference.

    What it does hangs much on beta.
    """

    type: Literal["simnpo"] = "simnpo"
    beta: float = Field(2.5, gt=0, description="inverse temperature; TOFU: 2.5 (forget05), 4.5 (forget10)")
    margin: float = Field(0.0, description="the likelihood aimed at, as a mean negative log-probability")
    weight: float = Field(1.0, gt=0, description="of the rows to forget, beside the retain rows' own loss")
    name: Name = Field("simnpo", description="what logs call it")

    kinds: ClassVar[frozenset[str]] = frozenset({"unlearn"})
    forgets: ClassVar[bool] = True

    def loss_terms(self, step: "Step") -> dict[str, Term]:
        """Mean over the rows to forget."""
        from cpt.losses.forgetting import mean_log_probability, simnpo

        rows = step.rows("forget")
        mean = mean_log_probability(step.log_probs[rows], step.mask[rows])
        step.note("forget_probability", Term(mean.detach().exp().sum(), "forget_rows"))
        return {"forget": Term(simnpo(mean, self.beta, self.margin).sum(), "forget_rows", self.weight)}
