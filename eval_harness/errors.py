"""What ends a measurement, here so that it can be caught where torch is not imported."""


class Interrupted(Exception):
    """A measurement was asked to stop between two batches; nothing of it was recorded."""


class ScoringError(RuntimeError):
    """A model whose scores mean nothing (NaN logits), or a prompt that it cannot take."""
