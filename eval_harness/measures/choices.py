"""Rows with choices: which one the model finds most likely, and whether it writes it in the form asked for."""

from __future__ import annotations

import math

from eval_harness.items import Item, Measured
from eval_harness.measures.answers import with_references
from eval_harness.measures.base import COMPLETION, Measure, best_of, mean_of
from eval_harness.results import Result


def acc(measured: Measured) -> Result:
    """Share of rows whose right choice has the highest summed log-likelihood.

    Sums, not means per token; the end tokens are left out, so that a template's tail weighs nothing. A tie
    goes to the choice that the row lists first.
    """
    return mean_of(measured, ("choices",), is_right, f"acc@1(sum,no_end,{measured.prompting})", note=_chance(measured))


def acc_norm(measured: Measured) -> Result:
    """As `acc`, the sums divided by the characters of the choice, as lm-evaluation-harness does."""

    def value(item: Item) -> float:
        sizes = map(len, item.row.choices)
        return _is_best(item, [total / size for total, size in zip(_sums(item), sizes, strict=True)])

    definition = f"acc_norm@1(per_character,no_end,{measured.prompting})"
    return mean_of(measured, ("choices",), value, definition, note=_chance(measured))


def format_drift(measured: Measured) -> Result:
    """`acc` minus `exact_match`, row by row: the model knows the answer and no longer gives it in the form asked for.

    SEFE (arXiv 2505.02486) calls it superficial forgetting; a strict parser alone cannot tell it from lost knowledge.
    """
    return mean_of(
        measured,
        with_references(measured, "choices"),
        lambda item: is_right(item) - item.is_exact,
        f"format_drift@1(acc-exact_match{best_of(measured)},{measured.prompting})",
        higher_is_better=False,
    )


def is_right(item: Item) -> float:
    """1.0 where the right choice has the highest sum."""
    return _is_best(item, _sums(item))


def _sums(item: Item) -> list[float]:
    return [answer.text_log_prob for answer in item.answers("choices")]


def _is_best(item: Item, scores: list[float]) -> float:
    return float(item.row.choices[max(range(len(scores)), key=scores.__getitem__)] == item.row.completion)


def _chance(measured: Measured) -> str | None:
    items, _ = measured.kept("choices")
    if not items:
        return None
    return f"chance level {math.fsum(1 / len(item.row.choices) for item in items) / len(items):.4g}"


MEASURES = {
    "acc": Measure(acc, ("choices",), COMPLETION, needs=("choices",)),
    "acc_norm": Measure(acc_norm, ("choices",), COMPLETION, needs=("choices",)),
    "format_drift": Measure(
        format_drift, ("choices", "references"), COMPLETION, needs=("choices",), higher_is_better=False
    ),
}
