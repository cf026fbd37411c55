"""The nearest known name for a misspelt one, said the same way in every error of this package."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[str], most: int = 1) -> str:
    """`did you mean 'acc'? ` with a space at its end, or nothing where no name is near."""
    near = difflib.get_close_matches(str(name), list(known), n=most)
    return f"did you mean {' or '.join(map(repr, near))}? " if near else ""
