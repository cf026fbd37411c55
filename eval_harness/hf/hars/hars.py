"""`hars` of eval_harness.metrics.continual for Hugging Face evaluate."""

from statistics import fmean
from typing import Any, ClassVar

from eval_harness.hf import base
from eval_harness.metrics import continual


class Hars(base.Metric):
    """`predictions` are the scores on what was taught, one per task; adaptation is their mean.

    `retention`, the mean score on what was to be kept, is given to `compute` by name.
    """

    inputs: ClassVar = {"predictions": base.NUMBER}
    function = staticmethod(continual.hars)

    def _compute(self, *, predictions: list[float | None], retention: float | None, **arguments: Any) -> dict[str, Any]:
        known = [score for score in predictions if score is not None]
        adaptation = fmean(known) if len(known) == len(predictions) else None
        return base.as_result(self.name, continual.hars(adaptation, retention, **arguments))
