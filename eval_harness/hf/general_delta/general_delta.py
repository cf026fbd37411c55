"""`general_delta` of eval_harness.metrics.continual for Hugging Face evaluate."""

from typing import Any, ClassVar

from eval_harness.hf import base
from eval_harness.metrics import continual


class GeneralDelta(base.Metric):
    """`predictions` are one row per stage, the base first: the scores of the general abilities, in one order.

    Abilities are named by their place, from 1. `stage` and `higher_is_better` are given to `compute` by name.
    """

    inputs: ClassVar = {"predictions": base.NUMBERS}
    function = staticmethod(continual.general_delta)

    def _compute(self, *, predictions: list[list[float | None]], **arguments: Any) -> dict[str, Any]:
        stages = [{str(place): score for place, score in enumerate(row, start=1)} for row in predictions]
        return base.as_result(self.name, continual.general_delta(stages, **arguments))
