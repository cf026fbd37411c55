"""The reward `numeric`: the number in a completion against the answer's. A pure function in TRL's signature."""

import re
from collections import deque
from collections.abc import Iterator, Sequence
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import Field

from cpt.rewards.text import Completion, text_of

Position = Literal["last", "first", "only"]

# Linear on any text: what repeats is possessive, and a group of thousands decides by itself whether it is one.
# A sign after a digit, a letter or a closing bracket is an operator or a hyphen: 10-3 holds 10 and 3.
NUMBER = re.compile(
    r"(?:(?<![0-9A-Za-z.)\]])[-+−])?[$€£]?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3}(?![0-9]))++|[0-9]++)(?:\.[0-9]++)?|\.[0-9]++)"
    r"(?:[eE][-+]?[0-9]++)?"
)
# Rounds differences, never operands; an exponent beyond the limits becomes NaN or infinity instead of an error.
EXACT = Context(prec=50, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])


def numeric(
    completions: Sequence[Completion],
    answer: Sequence[Any],
    *,
    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-6,
    position: Position = "last",
    **columns: Any,
) -> list[float | None]:
    """1.0 where the completion's number is within `tolerance` (absolute) of the answer's, else 0.0.

    Numbers are compared as decimals, so 2**53 and 2**53 + 1 differ. `position` says which number of the completion
    counts: the last, the first, or the only one (more than one is then 0.0). Commas group thousands, units and
    currency signs are ignored, words ("seven", "nan", "inf") and fractions are no numbers.

    The answer must hold one number, or one after its last "####", as GSM8K marks its final answers: else ValueError.
    A row whose answer is None is not scored (None).
    """
    near = Decimal(repr(float(tolerance)))
    return [
        None if reference is None else float(_close(_pick(text_of(completion), position), _reference(reference), near))
        for completion, reference in zip(completions, answer, strict=True)
    ]


def _reference(answer: Any) -> Decimal:
    number = _pick(str(answer).rpartition("####")[2], "only")
    if number is None:
        raise ValueError(f"the answer {str(answer)[:60]!r} is not one number: give a number, or use exact_match")
    return number


def _pick(text: str, position: Position) -> Decimal | None:
    found: Iterator[re.Match[str]] = NUMBER.finditer(text)
    if position == "last":
        chosen = list(deque(found, maxlen=1))
    elif position == "first":
        chosen = list(islice(found, 1))
    elif position == "only":
        chosen = list(islice(found, 2))
    else:
        raise ValueError(f"position = {position!r}: must be last, first or only")
    return _decimal(chosen[0][0]) if len(chosen) == 1 else None


def _decimal(text: str) -> Decimal | None:
    """The number as it is written, to its last digit; None where its exponent is beyond 10**18."""
    number = Decimal(re.sub("[,$€£]", "", text).replace("−", "-"), EXACT)
    return number if number.is_finite() else None


def _close(given: Decimal | None, reference: Decimal, near: Decimal) -> bool:
    return given is not None and EXACT.subtract(given, reference).copy_abs() <= near
