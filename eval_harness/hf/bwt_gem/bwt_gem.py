"""`bwt_gem` of eval_harness.metrics.continual for Hugging Face evaluate."""

from eval_harness.hf import base
from eval_harness.metrics import continual


class BwtGem(base.MatrixMetric):
    function = staticmethod(continual.bwt_gem)
