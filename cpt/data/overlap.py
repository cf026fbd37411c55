"""Test rows that also occur in training rows, by normalised text: a score on them is memory, not skill."""

from collections.abc import Iterable

from eval_harness.rows import Row, content_key


def overlap(test: Iterable[Row], train: Iterable[Row]) -> int:
    """How many test rows have a twin (same normalised prompt and answer, or text) among the training rows."""
    seen = {content_key(row) for row in train}
    return sum(content_key(row) in seen for row in test)
