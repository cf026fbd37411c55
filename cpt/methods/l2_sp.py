"""L2-SP: weights are pulled back to where they started.

Paper: Li et al. 2018 (arXiv 1802.01483). Cost: one copy of the trained weights, elementwise work on them once per
optimizer step.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr

from cpt.data.spec import Name
from cpt.errors import DataError
from cpt.methods.base import Method, StageInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cpt.methods.step import Tensors


class L2SP(Method):
    """Add strength / 2 x ||w - anchor||^2 over the trained weights: weight decay towards the start instead of zero."""

    type: Literal["l2_sp"] = "l2_sp"
    strength: float = Field(0.01, ge=0, description="lambda; 0 switches it off")
    to: Literal["start", "base"] = Field(
        "start", description="the anchor: where the stage starts, or the stream's base"
    )

    name: Name = Field("l2_sp", description="what logs call it; two in a stage need two names")

    kinds: ClassVar[frozenset[str]] = frozenset({"sft", "pretrain", "rft", "sdft", "unlearn"})
    absent: ClassVar[dict[str, Any]] = {"strength": 0.0}

    _anchor: "dict[str, Tensor]" = PrivateAttr(default_factory=dict)

    @property
    def needs(self) -> frozenset[str]:
        """The whole model before it trains."""
        return frozenset({"whole"})

    def prepare_model(self, model: "nn.Module", stage: StageInfo) -> "nn.Module":
        """Copy the anchor."""
        model = model.to(stage.device)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        source: dict[str, Any] = trained
        if self.to == "base":
            assert stage.open_base is not None
            source = dict(stage.open_base().named_parameters())
            if missing := sorted(trained.keys() - source.keys()):
                place = f"stages.{stage.name}.methods.{self.name}.to = 'base'"
                raise DataError(f"{place}: the base has no {missing[0]}, which this stage trains: take to: start")
        self._anchor = {name: source[name].detach().to(p.device).float().clone() for name, p in trained.items()}
        return model

    def edit_gradients(self, gradients: "Tensors", stage: StageInfo) -> None:
        """Add strength x (weight - anchor)."""
        from cpt.losses.penalties import pull

        def pulled(name: str, gradient: "Tensor") -> "Tensor":
            made, penalty = pull(gradient, gradients.weight(name), self._anchor[name], self.strength)
            gradients.note("penalty", penalty)
            return made

        gradients.map(pulled)
