"""Halves of a model by whole tensors: which are drawn, and what share of the elements that makes."""

import re
from collections import defaultdict
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import nn


class Place(NamedTuple):
    layer: int | None
    category: str
    unit: str  # a module's weight and bias, or its LoRA pair, go together


def place_of(name: str) -> Place:
    """Layer, category and unit of a parameter, read from its name."""
    unit = re.sub(r"(\.lora_\w+)?(\.default)?(\.(weight|bias))?$", "", name)
    found = re.search(r"\.(\d+)\.", name)
    if re.search(r"norm|(^|\.)ln_", unit.rpartition(".")[2]):
        category = "norm"
    elif re.search(r"attn|attention", name):
        category = "attention"
    else:
        category = "feed_forward"
    return Place(int(found[1]) if found else None, category, unit)


def ends_of(model: "nn.Module", trainable: dict[str, Any]) -> dict[str, str]:
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
        place = place_of(name)
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


def shares(sizes: dict[str, int], inside: dict[str, int], kept: set[str], ratio: float) -> dict[str, Any]:
    """What a stage's record says: which share is trained of everything, of what lies in layers, of each category.

    sizes: everything trainable before; inside: what a half is drawn of. A note where `ratio` is not met to a percent.
    """
    places = {name: place_of(name) for name in inside}
    layers = {name: n for name, n in inside.items() if places[name].layer is not None}
    parts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, n in layers.items():
        parts[places[name].category][0] += n * (name in kept)
        parts[places[name].category][1] += n
    found = {category: round(part / whole, 4) for category, (part, whole) in parts.items()}
    facts: dict[str, Any] = {
        "trained_share": sum(sizes[name] for name in kept) / sum(sizes.values()),
        "trained_share_in_layers": sum(layers[name] for name in kept & set(layers)) / sum(layers.values()),
        "by_category": found,
    }
    if off := {category: share for category, share in found.items() if abs(share - ratio) > 0.01}:
        said = ", ".join(f"{category} {share:.1%}" for category, share in off.items())
        facts["note"] = f"nearest share that whole tensors allow: {said} (asked: {ratio:.1%})"
    return facts
