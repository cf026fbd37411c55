"""`fwt_sapt` of eval_harness.metrics.continual for Hugging Face evaluate."""

from eval_harness.hf import base
from eval_harness.metrics import continual


class FwtSapt(base.MatrixMetric):
    function = staticmethod(continual.fwt_sapt)
