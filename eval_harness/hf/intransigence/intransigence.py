"""`intransigence` of eval_harness.metrics.continual for Hugging Face evaluate."""

from eval_harness.hf import base
from eval_harness.metrics import continual


class Intransigence(base.MatrixMetric):
    function = staticmethod(continual.intransigence)
