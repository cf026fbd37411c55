"""The rewards `numeric` and `math`: a completion's result against the answer's. Pure functions in TRL's signature."""

from collections import deque
from collections.abc import Sequence
from decimal import Decimal
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import Field

from cpt.rewards.text import Completion, text_of
from eval_harness.metrics.maths import decimal, difference, math_lenient, numbers

Position = Literal["last", "first", "only"]


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


def math(completions: Sequence[Completion], answer: Sequence[Any], **columns: Any) -> list[float | None]:
    r"""1.0 where the completion's result equals the answer's in value, else 0.0, by math-verify: \frac{1}{2} is 0.5.

    The result is what is announced (\boxed{...}, after "####", "the answer is"), else the formula that the completion
    is, else what its end holds; see `eval_harness.metrics.maths.math_lenient`. An answer may be a whole solution.

    Raises ValueError where nothing can be read in an answer. A row whose answer is None is not scored (None). Costs
    milliseconds a completion, and up to 3 seconds of CPU for one that is made to take long, which scores 0.0.
    """
    return [
        None if reference is None else _verified(text_of(completion), str(reference))
        for completion, reference in zip(completions, answer, strict=True)
    ]


def _verified(completion: str, answer: str) -> float:
    score = math_lenient(completion, answer)
    if score is None:
        raise ValueError(f"the answer {answer[:60]!r} holds no mathematics: give a result, or use exact_match")
    return score


def _reference(answer: Any) -> Decimal:
    number = _pick(str(answer).rpartition("####")[2], "only")
    if number is None:
        raise ValueError(f"the answer {str(answer)[:60]!r} is not one number: give a number, or use exact_match")
    return number


def _pick(text: str, position: Position) -> Decimal | None:
    found = numbers(text)
    if position == "last":
        chosen = list(deque(found, maxlen=1))
    elif position == "first":
        chosen = list(islice(found, 1))
    elif position == "only":
        chosen = list(islice(found, 2))
    else:
        raise ValueError(f"position = {position!r}: must be last, first or only")
    return decimal(chosen[0]) if len(chosen) == 1 else None


def _close(given: Decimal | None, reference: Decimal, near: Decimal) -> bool:
    return given is not None and difference(given, reference) <= near
