r"""Mathematical results: strictly, in the form that was asked for; leniently, wherever and however they are written.

A result is announced as `\boxed{...}`, after "####" (GSM8K), or by "the answer is" (chain-of-thought prompts), in this
order of precedence; of several of one form the last counts. A reference is a bare result or a solution that announces
it. The difference of both scores is format drift: solved, and no longer said as asked.

math_strict compares notation, math_lenient values: by math-verify in a process of its own (`verifier`), with the last
number where that finds nothing.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from functools import lru_cache

from eval_harness.metrics import verifier

RESULT_CHARACTERS = 1_000  # a longer announcement is none
TAIL_CHARACTERS = 2_000  # of a text that announces nothing, its end is looked at

# ---- numbers ----------------------------------------------------------------------------------------

# Linear on any text: what repeats is possessive, and a group of thousands decides by itself whether it is one.
# A sign after a digit, a letter or a closing bracket is an operator or a hyphen: 10-3 holds 10 and 3.
NUMBER = re.compile(
    r"(?:(?<![0-9A-Za-z.)\]])[-+−])?[$€£]?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3}(?![0-9]))++|[0-9]++)(?:\.[0-9]++)?|\.[0-9]++)"
    r"(?:[eE][-+]?[0-9]++)?"
)
# Rounds differences, never operands; an exponent beyond the limits becomes NaN or infinity instead of an error.
EXACT = Context(prec=50, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])
NEAR = Decimal("1e-6")  # of the last number, where it decides


def numbers(text: str) -> Iterator[str]:
    """The numbers of a text as they are written, in order: 1,234.5, -7, .5, 2e-3, $12. Words are none."""
    return (found[0] for found in NUMBER.finditer(text))


def decimal(written: str) -> Decimal | None:
    """The value of one of `numbers`, to its last digit; None where its exponent is beyond 10**18."""
    number = Decimal(re.sub("[,$€£]", "", written).replace("−", "-"), EXACT)
    return number if number.is_finite() else None


def difference(one: Decimal, other: Decimal) -> Decimal:
    """|one - other|, rounded to 50 digits."""
    return EXACT.subtract(one, other).copy_abs()


def _only_number(text: str) -> Decimal | None:
    """The value where the whole text is one number."""
    return decimal(text) if NUMBER.fullmatch(text) else None


def _last_number(text: str) -> Decimal | None:
    last = _last(NUMBER, text)
    return None if last is None else decimal(last[0])


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


# ---- what is announced ------------------------------------------------------------------------------

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is no bracket
_ANSWER_IS = re.compile(r"(?i)\banswer\s+is\b[ \t]*:?[ \t]*")
_END_OF_SENTENCE = re.compile(r"\.?\s*(?:\n|\Z)|[.!?]\s+(?=[A-Z])")


def announced(text: str) -> str | None:
    r"""The result that a text announces, without the announcement; None where it announces none.

    `\boxed{...}` (or \fbox) with its braces in balance, else what follows the last "####" on its line, else what
    follows the last "answer is" in its sentence. Longer than RESULT_CHARACTERS is no result.
    """
    found = next((one for one in (_boxed(text), _marked(text), _said(text)) if one), None)
    return found if found is not None and len(found) <= RESULT_CHARACTERS else None


def _boxed(text: str) -> str | None:
    opening = _last(_BOX, text)
    if opening is None:
        return None
    depth = 1
    for brace in _BRACES.finditer(text, opening.end()):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[opening.end() : brace.start()].strip()
    return None


def _marked(text: str) -> str | None:
    _, marker, after = text.rpartition("####")
    return after.lstrip(" \t").partition("\n")[0].strip() if marker else None


def _said(text: str) -> str | None:
    opening = _last(_ANSWER_IS, text)
    if opening is None:
        return None
    rest = text[opening.end() : opening.end() + 2 * RESULT_CHARACTERS]
    end = _END_OF_SENTENCE.search(rest)
    return (rest[: end.start()] if end else rest).strip().strip("*")  # bold


def _reference(reference: str) -> str | None:
    """The result of a reference, which announces it or is it; None where there is none."""
    if "####" in reference or _BOX.search(reference):
        return announced(reference)
    return announced(reference) or reference.strip()[:RESULT_CHARACTERS] or None


# ---- strict -----------------------------------------------------------------------------------------


def math_strict(prediction: str, reference: str) -> float | None:
    r"""1.0 where the prediction announces the reference's result in the reference's notation, else 0.0.

    Notation is compared without what typesetting alone asks for: $ signs, spaces, \left and \right, \dfrac for
    \frac, \frac12, \text, degrees, a final full stop. Plain numbers are compared as such: 5.0 is 5, 1,234 is 1234,
    and 0.5 is not \frac{1}{2}. None where the reference is blank or what it announces is.
    """
    expected, given = _reference(reference), announced(prediction)
    if expected is None:
        return None
    return float(given is not None and _same_notation(given, expected))


def _same_notation(given: str, expected: str) -> bool:
    given, expected = _notation(given), _notation(expected)
    if given == expected:
        return True
    one, other = _only_number(given), _only_number(expected)
    return one is not None and one == other


_TYPESETTING = (
    (r"(\\\\)|\\(?:left|right|big|Big|displaystyle)(?![A-Za-z])|\\[,;:!$ ]|[\s$~]|\{,\}", r"\1"),  # a new row stays
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\frac([0-9])([0-9])", r"\\frac{\1}{\2}"),
    (r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\{([^{}]*)\}", r"\1"),
    (r"\^(?:\\circ|\{\\circ\})|°", ""),
    (r"\\%", "%"),
    (r"−", "-"),
    (r"\.\Z", ""),
)


def _notation(text: str) -> str:
    for pattern, replacement in _TYPESETTING:
        text = re.sub(pattern, replacement, text)
    return text


# ---- lenient ----------------------------------------------------------------------------------------


def math_lenient(prediction: str, reference: str) -> float | None:
    r"""1.0 where the prediction's result equals the reference's in value, else 0.0; never below `math_strict`.

    The prediction's result is what it announces, else what all of it says where it is a formula alone, else what
    math-verify finds in its last TAIL_CHARACTERS, or the last number there. Floats are compared to six places, so
    that 0.333333 is 1/3; units and dollars are ignored, 50\% is 1/2 and 50.

    None where the reference holds nothing that can be read. An item that is not decided within `verifier.CPU_SECONDS`
    is 0.0, or None where its reference alone takes that long, and is logged as a warning. Raises ImportError without
    math-verify, and no error for any text.
    """
    expected = _reference(reference)
    if expected is None:
        return None
    alone = prediction.strip()
    if math_strict(prediction, reference) or (len(alone) <= RESULT_CHARACTERS and _same_notation(alone, expected)):
        return 1.0
    return _decided(expected, *_candidates(prediction))


@lru_cache(maxsize=4096)  # a set's lenient and drift measures ask alike
def _decided(expected: str, *candidates: str) -> float | None:
    verdict = verifier.shared().ask(_boxed_again(expected), *candidates)
    if verdict in (verifier.UNREADABLE, verifier.NOTHING_FOUND):
        reference = _last_number(expected)
        given = next((number for one in candidates if (number := _last_number(one)) is not None), None)
        if reference is None:
            return None if verdict == verifier.UNREADABLE else 0.0
        return float(given is not None and difference(given, reference) <= NEAR)
    return None if verdict is None else float(verdict == verifier.EQUAL)


_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"[^\W\d_]{2}")


def _candidates(prediction: str) -> list[str]:
    """Texts that may hold the result, the surest first: the first of which something can be read decides."""
    marked = _boxed(prediction) or _marked(prediction)
    result, tail = marked or _said(prediction) or prediction.strip(), prediction[-TAIL_CHARACTERS:]
    if not result or len(result) > RESULT_CHARACTERS:
        return [tail]
    is_sentence = not marked and ("\n" in result or _WORD.search(_COMMAND.sub("", result)))
    return [result if is_sentence else _boxed_again(result), tail]


def _boxed_again(result: str) -> str:
    r"""A result as math-verify reads it surely; words in \text, or they would be products of their letters."""
    result = result.strip().rstrip(".").strip("$") or result
    words = re.fullmatch(r"[^\W\d_]{3,}(?:\s[^\W\d_]+)*", result)
    return rf"\boxed{{\text{{{result}}}}}" if words else rf"\boxed{{{result}}}"
