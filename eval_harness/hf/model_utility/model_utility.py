"""`model_utility` of eval_harness.metrics.forgetting for Hugging Face evaluate."""

from typing import Any, ClassVar

from eval_harness.hf import base
from eval_harness.metrics import forgetting


class ModelUtility(base.Metric):
    """Three rows, one per set: `sets` its name (retain, real_authors, world_facts), then its three means.

    `kind`, which truth ratio it is, "geometric" or "arithmetic", is given to `compute` by name and has no default.
    """

    inputs: ClassVar = {"sets": base.TEXT, **dict.fromkeys(forgetting.UTILITY_QUANTITIES, base.NUMBER)}
    function = staticmethod(forgetting.model_utility)

    def _compute(
        self, *, sets: list[str], kind: forgetting.TruthRatio, **columns: list[float | None]
    ) -> dict[str, Any]:
        if len(set(sets)) < len(sets):
            raise ValueError(f"sets = {sets}: must name each set once")
        scores = {name: {what: columns[what][row] for what in columns} for row, name in enumerate(sets)}
        return base.as_result(self.name, forgetting.model_utility(scores, truth_ratio=kind))
