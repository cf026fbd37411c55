"""EAFT: tokens of which the model is sure otherwise are learned less; those that it does not know, in full.

Paper: Entropy-Adaptive Fine-Tuning, arXiv 2601.02151. Cost: a pass through the head without gradient a step.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from cpt.methods.base import Method, Term

if TYPE_CHECKING:
    from torch import Tensor

    from cpt.methods.step import Step


class EAFT(Method):
    """Weigh each token's loss by the entropy of the model's own next-token distribution there, as it is in the step.

    A token that contradicts what the model is sure of would move it most and forget most. No rows, no reference and
    no memory are needed. What is to be learned against a firm belief is held back too.
    """

    type: Literal["eaft"] = "eaft"
    alpha: float = Field(1.0, ge=0, description="power of the normalised entropy; 0 switches it off, 1 is the paper's")
    top_k: int = Field(20, ge=2, description="likely tokens over which the entropy is taken")
    on: Literal["task", "all"] = Field("task", description="the task's rows, or those that other methods add too")

    absent: ClassVar[dict[str, Any]] = {"alpha": 0.0}

    @property
    def needs(self) -> frozenset[str]:
        """What the head reads."""
        return frozenset({"hidden"})

    def weigh_tokens(self, step: "Step") -> "Tensor":
        """(B, T-1): the normalised entropy to the power of alpha at the learned tokens, 1 elsewhere."""
        from cpt.losses.entropy import top_k_entropy

        assert step.head is not None
        where = step.mask if self.on == "all" else step.mask & step.rows("task").unsqueeze(1)
        sure = top_k_entropy(step.head, step.hidden[:, :-1][where].detach(), self.top_k)
        factors = step.log_probs.new_ones(step.mask.shape)
        factors[where] = sure.pow(self.alpha).to(factors.dtype)
        over = "tokens" if self.on == "all" else "task_tokens"
        step.note("factor", Term(factors[where].sum(), over))
        return factors
