"""FLAT: forget with the rows to forget alone, by an f-divergence between a template answer's probability and theirs.

Paper: LLM unlearning via loss adjustment with only forget data, arXiv 2410.11143. Cost: a step of supervised training
on the rows and their templates; no reference, no retain rows, one model.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr

from cpt.data.spec import Name
from cpt.methods.base import Method, Term

if TYPE_CHECKING:
    from cpt.methods.step import Step

SLOPE = 1e-4  # mean p (1 - p) of an answer's tokens below which next to no gradient is left


class FLAT(Method):
    """Minimise -g(P_template) + f*(g(P_forget)), P the mean probability of an answer's tokens.

    Both are bounded: it cannot run away as gradient ascent does. The gradient at a token is p (1 - p): what is next to
    impossible, or certain, hardly moves. Both are logged.
    """

    type: Literal["flat"] = "flat"
    divergence: Literal[
        "total_variation",
        "kl",
        "jensen_shannon",
        "pearson",
        "jeffrey",
        "jeffrey_series",
        "reverse_kl",
        "squared_hellinger",
        "neyman",
    ] = Field("total_variation", description="f; jeffrey_series is jeffrey's as published, by a Taylor series")
    probability: Literal["mean", "geometric"] = Field(
        "mean", description="of an answer: mean of its tokens' probabilities, or exp of the mean of their logarithms"
    )
    weight: float = Field(1.0, gt=0, description="of the rows to forget, beside the retain rows' own loss")
    name: Name = Field("flat", description="what logs call it")

    kinds: ClassVar[frozenset[str]] = frozenset({"unlearn"})
    forgets: ClassVar[bool] = True

    _last: dict[str, float] = PrivateAttr(default_factory=dict)

    @property
    def needs(self) -> frozenset[str]:
        """Template answers."""
        return frozenset({"template"})

    def loss_terms(self, step: "Step") -> dict[str, Term]:
        """Mean over rows of either part."""
        from cpt.losses.f_divergences import DIVERGENCES
        from cpt.losses.forgetting import geometric_probability, mean_probability, slope

        self._last = step.previous
        of = mean_probability if self.probability == "mean" else geometric_probability
        found = {}
        for origin in ("template", "forget"):
            log_probs, mask = (tensor[step.rows(origin)] for tensor in (step.log_probs, step.mask))
            found[origin] = of(log_probs, mask)
            step.note(f"{origin}_probability", Term(found[origin].detach().sum(), f"{origin}_rows"))
            step.note(f"{origin}_slope", Term(slope(log_probs.detach(), mask).sum(), f"{origin}_rows"))
        up, down = DIVERGENCES[self.divergence].loss(found["template"], found["forget"])
        return {
            "template": Term(up.sum(), "template_rows", self.weight),
            "forget": Term(down.sum(), "forget_rows", self.weight),
        }

    def facts(self) -> dict[str, Any]:
        """Both probabilities at the end, and whether one had no gradient left while it should still have moved."""
        last = {key.partition("/")[2]: value for key, value in self._last.items() if key.startswith(f"{self.name}/")}
        if not last:
            return {}
        facts: dict[str, Any] = {
            f"{origin}_probability": last[f"{origin}_probability"] for origin in ("template", "forget")
        }
        stuck = {"template": last["template_probability"] < 0.5, "forget": last["forget_probability"] > 0.5}
        if still := [origin for origin, is_so in stuck.items() if is_so and last[f"{origin}_slope"] < SLOPE]:
            facts["note"] = (
                f"next to no gradient reached the {' and the '.join(still)} answers (mean p(1 - p) below {SLOPE:g}): "
                "train longer or at a higher rate; templates can be taught by `idk` in a stage before"
            )
        return facts
