"""Rewards that look at a completion's text: `exact_match` and `format`. Pure functions in TRL's signature.

Patterns are searched in bounded time: one with nested quantifiers takes exponential time on some completions, and a
policy will find them.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator

from eval_harness.metrics.text import find

Message = dict[str, Any]
Completion = str | list[Message]


def _compiles(pattern: str) -> str:
    import regex

    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"is no regular expression: {error}") from error
    return pattern


def _has_a_group(pattern: str) -> str:
    import regex

    if not regex.compile(_compiles(pattern)).groups:
        raise ValueError("needs a group: its first one is the answer, as in '#### (.*)'")
    return pattern


Pattern = Annotated[str, AfterValidator(_has_a_group)]


def text_of(completion: Completion) -> str:
    """The string itself, or the text of a conversation's last message; "" where it has none (a call of a tool)."""
    if isinstance(completion, str):
        return completion
    content = (completion[-1].get("content") if completion else None) or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def exact_match(
    completions: Sequence[Completion],
    answer: Sequence[Any],
    *,
    ignore_case: bool = False,
    pattern: Pattern | None = None,
    **columns: Any,
) -> list[float | None]:
    """1.0 where a completion is its reference answer, else 0.0; white space around both is ignored.

    `pattern` finds the answer inside the completion: the first group of the first place where it matches, as
    '#### (.*)' in GSM8K's style; no match is 0.0. The reference is compared as it is. A row whose answer is None
    is not scored (None). Raises TimeoutError where the pattern is not decided within about a second.
    """
    given = (_answer_in(text_of(completion), pattern) for completion in completions)
    return [
        None if reference is None else float(found is not None and _same(found, str(reference), ignore_case))
        for found, reference in zip(given, answer, strict=True)
    ]


def format(
    completions: Sequence[Completion],
    *,
    pattern: Annotated[str, AfterValidator(_compiles)],
    **columns: Any,
) -> list[float]:
    """1.0 where the whole completion, white space included, matches `pattern`, else 0.0.

    A dot does not match a new line unless the pattern starts with (?s). Raises TimeoutError where the pattern
    is not decided within about a second.
    """
    return [float(find(pattern, text_of(completion), whole=True) is not None) for completion in completions]


def _answer_in(text: str, pattern: str | None) -> str | None:
    if pattern is None:
        return text
    found = find(pattern, text)
    return None if found is None else found[1]


def _same(given: str, reference: str, ignore_case: bool) -> bool:
    if ignore_case:
        given, reference = given.casefold(), reference.casefold()
    return given.strip() == reference.strip()
