"""Backward transfer by both of its divisors for Hugging Face evaluate."""

from typing import Any

from eval_harness.hf import base
from eval_harness.metrics import continual


class Bwt(base.MatrixMetric):
    """`predictions` are the rows of the score matrix R, the base first: T + 1 rows of T scores, None where unknown.

    The same sum is published over T - 1 (GEM) and over T (SAPT, TRACE): the result holds both, by name.
    """

    function = staticmethod(continual.bwt_gem)

    def _compute(self, *, predictions: list[list[float | None]], **arguments: Any) -> dict[str, Any]:
        gem = continual.bwt_gem(predictions, **arguments)
        over_t = continual.bwt_t(predictions, **arguments)
        formulas = {"bwt_gem": gem.formula, "bwt_t": over_t.formula}
        return {"bwt_gem": gem.value, "bwt_t": over_t.value, "formula": formulas, "n": gem.n, "reason": gem.reason}
