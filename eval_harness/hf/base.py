"""What the modules of this folder have in common: an `evaluate.Metric` that is a function of eval_harness.metrics.

A result is a dict: the value under the metric's name, None where it is undefined, and what belongs to it (formula,
number of terms or items, reason).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, ClassVar

import evaluate
from datasets import Features, List, Value

NUMBER, TEXT, FLAG = Value("float64"), Value("string"), Value("bool")
NUMBERS, TEXTS, FLAGS = List(NUMBER), List(TEXT), List(FLAG)


class Metric(evaluate.Metric):
    """An `evaluate.Metric` described by docstrings: the class's, and its function's.

    inputs    input -> feature of one row; several such where the first row decides
    function  the pure function that it is
    """

    inputs: ClassVar[Any]
    function: ClassVar[Callable[..., Any]]

    def _info(self) -> evaluate.MetricInfo:
        options = self.inputs if isinstance(self.inputs, list) else [self.inputs]
        features = [Features(option) for option in options]
        return evaluate.MetricInfo(
            description=inspect.getdoc(type(self)) or "",
            citation="the sources are named in " + self.function.__module__,
            inputs_description=inspect.getdoc(self.function) or "",
            features=features if len(features) > 1 else features[0],
        )


class MatrixMetric(Metric):
    """`predictions` are the rows of the score matrix R, the base first: T + 1 rows of T scores, None where unknown.

    Further arguments of the function are given to `compute` by name.
    """

    inputs: ClassVar = {"predictions": NUMBERS}

    def _compute(self, *, predictions: list[list[float | None]], **arguments: Any) -> dict[str, Any]:
        return as_result(self.name, self.function(predictions, **arguments))


class TextMetric(Metric):
    """`predictions` are texts, `references` a text or a list of alternative texts of each; the result is the mean."""

    inputs: ClassVar = [{"predictions": TEXT, "references": TEXTS}, {"predictions": TEXT, "references": TEXT}]

    def _compute(self, *, predictions: list[str], references: list[str] | list[list[str]]) -> dict[str, Any]:
        alternatives = [[one] if isinstance(one, str) else one for one in references]
        return mean(self.name, map(self.function, predictions, alternatives))


class HitsMetric(Metric):
    """`hits` are lists, one per answer: whether each of its tokens is the arg max. The result is the mean.

    `end_tokens`, how many at the end of each are no text, is given to `compute` by name.
    """

    inputs: ClassVar = {"hits": FLAGS}

    def _compute(self, *, hits: list[list[bool]], end_tokens: int = 0) -> dict[str, Any]:
        return mean(self.name, (self.function(one, end_tokens=end_tokens) for one in hits))


def as_result(name: str, summary: Any, value: str = "value") -> dict[str, Any]:
    """A dataclass as `evaluate` returns results, its field `value` under the metric's name."""
    fields = asdict(summary)
    return {name: fields.pop(value), **fields}


def mean(name: str, scores: Iterable[float | None]) -> dict[str, Any]:
    """The mean over the items that have a score; those that have none are counted."""
    listed = list(scores)
    known = [score for score in listed if score is not None]
    return {
        name: math.fsum(known) / len(known) if known else None,
        "n": len(known),
        "left_out": len(listed) - len(known),
        "reason": None if known else "no item has a score",
    }
