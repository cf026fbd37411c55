"""`f1_average` of eval_harness.metrics.continual for Hugging Face evaluate."""

from eval_harness.hf import base
from eval_harness.metrics import continual


class F1Average(base.MatrixMetric):
    function = staticmethod(continual.f1_average)
