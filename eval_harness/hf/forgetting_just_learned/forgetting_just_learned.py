"""`forgetting_just_learned` of eval_harness.metrics.continual for Hugging Face evaluate."""

from eval_harness.hf import base
from eval_harness.metrics import continual


class ForgettingJustLearned(base.MatrixMetric):
    function = staticmethod(continual.forgetting_just_learned)
