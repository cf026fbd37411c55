"""Projection: an adapter that does not see what the weights read before, so that it cannot change what they made of it.

Paper: GPM, Saha et al. 2021 (arXiv 2103.09762), in the forward pass instead of on gradients. Cost: before a stage one
forward pass over the rows and, per layer, an eigendecomposition as wide as its input; in a step two products of each
adapter's A with its subspace, whatever the number of tokens.
"""

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from cpt.data.spec import Name, Sources, refuse
from cpt.errors import DataError
from cpt.methods.base import Method, StageInfo, unknown_stages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from cpt.data.stage_data import StageData


class Projection(Method):
    """Keep a LoRA clear of the subspace in which the inputs of its layers lie, on general and earlier stages' rows.

    With U that subspace of a layer's input, B A (I - U U^T) stands beside the weight: by construction, for any
    optimizer, weight decay, clipping and number of processes. A takes the projection over when the stage ends.
    """

    type: Literal["projection"] = "projection"
    general: Sources | None = Field(None, description="ordinary rows that stand for what the base can do")
    earlier: Literal["all"] | list[Name] | None = Field(None, description="stages whose rows are read")
    rows: int = Field(200, gt=0, description="at most this many rows of each of them")
    energy: float = Field(
        0.97, ge=0, le=1, description="share of the inputs' energy that is protected; 0 switches it off"
    )
    max_rank: int | None = Field(None, gt=0, description="of a subspace; default: half of the layer's inputs")
    name: Name = Field("projection", description="what the run's memory calls it")

    kinds: ClassVar[frozenset[str]] = frozenset({"sft", "pretrain", "rft", "sdft"})
    absent: ClassVar[dict[str, Any]] = {"energy": 0.0}

    _rows: Any = PrivateAttr(None)
    _adapter: str = PrivateAttr("")
    _layers: "dict[str, tuple[Any, Tensor]]" = PrivateAttr(default_factory=dict)
    _hooks: list[Any] = PrivateAttr(default_factory=list)
    _facts: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _rows_to_protect(self) -> "Projection":
        if self.active and not self.general and not self.earlier:
            refuse((("general",), None, "no rows to protect: give `general`, `earlier: all`, or both"))
        return self

    @property
    def needs(self) -> frozenset[str]:
        """The whole model before it trains, and an adapter of the stage's own."""
        return frozenset({"whole", "adapter"})

    def check(self, batch_rows: int, earlier: "Sequence[str]") -> list[tuple[str, str]]:
        """The stages named must come before."""
        return unknown_stages(self.earlier, earlier) if self.active else []

    def prepare_data(self, data: "StageData", stage: StageInfo) -> None:
        """Read the rows whose inputs are protected."""
        place, earlier = f"stages.{stage.name}.methods.{self.name}", stage.rows_of(self.earlier)
        self._rows = data.gather(self.general, earlier, place, self.rows, self.rows)

    def prepare_model(self, model: "nn.Module", stage: StageInfo) -> "nn.Module":
        """Find the subspaces at the weights that the stage starts from; from here on the adapter reads past them."""
        from cpt.data.computed import about_rows, computed

        if self._rows is None:
            self._facts["note"] = "no earlier stage to protect"
            return model
        assert stage.memory is not None
        active: Any = model.active_adapters
        self._adapter = active[-1]  # the newest, the one in training
        layers = _adapted(model.to(stage.device), self._adapter, f"stages.{stage.name}.methods.{self.name}")
        about = about_rows("subspaces", self._rows, energy=self.energy, max_rank=self.max_rank, parent=stage.parent)
        about |= {"seed": stage.seed, "layers": sorted(layers)}
        found = computed(
            stage.memory, f"{self.name}-{stage.name}", about, lambda: self._subspaces(model, layers, stage)
        )
        for names, subspace in found.items():
            here = subspace.to(stage.device)
            self._layers |= {name: (layers[name], here) for name in names.split(",")}
        self._hooks = [_past(layer.lora_A[self._adapter], subspace) for layer, subspace in self._layers.values()]
        return model

    def _subspaces(self, model: "nn.Module", layers: dict[str, Any], stage: StageInfo) -> "dict[str, Tensor]":
        from cpt.data.subspace import input_subspaces

        def most(width: int) -> int:
            return min(self.max_rank or width // 2, width)

        return input_subspaces(model, layers, self._rows.dataset, self.energy, most, stage.seed)

    def finish_stage(self, model: "nn.Module", stage: StageInfo) -> None:
        """Write the projection into A, which then needs no hook."""
        from torch import no_grad

        from cpt.losses.projection import cleared

        with no_grad():
            for layer, subspace in self._layers.values():
                weight = layer.lora_A[self._adapter].weight
                weight.copy_(cleared(weight.double(), subspace))
        for hook in self._hooks:
            hook.remove()

    def facts(self) -> dict[str, Any]:
        """Rows read; the share of the update that lies in what is protected; rank / width of every layer's subspace."""
        if not self._layers:
            return dict(self._facts)
        saturation = {
            name.removeprefix("base_model.model."): round(u.shape[1] / u.shape[0], 4)
            for name, (_, u) in self._layers.items()
        }
        return {**self._facts, "rows": len(self._rows.dataset), "leak": self._leak(), "saturation": saturation}

    def _leak(self) -> float | None:
        """||update U|| / ||update|| over all layers, of the weights that the stage saves; None where nothing moved."""
        from cpt.losses.projection import cleared, energies

        inside = whole = 0.0
        for layer, u in self._layers.values():
            down, up = layer.lora_A[self._adapter].weight.detach(), layer.lora_B[self._adapter].weight
            part, all_of_it = energies(cleared(down.double(), u).to(down.dtype), up, u)
            scale = layer.scaling[self._adapter] ** 2
            inside, whole = inside + scale * part, whole + scale * all_of_it
        return math.sqrt(inside / whole) if whole else None


def _adapted(model: Any, adapter: str, place: str) -> dict[str, Any]:
    """The linear layers that the adapter stands beside, by name. Raises DataError where there is none."""
    layers = {name: module for name, module in model.named_modules() if _is_linear(module, adapter)}
    if not layers:
        raise DataError(f"{place}: the adapter stands on no linear layer: give other adapter.lora.target_modules")
    return layers


def _is_linear(module: Any, adapter: str) -> bool:
    from torch import nn

    adapters = getattr(module, "lora_A", {})
    return adapter in adapters and isinstance(adapters[adapter], nn.Linear) and hasattr(module, "in_features")


def _past(linear: Any, subspace: "Tensor") -> Any:
    """Have a LoRA's A read past the subspace."""
    from cpt.losses.projection import without

    return linear.register_forward_hook(lambda layer, args, out: without(layer, args[0], out, subspace))
