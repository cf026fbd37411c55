"""Test rows that also occur in training rows, by normalised text: a score on them is memory, not skill."""

from collections.abc import Iterable, Mapping, Sequence

from eval_harness.rows import Row, content_key


def overlap(tests: Mapping[str, Sequence[Row]], train: Iterable[Row]) -> dict[str, int]:
    """Test set -> how many of its rows have a twin (same normalised prompt and answer, or text) in training.

    Sets without one are left out. Every training row is hashed once, however many sets there are.
    """
    seen = {content_key(row) for row in train}
    counts = {name: sum(content_key(row) in seen for row in rows) for name, rows in tests.items()}
    return {name: n for name, n in counts.items() if n}
