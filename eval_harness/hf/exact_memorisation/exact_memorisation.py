"""`exact_memorisation` of eval_harness.metrics.forgetting for Hugging Face evaluate."""

from eval_harness.hf import base
from eval_harness.metrics import forgetting


class ExactMemorisation(base.HitsMetric):
    function = staticmethod(forgetting.exact_memorisation)
