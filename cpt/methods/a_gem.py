"""A-GEM: a step that would raise the loss of earlier stages' rows is turned until it does not, to first order.

Paper: A-GEM, Chaudhry et al. 2019 (arXiv 1812.00420). Cost: once per optimizer step a forward and a backward pass over
`rows` rows of earlier stages, and a second gradient as large as the trained weights.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from cpt.data.spec import Name, Sources, refuse
from cpt.methods.base import Method, StageInfo, unknown_stages

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cpt.data.stage_data import StageData
    from cpt.methods.step import Tensors


class AGEM(Method):
    """Take out of the gradient what works against the mean gradient of earlier rows, where something does.

    Those rows are looked at, not trained on: the loss never holds theirs.
    """

    type: Literal["a_gem"] = "a_gem"
    rows: int = Field(32, ge=0, description="rows of the memory that are looked at in every step; 0 switches it off")
    general: Sources | None = Field(None, description="ordinary rows that stand for what the base can do")
    earlier: Literal["all"] | list[Name] | None = Field(None, description="stages whose rows are remembered")
    rows_per_stage: int | None = Field(None, gt=0, description="at most this many of each earlier stage")
    name: Name = Field("a_gem", description="what logs call it")

    kinds: ClassVar[frozenset[str]] = frozenset({"sft", "pretrain", "rft", "sdft"})
    order: ClassVar[str] = "mask"
    absent: ClassVar[dict[str, Any]] = {"rows": 0}

    _rows: Any = PrivateAttr(None)
    _model: Any = PrivateAttr(None)
    _steps: int = PrivateAttr(0)
    _turned: Any = PrivateAttr(0.0)

    @model_validator(mode="after")
    def _something_to_remember(self) -> "AGEM":
        if self.active and not self.general and not self.earlier:
            refuse((("earlier",), None, "nothing to remember: give `earlier: all`, `general` rows, or both"))
        return self

    @property
    def needs(self) -> frozenset[str]:
        """Passes of its own between the trainer's."""
        return frozenset({"own passes"})

    def check(self, batch_rows: int, earlier: Sequence[str]) -> list[tuple[str, str]]:
        """The stages to remember must come before."""
        return unknown_stages(self.earlier, earlier) if self.active else []

    def prepare_data(self, data: "StageData", stage: StageInfo) -> None:
        """Read the rows."""
        place, earlier = f"stages.{stage.name}.methods.{self.name}", stage.rows_of(self.earlier)
        self._rows = data.gather(self.general, earlier, place, of_each=self.rows_per_stage)

    def prepare_model(self, model: "nn.Module", stage: StageInfo) -> "nn.Module":
        """Keep the model at hand: its gradient on the rows is taken between steps."""
        self._model = model
        return model

    def edit_gradients(self, gradients: "Tensors", stage: StageInfo) -> None:
        """Where the step works against the rows' gradient, take that part out."""
        from cpt.data.gradient import gradient
        from cpt.data.sampler import Turns
        from cpt.losses.conflict import against

        if self._rows is None:
            return
        turns = Turns(len(self._rows.dataset), stage.seed, self.name)
        drawn = sorted({turns[self._steps * self.rows + i] for i in range(self.rows)})
        own = {name: gradients.parameter(name) for name, _ in gradients}
        found = gradient(self._model, self._rows.dataset, drawn, own)
        coefficient, cosine = against((tensor, found[name]) for name, tensor in gradients)
        gradients.map(lambda name, tensor: tensor - (coefficient * found[name]).to(tensor.dtype))
        gradients.note("cosine", cosine)
        self._steps += 1
        self._turned = self._turned + (coefficient < 0).double()

    def state_dict(self) -> "dict[str, Tensor]":
        """How many steps were taken, and how many of them turned."""
        import torch

        return {"steps": torch.tensor(self._steps), "turned": torch.as_tensor(self._turned).reshape(())}

    def load_state_dict(self, state: "dict[str, Tensor]") -> None:
        """Go on counting."""
        self._steps, self._turned = int(state["steps"]), float(state["turned"])

    def facts(self) -> dict[str, Any]:
        """Rows in memory, and the share of steps that were turned."""
        if self._rows is None:
            return {"note": "no earlier stage to remember"}
        share = float(self._turned) / self._steps if self._steps else None
        return {"rows": len(self._rows.dataset), "turned": share}
