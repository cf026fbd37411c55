"""Truth ratios of eval_harness.metrics.forgetting for Hugging Face evaluate."""

from typing import Any, ClassVar

from eval_harness.hf import base
from eval_harness.metrics import forgetting

KINDS = {"geometric": forgetting.truth_ratio_geometric, "arithmetic": forgetting.truth_ratio_arithmetic}


class TruthRatio(base.Metric):
    """`right` are lists, log p of each token of the right answer; `wrong` lists of such, one per perturbed answer.

    Given to `compute` by name, without defaults: `kind`, "geometric" (TOFU's code) or "arithmetic" (its equation), and
    `by`, "closeness" for a forget set, "true_better" for a set to keep, or "prob_mean". The result holds the `ratios`
    of all items too, which `forget_quality` takes.
    """

    inputs: ClassVar = {"right": base.NUMBERS, "wrong": base.List(base.NUMBERS)}
    function = staticmethod(forgetting.truth_ratio_geometric)

    def _compute(
        self,
        *,
        right: list[list[float]],
        wrong: list[list[list[float]]],
        kind: forgetting.TruthRatio,
        by: forgetting.Aggregate,
    ) -> dict[str, Any]:
        if kind not in KINDS:
            raise ValueError(f"kind = {kind!r}: must be one of {', '.join(KINDS)}")
        ratios = list(map(KINDS[kind], right, wrong))
        return base.as_result(self.name, forgetting.aggregate(ratios, by)) | {"kind": kind, "ratios": ratios}
