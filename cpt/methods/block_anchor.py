"""Block anchor: the residual stream of the rows at hand stays near a reference's, at the ends of a few blocks.

Paper: EcoTTA, arXiv 2303.01904, whose regulariser this is, on a language model and beside its loss. Cost: one forward
pass without gradient a step, and the outputs of the blocks that are read; for `weights` a copy of the trained weights.
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from cpt.data.spec import Name, refuse
from cpt.errors import DataError
from cpt.methods.base import Method, StageInfo, Term

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cpt.methods.step import Step


class BlockAnchor(Method):
    """Hold the outputs of a few blocks on the stage's own rows near those of the base, or of the stage's start.

    By L1, in units of the reference's root mean square at each token, so that blocks count alike. No general or
    earlier rows are needed. What the task must change is held back too: compare at equal new-task score.
    """

    type: Literal["block_anchor"] = "block_anchor"
    to: Literal["base", "start"] = Field("start", description="whose block outputs are kept")
    weight: float = Field(0.25, ge=0, description="lambda, of the sum over blocks; 0 switches it off")
    blocks: Annotated[int, Field(gt=0)] | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = Field(
        4, description="how many, at even distances, the last among them; or a list of their numbers, from 0"
    )
    on: Literal["task", "all"] = Field("task", description="the task's rows, or those that other methods add too")
    reference: Literal["auto", "weights"] = Field(
        "auto", description="the model without its adapters; weights: where that is another, a copy of what is trained"
    )

    name: Name = Field("block_anchor", description="what logs call it; two in a stage need two names")

    absent: ClassVar[dict[str, Any]] = {"weight": 0.0}

    _weights: "dict[str, Tensor] | None" = PrivateAttr(None)

    @model_validator(mode="after")
    def _each_block_once(self) -> "BlockAnchor":
        if isinstance(self.blocks, list) and len(set(self.blocks)) < len(self.blocks):
            refuse((("blocks",), self.blocks, "names a block twice"))
        return self

    @property
    def needs(self) -> frozenset[str]:
        """Block outputs of the whole model; its own without adapters, unless a copy is asked for."""
        bare = {f"{self.to} without adapter"} if self.reference == "auto" else set()
        return frozenset({"blocks", "whole"} | bare)

    def blocks_read(self, count: int) -> list[int]:
        """Which of so many blocks are held. Raises DataError for a number beyond the last."""
        from cpt.data.blocks import evenly

        if isinstance(self.blocks, int):
            return evenly(self.blocks, count)
        if max(self.blocks) >= count:
            raise DataError(f"blocks = {self.blocks}: the model has {count} blocks, 0 to {count - 1}")
        return sorted(self.blocks)

    def prepare_model(self, model: "nn.Module", stage: StageInfo) -> "nn.Module":
        """Copy the weights where the reference is a copy; make sure that there is one otherwise."""
        from cpt.methods.weights import copied

        place = f"stages.{stage.name}.methods.{self.name}"
        if self.to in stage.adapters_off:
            return model
        if self.reference == "auto":
            raise DataError(f"{place}.to = {self.to!r}: the model without its adapters is another: {INSTEAD}")
        self._weights = copied(model, stage, self.to, f"{place}.to = 'base'", "take to: start")
        return model

    def loss_terms(self, step: "Step") -> dict[str, Term]:
        """The distance, summed over blocks: mean over the learned tokens of its rows."""
        from cpt.losses.distances import relative_l1

        over, where = ("tokens", step.mask) if self.on == "all" else ("task_tokens", step.mask & _task(step))
        other, total = step.reference(self.to, self._weights).blocks, step.log_probs.new_zeros(())
        for number in self.blocks_read(len(step.blocks)):
            mine, kept = (one[number][:, :-1][where] for one in (step.blocks, other))
            apart = relative_l1(mine, kept).sum()
            step.note(f"block_{number}", Term(apart.detach(), over))
            total = total + apart
        return {"distance": Term(total, over, self.weight)}

    def facts(self) -> dict[str, Any]:
        """Where the reference comes from."""
        return {"reference": "adapter" if self._weights is None else "weights"}


INSTEAD = "set reference: weights, which keeps a copy of what the stage trains"


def _task(step: "Step") -> "Tensor":
    return step.rows("task").unsqueeze(1)
