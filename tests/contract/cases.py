"""How the battery sets up each registered method: one entry per method, or the battery fails."""

from dataclasses import dataclass, field
from typing import Any

from cpt.config import GENERATING
from cpt.methods import registry
from tests.contract.lab import GENERAL_ROWS, TASK_ROWS

KINDS = ("sft", "pretrain", "rft", "sdft", "unlearn")


@dataclass(frozen=True)
class Case:
    """settings: the method as in YAML. vanishing: fields at which the hooks run and the arithmetic vanishes;
    None where the method has no continuous strength. adds: whether it adds replay's rows to a batch of sft. lora: it
    works on an adapter alone. also: further settings; those of `not_rft` are refused in rft and sdft stages, those of
    `not_lora` with an adapter."""

    settings: dict[str, Any]
    vanishing: dict[str, Any] | None = None
    adds: bool = False
    lora: bool = False
    also: list[dict[str, Any]] = field(default_factory=list)
    not_rft: list[dict[str, Any]] = field(default_factory=list)
    not_lora: list[dict[str, Any]] = field(default_factory=list)

    def kinds(self, settings: dict[str, Any]) -> list[str]:
        """Kinds of stages in which the settings work."""
        kinds = registry.find(settings["type"]).kinds
        forgets = registry.find(settings["type"]).forgets  # others stand beside one of these there: test_pairs
        kinds = kinds if forgets else kinds - {"unlearn"}
        return [kind for kind in KINDS if kind in kinds and not (kind in GENERATING and settings in self.not_rft)]


# Other answers to the task's prompts: what is learned of one is lost of the other.
CONTRARY_ROWS = [{"prompt": row["prompt"], "completion": "q q q x x x"} for row in TASK_ROWS[:10]]

CASES = {
    "flat": Case(
        {"type": "flat"},
        also=[
            {"type": "flat", "divergence": "jeffrey", "probability": "geometric"},
            {"type": "flat", "divergence": "neyman", "weight": 2.0},
        ],
    ),
    "grad_ascent": Case({"type": "grad_ascent", "weight": 0.2}),
    "idk": Case({"type": "idk"}),
    "npo": Case({"type": "npo"}, also=[{"type": "npo", "beta": 1.0}]),
    "simnpo": Case({"type": "simnpo"}, also=[{"type": "simnpo", "beta": 0.7, "margin": -2.0}]),
    "dpo": Case({"type": "dpo"}),
    "eaft": Case(
        {"type": "eaft"},
        vanishing={"alpha": 1e-30},
        also=[{"type": "eaft", "alpha": 2.0, "top_k": 5, "on": "all"}],
    ),
    "a_gem": Case(
        {"type": "a_gem", "rows": 4, "general": {"rows": CONTRARY_ROWS}},
        also=[{"type": "a_gem", "rows": 20, "general": {"rows": CONTRARY_ROWS}}],
    ),
    "rewrite": Case({"type": "rewrite"}, also=[{"type": "rewrite", "share": 0.5, "verify": "contains"}]),
    "replay": Case(
        {"type": "replay", "ratio": 0.5, "general": {"rows": GENERAL_ROWS}},
        vanishing={"weight": 1e-30},
        adds=True,
        also=[{"type": "replay", "ratio": 0.25, "general": {"rows": GENERAL_ROWS}, "weight": 0.3}],
        not_rft=[{"type": "replay", "ratio": 0.4, "general": {"rows": GENERAL_ROWS}, "by": "tokens"}],
    ),
    "gere": Case(
        {"type": "gere", "ratio": 0.25, "general": {"rows": GENERAL_ROWS}, "keep": "margin", "weight": 3.0},
        also=[
            {"type": "gere", "ratio": 0.5, "general": {"rows": GENERAL_ROWS}, "keep": "labels"},
            {"type": "gere", "ratio": 0.25, "general": {"rows": GENERAL_ROWS}, "weight": "dynamic"},
            {"type": "gere", "ratio": 0.25, "general": {"rows": GENERAL_ROWS}, "keep": "l1", "weight": 0.5},
            {"type": "gere", "ratio": 0.25, "general": {"rows": GENERAL_ROWS}, "keep": "kl", "weight": 1.0},
            {"type": "gere", "ratio": 0.25, "general": {"rows": GENERAL_ROWS}, "keep": "l2", "of": "start"},
        ],
        not_rft=[{"type": "gere", "ratio": "shuffled", "general": {"rows": GENERAL_ROWS}, "weight": 3.0, "passes": 1}],
    ),
    "hft": Case(
        {"type": "hft", "ratio": 0.5},
        also=[
            {"type": "hft", "ratio": 0.5, "level": "layer", "embeddings": "frozen"},
            {"type": "hft", "ratio": 0.5, "level": "model", "head": "frozen"},
            {"type": "hft", "ratio": 0.5, "resample": "epoch", "protected": ["layers.0.mlp"]},
        ],
    ),
    "distill": Case(
        {"type": "distill", "weight": 0.5},
        vanishing={"weight": 1e-30},
        also=[
            {"type": "distill", "to": "base", "direction": "reverse", "temperature": 2.0},
            {"type": "distill", "to": "average", "decay": 0.5, "weight": 3.0},
            {"type": "distill", "to": "base", "reference": "weights", "on": "all"},
        ],
    ),
    "ewc": Case(
        {"type": "ewc", "strength": 100.0, "general": {"rows": GENERAL_ROWS}},
        vanishing={"strength": 1e-30},
        also=[{"type": "ewc", "strength": 3.0, "general": {"rows": GENERAL_ROWS}, "fisher": "empirical", "rows": 4}],
    ),
    "l2_sp": Case(
        {"type": "l2_sp", "strength": 1.0},
        vanishing={"strength": 1e-30},
        not_lora=[{"type": "l2_sp", "strength": 0.5, "to": "base"}],
    ),
    "projection": Case(
        {"type": "projection", "general": {"rows": GENERAL_ROWS}},
        lora=True,
        also=[{"type": "projection", "general": {"rows": GENERAL_ROWS}, "energy": 0.9, "max_rank": 3}],
    ),
    "block_anchor": Case(
        {"type": "block_anchor", "weight": 0.5, "reference": "weights"},
        vanishing={"weight": 1e-30},
        also=[
            {"type": "block_anchor", "weight": 3.0, "reference": "weights", "to": "base", "blocks": [0]},
            {"type": "block_anchor", "weight": 0.5, "reference": "weights", "blocks": 1, "on": "all"},
        ],
    ),
    "der": Case(
        {"type": "der", "ratio": 0.5, "alpha": 0.5},
        also=[{"type": "der", "ratio": 0.25, "alpha": 0.0}, {"type": "der", "ratio": 0.25, "beta": 0.0, "top_k": 4}],
    ),
}
