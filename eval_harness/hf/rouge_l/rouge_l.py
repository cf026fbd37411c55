"""`rouge_l` of eval_harness.metrics.text for Hugging Face evaluate."""

from typing import Any, ClassVar

from eval_harness.hf import base
from eval_harness.metrics import text


class RougeL(base.Metric):
    """`predictions` and `references` are texts; the result holds the means of F1 (`rouge_l`), recall and precision.

    `stemmer`, whether words are stemmed, has no default: published figures differ in it.
    """

    inputs: ClassVar = {"predictions": base.TEXT, "references": base.TEXT}
    function = staticmethod(text.rouge_l)

    def _compute(self, *, predictions: list[str], references: list[str], stemmer: bool) -> dict[str, Any]:
        pairs = zip(predictions, references, strict=True)
        found = [text.rouge_l(prediction, reference, stemmer=stemmer) for prediction, reference in pairs]
        parts = {part: [getattr(one, part, None) for one in found] for part in text.Rouge._fields}
        others = {f"rouge_l_{part}": base.mean(part, parts[part])[part] for part in ("recall", "precision")}
        return base.mean(self.name, parts["fmeasure"]) | others
