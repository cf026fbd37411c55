"""Half fine-tuning: train half of the weights in a stage, keep the other half as they were.

Paper: HFT, arXiv 2404.18466. Cost: no extra pass; gradient and optimizer state for the trained half only (for both
halves where a new one is drawn within a stage).
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, PrivateAttr

from cpt.methods.base import Method, StageInfo, named_tensors
from cpt.methods.halves import choose_half, ends_of, shares

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cpt.methods.step import Tensors


class HFT(Method):
    """Freeze a random half of the weights for one stage; draw a new half for the next.

    At level `category` every layer trains half of its attention, half of its feed-forward and half of its
    norms, by number of elements: choosing two of q, k, v, o by count would train 20 % to 80 % of the attention
    under grouped queries. A share that no choice of whole tensors reaches in one layer (two of three
    feed-forward matrices) is evened out over the layers; what remains is reported.
    """

    type: Literal["hft"] = "hft"
    ratio: float = Field(0.5, gt=0, le=1, description="share of elements trained; 1 switches it off")
    level: Literal["category", "layer", "model"] = Field("category", description="what is drawn")
    embeddings: Literal["trained", "frozen"] = Field("trained", description="frozen saves most where tied")
    head: Literal["trained", "frozen"] = Field("trained", description="follows the embeddings where tied")
    resample: Literal["stage", "epoch"] = Field("stage", description="when a new half is drawn")
    protected: list[str] = Field(
        [], description="modules that are never trained, by name or pattern: lm_head, layers.0"
    )

    kinds: ClassVar[frozenset[str]] = frozenset({"sft", "pretrain", "rft", "sdft", "unlearn"})
    order: ClassVar[str] = "mask"
    owns_requires_grad: ClassVar[bool] = True
    absent: ClassVar[dict[str, Any]] = {"ratio": 1.0, "embeddings": "trained", "head": "trained", "protected": []}

    _facts: dict[str, Any] = PrivateAttr(default_factory=dict)
    _inside: dict[str, int] = PrivateAttr(default_factory=dict)
    _always: set[str] = PrivateAttr(default_factory=set)
    _half: tuple[int, set[str]] = PrivateAttr((-1, set()))
    _steps: int = PrivateAttr(0)

    @property
    def edits(self) -> frozenset[str]:
        """Within a stage the optimizer holds both halves: the gradients of the one at rest are taken away."""
        return frozenset({"drops"}) if self.resample == "epoch" else frozenset()

    def prepare_model(self, model: "nn.Module", stage: StageInfo) -> "nn.Module":
        """Switch off the gradient of what is frozen, among what is trainable now (also inside PEFT)."""
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name in named_tensors(trainable, self.protected, f"stages.{stage.name}.methods.hft.protected"):
            trainable.pop(name).requires_grad_(False)
        sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in trainable.items()}  # ZeRO-3 holds pieces
        ends = ends_of(model, trainable)
        self._inside = {name: n for name, n in sizes.items() if name not in ends}
        self._always = {name for name, end in ends.items() if getattr(self, end) == "trained"}
        kept = self._drawn(0, stage.seed) | self._always
        moves = kept if self.resample == "stage" else set(self._inside) | self._always
        for name, parameter in trainable.items():
            parameter.requires_grad_(name in moves)
        self._facts = shares(sizes, self._inside, kept, self.ratio)
        if self.resample == "epoch":
            self._facts["redrawn"] = "every epoch; the shares are the first one's"
        return model

    def _drawn(self, epoch: int, seed: int) -> set[str]:
        """The half of what lies inside that an epoch trains."""
        if self._half[0] != epoch:
            key = [seed, 404, epoch] if epoch else [seed, 404]
            self._half = epoch, choose_half(self._inside, self.ratio, self.level, np.random.default_rng(key))
        return self._half[1]

    def edit_gradients(self, gradients: "Tensors", stage: StageInfo) -> None:
        """Leave this epoch's half to the optimizer; the other keeps its bits."""
        kept = self._drawn(int(self._steps / stage.epoch_steps), stage.seed) | self._always
        self._steps += 1
        for name in {name for name, _ in gradients} - kept:
            gradients.drop(name)

    def state_dict(self) -> "dict[str, Tensor]":
        """Optimizer steps done, which tell the epoch."""
        import torch

        return {"steps": torch.tensor(self._steps)} if self.resample == "epoch" else {}

    def load_state_dict(self, state: "dict[str, Tensor]") -> None:
        """Go on in that epoch."""
        self._steps = int(state["steps"])

    def facts(self) -> dict[str, Any]:
        """Share of elements trained, over all and per category, and a note where it is only the nearest."""
        return dict(self._facts)
