"""How the battery sets up each registered method: one entry per method, or the battery fails."""

from dataclasses import dataclass, field
from typing import Any

from tests.contract.lab import GENERAL_ROWS


@dataclass(frozen=True)
class Case:
    """settings: the method as in YAML. vanishing: fields at which the hooks run and the arithmetic vanishes;
    None where the method has no continuous strength."""

    settings: dict[str, Any]
    vanishing: dict[str, Any] | None = None
    also: list[dict[str, Any]] = field(default_factory=list)


CASES = {
    "replay": Case(
        {"type": "replay", "ratio": 0.5, "general": {"rows": GENERAL_ROWS}},
        vanishing={"weight": 1e-30},
        also=[{"type": "replay", "ratio": 0.25, "general": {"rows": GENERAL_ROWS}, "weight": 0.3}],
    ),
    "gere": Case(
        {"type": "gere", "ratio": 0.25, "general": {"rows": GENERAL_ROWS}, "keep": "margin", "weight": 3.0},
        also=[
            {"type": "gere", "ratio": 0.5, "general": {"rows": GENERAL_ROWS}, "keep": "labels"},
            {"type": "gere", "ratio": 0.25, "general": {"rows": GENERAL_ROWS}, "weight": "dynamic"},
        ],
    ),
    "hft": Case(
        {"type": "hft", "ratio": 0.5},
        also=[
            {"type": "hft", "ratio": 0.5, "level": "layer", "embeddings": "frozen"},
            {"type": "hft", "ratio": 0.5, "level": "model", "head": "frozen"},
        ],
    ),
}
