"""How the battery sets up each registered method: one entry per method, or the battery fails."""

from dataclasses import dataclass, field
from typing import Any

from cpt.methods import registry
from tests.contract.lab import GENERAL_ROWS

KINDS = ("sft", "pretrain", "rft")


@dataclass(frozen=True)
class Case:
    """settings: the method as in YAML. vanishing: fields at which the hooks run and the arithmetic vanishes;
    None where the method has no continuous strength. adds: whether it adds replay's rows to a batch of sft. lora: it
    works on an adapter alone. also: further settings; those of `not_rft` are refused in an rft stage."""

    settings: dict[str, Any]
    vanishing: dict[str, Any] | None = None
    adds: bool = False
    lora: bool = False
    also: list[dict[str, Any]] = field(default_factory=list)
    not_rft: list[dict[str, Any]] = field(default_factory=list)

    def kinds(self, settings: dict[str, Any]) -> list[str]:
        """Kinds of stages in which the settings work."""
        kinds = registry.find(settings["type"]).kinds
        return [kind for kind in KINDS if kind in kinds and not (kind == "rft" and settings in self.not_rft)]


CASES = {
    "replay": Case(
        {"type": "replay", "ratio": 0.5, "general": {"rows": GENERAL_ROWS}},
        vanishing={"weight": 1e-30},
        adds=True,
        also=[{"type": "replay", "ratio": 0.25, "general": {"rows": GENERAL_ROWS}, "weight": 0.3}],
    ),
    "gere": Case(
        {"type": "gere", "ratio": 0.25, "general": {"rows": GENERAL_ROWS}, "keep": "margin", "weight": 3.0},
        also=[
            {"type": "gere", "ratio": 0.5, "general": {"rows": GENERAL_ROWS}, "keep": "labels"},
            {"type": "gere", "ratio": 0.25, "general": {"rows": GENERAL_ROWS}, "weight": "dynamic"},
            {"type": "gere", "ratio": 0.25, "general": {"rows": GENERAL_ROWS}, "keep": "l1", "weight": 0.5},
            {"type": "gere", "ratio": 0.25, "general": {"rows": GENERAL_ROWS}, "keep": "l2", "of": "start"},
        ],
        not_rft=[{"type": "gere", "ratio": "shuffled", "general": {"rows": GENERAL_ROWS}, "weight": 3.0, "passes": 1}],
    ),
    "hft": Case(
        {"type": "hft", "ratio": 0.5},
        also=[
            {"type": "hft", "ratio": 0.5, "level": "layer", "embeddings": "frozen"},
            {"type": "hft", "ratio": 0.5, "level": "model", "head": "frozen"},
        ],
    ),
}
