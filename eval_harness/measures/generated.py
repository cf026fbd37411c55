"""What the model writes, compared with the reference: strictly, leniently, by overlap, as mathematics.

Of several right answers the best counts, as for SQuAD and TriviaQA; mathematics compares with the row's own.
"""

from __future__ import annotations

from collections.abc import Callable

from eval_harness.items import Ask, Item, Measured
from eval_harness.measures.base import COMPLETION, Measure, best_of, mean_of
from eval_harness.metrics import maths, text
from eval_harness.results import Result

UNDEFINED = "undefined_for_this_reference"
ASKS: tuple[Ask, ...] = ("generation",)


def quasi_exact_match(measured: Measured) -> Result:
    """Share of continuations that are the answer after SQuAD's normalisation (Rajpurkar et al. 2016)."""
    return _mean(measured, f"quasi_exact_match@1(squad{best_of(measured)}", _strict)


def contains_answer(measured: Measured) -> Result:
    """Share of continuations that hold the normalised answer as whole words: the lenient parser."""
    return _mean(measured, f"contains_answer@1(squad,whole_words{best_of(measured)}", _lenient)


def named_choice(measured: Measured) -> Result:
    """Share of continuations that name the right choice and no other, by its letter or its text."""

    def value(item: Item) -> float:
        found = text.named_choice(item.written, item.row.choices)
        return float(found is not None and item.row.choices[found] == item.row.completion)

    return _mean(measured, "named_choice@1(letter_or_text", value)


def f1(measured: Measured) -> Result:
    """Mean token F1 of continuation and answer (SQuAD)."""
    return _mean(measured, f"f1@1(squad{best_of(measured)}", lambda item: text.f1(item.written, item.references))


def rouge_l(measured: Measured) -> Result:
    """Mean ROUGE-L F1 (Lin 2004), with stemming."""
    return _mean(measured, f"rouge_l@1(f1,stemmer{best_of(measured)}", lambda item: _rouge(item, "fmeasure"))


def rouge_l_recall(measured: Measured) -> Result:
    """Mean ROUGE-L recall with stemming, as TOFU measures what is still said."""
    return _mean(measured, f"rouge_l_recall@1(stemmer{best_of(measured)}", lambda item: _rouge(item, "recall"))


def math_strict(measured: Measured) -> Result:
    """Share of right results among continuations, where they are announced in the form asked for."""
    return _mean(measured, "math_strict@1(announced", _math_strict)


def math_lenient(measured: Measured) -> Result:
    """Share of right results wherever they stand: math-verify, else the last number."""
    return _mean(measured, "math_lenient@1(math_verify,last_number", _math_lenient)


def format_drift_text(measured: Measured) -> Result:
    """`contains_answer` minus `quasi_exact_match`, row by row: said, but not in the form asked for."""
    definition = f"format_drift_text@1(contains_answer-quasi_exact_match{best_of(measured)}"
    return _drift(measured, definition, _lenient, _strict)


def format_drift_math(measured: Measured) -> Result:
    """`math_lenient` minus `math_strict`, row by row: solved, but not in the form asked for."""
    return _drift(measured, "format_drift_math@1(math_lenient-math_strict", _math_lenient, _math_strict)


def _mean(
    measured: Measured, definition: str, value: Callable[[Item], float | None], higher_is_better: bool = True
) -> Result:
    def defined(item: Item) -> float | str:
        found = value(item)
        return UNDEFINED if found is None else found

    settings = f"{definition},{measured.generation},{measured.prompting})"
    return mean_of(measured, ASKS, defined, settings, higher_is_better=higher_is_better)


def _drift(
    measured: Measured,
    definition: str,
    lenient: Callable[[Item], float | None],
    strict: Callable[[Item], float | None],
) -> Result:
    def difference(item: Item) -> float | None:
        wide, narrow = lenient(item), strict(item)
        return None if wide is None or narrow is None else wide - narrow

    return _mean(measured, definition, difference, higher_is_better=False)


def _strict(item: Item) -> float | None:
    return text.quasi_exact_match(item.written, item.references)


def _lenient(item: Item) -> float | None:
    return text.contains_answer(item.written, item.references)


def _rouge(item: Item, part: str) -> float | None:
    found = [text.rouge_l(item.written, one, stemmer=True) for one in item.references]
    return max((getattr(one, part) for one in found if one is not None), default=None)


def _math_strict(item: Item) -> float | None:
    return maths.math_strict(item.written, item.row.completion or "")


def _math_lenient(item: Item) -> float | None:
    return maths.math_lenient(item.written, item.row.completion or "")


MEASURES = {
    "quasi_exact_match": Measure(quasi_exact_match, ASKS, COMPLETION),
    "contains_answer": Measure(contains_answer, ASKS, COMPLETION),
    "format_drift_text": Measure(format_drift_text, ASKS, COMPLETION, higher_is_better=False),
    "named_choice": Measure(named_choice, ASKS, COMPLETION, needs=("choices",)),
    "f1": Measure(f1, ASKS, COMPLETION),
    "rouge_l": Measure(rouge_l, ASKS, COMPLETION),
    "rouge_l_recall": Measure(rouge_l_recall, ASKS, COMPLETION),
    "math_strict": Measure(math_strict, ASKS, COMPLETION),
    "math_lenient": Measure(math_lenient, ASKS, COMPLETION),
    "format_drift_math": Measure(format_drift_math, ASKS, COMPLETION, higher_is_better=False),
}
