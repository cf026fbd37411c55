"""Elastic weight consolidation: weights that mattered for what was learned before are held where they were.

Paper: EWC, Kirkpatrick et al. 2017 (arXiv 1612.00796); online form, Schwarz et al. 2018 (arXiv 1805.06370). Cost:
before a stage one forward and one backward pass for each row of the Fisher information, one by one; two float32 copies
of the trained weights; elementwise work on them once per optimizer step.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from cpt.data.spec import Name, Sources, refuse
from cpt.methods.base import Method, StageInfo, unknown_stages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from cpt.data.stage_data import StageData
    from cpt.methods.step import Tensors


class EWC(Method):
    """Add strength / 2 x sum F (w - start)^2, F the Fisher information of general rows and of earlier stages' rows.

    F is taken at the weights that the stage starts from, per token, so that a strength of 1 stands for one token
    loss of those rows beside the task's (to second order, coupling of weights left out).
    """

    type: Literal["ewc"] = "ewc"
    strength: float = Field(1.0, ge=0, description="lambda; 0 switches it off")
    general: Sources | None = Field(None, description="ordinary rows that stand for what the base can do")
    earlier: Literal["all"] | list[Name] | None = Field(None, description="stages whose rows the Fisher is taken on")
    rows: int = Field(200, gt=0, description="at most this many rows of each of them")
    fisher: Literal["true", "empirical"] = Field("true", description="labels drawn from the model, or the rows' own")
    online: float | None = Field(
        None, gt=0, le=1, description="factor of what the stage before used; only its own rows are then new"
    )
    name: Name = Field("ewc", description="what logs and the run's memory call it")

    kinds: ClassVar[frozenset[str]] = frozenset({"sft", "pretrain", "rft", "sdft", "unlearn"})
    absent: ClassVar[dict[str, Any]] = {"strength": 0.0}

    _rows: Any = PrivateAttr(None)
    _before: Any = PrivateAttr(None)
    _anchor: "dict[str, Tensor]" = PrivateAttr(default_factory=dict)
    _fisher: "dict[str, Tensor]" = PrivateAttr(default_factory=dict)
    _facts: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _data_for_the_fisher(self) -> "EWC":
        if self.active and not self.general and not self.earlier:
            refuse((("general",), None, "no rows for the Fisher information: give `general`, `earlier: all`, or both"))
        if self.online is not None and self.earlier != "all":
            refuse((("online",), self.online, "goes from stage to stage: give `earlier: all`"))
        return self

    @property
    def needs(self) -> frozenset[str]:
        """The whole model before it trains."""
        return frozenset({"whole"})

    def check(self, batch_rows: int, earlier: "Sequence[str]") -> list[tuple[str, str]]:
        """The stages named must come before."""
        return unknown_stages(self.earlier, earlier) if self.active else []

    def prepare_data(self, data: "StageData", stage: StageInfo) -> None:
        """Read the rows of the Fisher information; with `online` those that the stage before has not seen."""
        self._before = self._of_the_stage_before(stage)
        general, earlier = self.general, stage.rows_of(self.earlier)
        if self._before is not None:
            general, earlier = None, dict(list(earlier.items())[-1:])
        place = f"stages.{stage.name}.methods.{self.name}"
        self._rows = data.gather(general, earlier, place, self.rows, self.rows)

    def _of_the_stage_before(self, stage: StageInfo) -> Any:
        """With `online` the entry of the memory by which the stage before held its weights, if it did."""
        from cpt.data.computed import newest

        if self.online is None or stage.memory is None or not stage.identities:
            return None
        *earlier, last = stage.identities
        start = stage.identities[earlier[-1]] if earlier else stage.base
        found = newest(stage.memory, of="fisher", name=self.name, stage=last)
        # With a schedule that goes on it started from another state of the stage before it.
        return found if found and f"{found.about['parent']}/".startswith(f"{start}/") else None

    def prepare_model(self, model: "nn.Module", stage: StageInfo) -> "nn.Module":
        """Take the Fisher information at the weights that the stage starts from, and keep both."""
        from cpt.data.computed import about_rows, computed

        if self._rows is None:
            self._facts["note"] = "no earlier stage to hold"
            return model
        assert stage.memory is not None
        model = model.to(stage.device)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        about = about_rows("fisher", self._rows, fisher=self.fisher, online=self.online, name=self.name)
        about |= {"stage": stage.name, "parent": stage.parent, "seed": stage.seed}
        about["shapes"] = {name: list(p.shape) for name, p in trained.items()}
        about["rows"] += self._before.rows if self._before else []
        found = computed(stage.memory, f"{self.name}-{stage.name}", about, lambda: self._information(model, stage))
        self._anchor = {name: p.detach().float().clone() for name, p in trained.items()}
        self._fisher = {name: found[name].to(p.device) for name, p in trained.items()}
        self._facts |= {"rows": len(self._rows.dataset), "carried": self._before is not None}
        return model

    def _information(self, model: "nn.Module", stage: StageInfo) -> "dict[str, Tensor]":
        """F of the rows, and online x what the stage before used, where that has a tensor of the name and shape."""
        from cpt.data.computed import tensors_of
        from cpt.data.fisher import fisher

        found = fisher(model, self._rows.dataset, sampled=self.fisher == "true", seed=stage.seed)
        for name, tensor in (tensors_of(self._before) if self._before else {}).items():
            if name in found and found[name].shape == tensor.shape:
                found[name] += (self.online or 0.0) * tensor.to(found[name].device)
        return found

    def edit_gradients(self, gradients: "Tensors", stage: StageInfo) -> None:
        """Add strength x F x (weight - start)."""
        from cpt.losses.penalties import pull

        def pulled(name: str, gradient: "Tensor") -> "Tensor":
            if name not in self._fisher:
                return gradient
            made, penalty = pull(
                gradient, gradients.weight(name), self._anchor[name], self.strength, self._fisher[name]
            )
            gradients.note("penalty", penalty)
            return made

        gradients.map(pulled)

    def facts(self) -> dict[str, Any]:
        """Rows of the Fisher information."""
        return dict(self._facts)
