"""Half fine-tuning: train half of the weights in a stage, keep the other half as they were.

Paper: HFT, arXiv 2404.18466. Cost: no extra pass; gradient and optimizer state for the trained half only (for both
halves where a new one is drawn within a stage).
"""

import re
from collections import defaultdict
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field, PrivateAttr

from cpt.methods.base import Method, StageInfo, named_tensors

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
        ends = _ends(model, trainable)
        self._inside = {name: n for name, n in sizes.items() if name not in ends}
        self._always = {name for name, end in ends.items() if getattr(self, end) == "trained"}
        kept = self._drawn(0, stage.seed) | self._always
        moves = kept if self.resample == "stage" else set(self._inside) | self._always
        for name, parameter in trainable.items():
            parameter.requires_grad_(name in moves)
        self._report(sizes, {name: n for name, n in self._inside.items() if _place(name).layer is not None}, kept)
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

    def _report(self, sizes: dict[str, int], inside: dict[str, int], kept: set[str]) -> None:
        """sizes: everything trainable before; inside: what lies in layers, where the half is drawn."""
        by_category: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for name, n in inside.items():
            by_category[_place(name).category][0] += n * (name in kept)
            by_category[_place(name).category][1] += n
        shares = {category: round(part / whole, 4) for category, (part, whole) in by_category.items()}
        self._facts = {
            "trained_share": sum(sizes[name] for name in kept) / sum(sizes.values()),
            "trained_share_in_layers": sum(inside[name] for name in kept & set(inside)) / sum(inside.values()),
            "by_category": shares,
        }
        if self.resample == "epoch":
            self._facts["redrawn"] = "every epoch; the shares are the first one's"
        off = {category: share for category, share in shares.items() if abs(share - self.ratio) > 0.01}
        if off:
            said = ", ".join(f"{category} {share:.1%}" for category, share in off.items())
            self._facts["note"] = f"nearest share that whole tensors allow: {said} (asked: {self.ratio:.1%})"

    def facts(self) -> dict[str, Any]:
        """Share of elements trained, over all and per category, and a note where it is only the nearest."""
        return dict(self._facts)


class _Place(NamedTuple):
    layer: int | None
    category: str
    unit: str  # a module's weight and bias, or its LoRA pair, go together


def _place(name: str) -> _Place:
    """Layer, category and unit of a parameter, read from its name."""
    unit = re.sub(r"(\.lora_\w+)?(\.default)?(\.(weight|bias))?$", "", name)
    found = re.search(r"\.(\d+)\.", name)
    if re.search(r"norm|(^|\.)ln_", unit.rpartition(".")[2]):
        category = "norm"
    elif re.search(r"attn|attention", name):
        category = "attention"
    else:
        category = "feed_forward"
    return _Place(int(found[1]) if found else None, category, unit)


def _ends(model: "nn.Module", trainable: dict[str, Any]) -> dict[str, str]:
    """Names of embedding and head tensors -> the option that rules them."""
    named: Any = model
    owners = {"embeddings": named.get_input_embeddings(), "head": named.get_output_embeddings()}
    ends: dict[str, str] = {}
    for option, module in owners.items():
        own = {id(p) for p in module.parameters()} if module is not None else set()
        for name, parameter in trainable.items():
            if id(parameter) in own:
                ends.setdefault(name, option)  # a tied head is the embedding
    return ends


def choose_half(sizes: dict[str, int], ratio: float, level: str, rng: np.random.Generator) -> set[str]:
    """Names to train: per group the choice of whole units nearest to the share still owed.

    Groups are (layer, category), or all layers, or all tensors, by level. Groups of one category are visited
    in random order and each makes up for what the ones before it missed. Tensors outside layers (a final
    norm) are trained. Deterministic in (sizes, ratio, level, rng).
    """
    kept: set[str] = set()
    groups: dict[Any, dict[Any, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sizes:
        place = _place(name)
        if place.layer is None:
            kept.add(name)
        elif level == "category":
            groups[place.category, place.layer][place.unit].append(name)
        else:
            groups["all", 0][place.layer if level == "layer" else place.unit].append(name)
    owed: dict[str, float] = defaultdict(float)
    keys = sorted(groups)
    for i in rng.permutation(len(keys)):
        units = list(groups[keys[i]].values())
        weights = [sum(sizes[name] for name in unit) for unit in units]
        target = ratio * sum(weights) + owed[keys[i][0]]
        picked = _nearest(weights, target, rng)
        owed[keys[i][0]] = target - sum(weights[j] for j in picked)
        kept.update(name for j in picked for name in units[j])
    return kept


def _nearest(weights: list[int], target: float, rng: np.random.Generator) -> list[int]:
    """Which weights to take so that their sum is nearest to the target; ties are drawn.

    Up to twelve by trying all; more (layers, all tensors) by filling up in random order.
    """
    if len(weights) <= 12:
        ways = [c for k in range(len(weights) + 1) for c in combinations(range(len(weights)), k)]
        misses = np.array([abs(sum(weights[j] for j in way) - target) for way in ways])
        best = np.flatnonzero(misses <= misses.min() + 1e-9 * max(1.0, target))
        return list(ways[rng.choice(best)])
    picked, total = [], 0
    for j in rng.permutation(len(weights)):
        if abs(total + weights[j] - target) < abs(total - target):
            picked.append(int(j))
            total += weights[j]
    return picked
