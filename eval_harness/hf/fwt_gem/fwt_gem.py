"""`fwt_gem` of eval_harness.metrics.continual for Hugging Face evaluate."""

from eval_harness.hf import base
from eval_harness.metrics import continual


class FwtGem(base.MatrixMetric):
    function = staticmethod(continual.fwt_gem)
