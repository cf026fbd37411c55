"""`extraction_strength` of eval_harness.metrics.forgetting for Hugging Face evaluate."""

from eval_harness.hf import base
from eval_harness.metrics import forgetting


class ExtractionStrength(base.HitsMetric):
    function = staticmethod(forgetting.extraction_strength)
