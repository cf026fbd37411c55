"""The nearest known name for a misspelt one, said the same way everywhere."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[str], most: int = 1) -> str:
    """` Did you mean 'replay'?` with a leading space, or nothing when no name is near."""
    close = difflib.get_close_matches(str(name), list(known), n=most)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
