"""`bwt_t` of eval_harness.metrics.continual for Hugging Face evaluate."""

from eval_harness.hf import base
from eval_harness.metrics import continual


class BwtT(base.MatrixMetric):
    function = staticmethod(continual.bwt_t)
