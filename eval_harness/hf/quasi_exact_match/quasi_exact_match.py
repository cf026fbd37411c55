"""`quasi_exact_match` of eval_harness.metrics.text for Hugging Face evaluate."""

from eval_harness.hf import base
from eval_harness.metrics import text


class QuasiExactMatch(base.TextMetric):
    function = staticmethod(text.quasi_exact_match)
