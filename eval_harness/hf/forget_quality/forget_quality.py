"""`forget_quality` of eval_harness.metrics.forgetting for Hugging Face evaluate."""

from typing import Any, ClassVar

from eval_harness.hf import base
from eval_harness.metrics import forgetting


class ForgetQuality(base.Metric):
    """`predictions` are the model's geometric truth ratios, `references` those of one that never saw the forget set.

    p-values of unlike numbers of ratios do not compare.
    """

    inputs: ClassVar = {"predictions": base.NUMBER, "references": base.NUMBER}
    function = staticmethod(forgetting.forget_quality)

    def _compute(self, *, predictions: list[float | None], references: list[float | None]) -> dict[str, Any]:
        return base.as_result(self.name, forgetting.forget_quality(predictions, references), value="p")
