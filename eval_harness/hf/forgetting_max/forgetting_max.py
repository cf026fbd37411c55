"""`forgetting_max` of eval_harness.metrics.continual for Hugging Face evaluate."""

from eval_harness.hf import base
from eval_harness.metrics import continual


class ForgettingMax(base.MatrixMetric):
    function = staticmethod(continual.forgetting_max)
