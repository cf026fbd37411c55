"""`f1` of eval_harness.metrics.text for Hugging Face evaluate."""

from eval_harness.hf import base
from eval_harness.metrics import text


class F1(base.TextMetric):
    function = staticmethod(text.f1)
