"""`min_k` of eval_harness.metrics.membership for Hugging Face evaluate."""

from typing import Any, ClassVar

from eval_harness.hf import base
from eval_harness.metrics import membership


class MinK(base.Metric):
    """`log_probs` are lists, log p of each token of a text. The result is the mean, and the `scores` of all texts.

    `k`, the share of tokens, is given to `compute` by name. Low means seen in training.
    """

    inputs: ClassVar = {"log_probs": base.NUMBERS}
    function = staticmethod(membership.min_k)

    def _compute(self, *, log_probs: list[list[float]], k: float = membership.K) -> dict[str, Any]:
        scores = [membership.min_k(one, k) for one in log_probs]
        return base.mean(self.name, scores) | {"k": k, "scores": scores}
