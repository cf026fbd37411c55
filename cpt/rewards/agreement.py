"""Whether a text says what a reference answer says: what rewritten answers are kept by."""

from collections.abc import Sequence
from typing import Literal

from cpt.rewards.numbers import math, numeric
from eval_harness.metrics.text import contains_answer, find

Agreement = Literal["none", "contains", "exact_match", "numeric", "math"]
BY_VALUE = {"numeric": numeric, "math": math}
MARK = "####"  # GSM8K puts its final answers behind it


def agrees(how: Agreement, text: str, references: Sequence[str], pattern: str | None = None) -> bool:
    """Whether the text agrees with one of the references.

    contains: the reference's final answer stands in the text as whole words, normalised as SQuAD does.
    exact_match: the final answers of both are the same string. numeric, math: as the rewards of these names. none:
    always. A final answer is the first group of `pattern`, else what stands behind the last "####", else all of it.
    """
    return how == "none" or any(_agrees(how, text, reference, pattern) for reference in references)


def unsuitable(how: Agreement, reference: str, pattern: str | None = None) -> str | None:
    """Why nothing could agree with this reference, None where something can. Costs nothing of note but for math."""
    try:
        if how in BY_VALUE:
            BY_VALUE[how]([""], [reference])
        elif how != "none" and not (final := _final(reference, pattern)):
            return (
                f"the pattern finds no answer in {reference[:60]!r}" if final is None else "its final answer is empty"
            )
        elif how == "contains" and contains_answer("", [str(final)]) is None:
            return f"the answer {final!r} has no letter and no digit to look for"
    except (TimeoutError, ValueError) as error:
        return str(error)
    return None


def _agrees(how: Agreement, text: str, reference: str, pattern: str | None) -> bool:
    try:
        if how in BY_VALUE:
            return BY_VALUE[how]([text], [reference]) == [1.0]
        final = _final(reference, pattern)
        if how == "contains":
            return bool(final) and contains_answer(text, [str(final)]) == 1.0
        return final is not None and _final(text, pattern) == final
    except (TimeoutError, ValueError):  # it cannot be told: that is no agreement
        return False


def _final(text: str, pattern: str | None) -> str | None:
    if pattern is None:
        return text.rpartition(MARK)[2].strip()
    found = find(pattern, text)
    return None if found is None else (found[1] or "").strip()
