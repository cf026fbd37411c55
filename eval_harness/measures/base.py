"""What a measure is, and the two shapes that most of them have."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from eval_harness import results
from eval_harness.items import Ask, EvalSet, Item, Measured
from eval_harness.results import Result

ANSWERED = frozenset({"completion", "chat"})
COMPLETION = frozenset({"completion"})
TEXT = frozenset({"text"})


@dataclass(frozen=True, slots=True)
class Measure:
    """A registered measure.

    function           items with their records to a Result
    asks               what a model must be asked about each row
    kinds              of rows that it applies to
    needs              fields of a row without which it does not apply: choices, paraphrase, perturbed
    higher_is_better   direction
    statistics         whether it needs means and variances of the distributions
    """

    function: Callable[[Measured], Result]
    asks: tuple[Ask, ...]
    kinds: frozenset[str]
    needs: tuple[str, ...] = ()
    higher_is_better: bool = True
    statistics: bool = False

    def asked_of(self, one: EvalSet) -> tuple[Ask, ...]:
        """Of text rows the text; exact match is decoded where the set says so: then the model is asked to write.
        Nothing is asked about further right answers where no row has any."""
        if self.asks == ("answer",) and one.rows[0].kind == "text":
            return ("text",)
        if self.function.__name__ == "exact_match" and one.exact_match == "generate":
            return ("generation",)
        if not any(row.references for row in one.rows):
            return tuple(ask for ask in self.asks if ask != "references")
        return self.asks


def best_of(measured: Measured) -> str:
    """What a definition says where the best of several right answers counts."""
    return ",best_reference" if measured.has_references else ""


def window(measured: Measured) -> int:
    """Tokens of the windows that a set's texts were read in: the model's context."""
    return measured.items[0].records["text"].window if measured.items else 0


def mean_of(
    measured: Measured,
    asks: tuple[Ask, ...],
    value: Callable[[Item], float | str],
    definition: str,
    *,
    higher_is_better: bool = True,
    note: str | None = None,
) -> Result:
    """The mean over items; a value that is a string is the reason why an item has none, and is counted."""
    items, excluded = measured.kept(*asks)
    pairs = []
    for item in items:
        found = value(item)
        if isinstance(found, str):
            excluded[found] += 1
        else:
            pairs.append((item.row.id, found))
    return results.from_items(
        pairs, definition=definition, higher_is_better=higher_is_better, excluded=excluded, note=note
    )


def ratio(
    triples: Iterable[tuple[str, float, float]], definition: str, excluded: Mapping[str, int], note: str | None
) -> Result:
    """Sum of numerators over sum of denominators, lower being better; per item their own ratio.

    The standard error is that of a ratio of sums: sqrt(n / (n - 1) * sum (a_i - r b_i)^2) / sum b.
    """
    triples = list(triples)
    per_item = results.unique_ids((name, above / below) for name, above, below in triples)
    weights = results.unique_ids((name, below) for name, _, below in triples)
    kept = {reason: count for reason, count in excluded.items() if count}
    if not triples:
        return Result(None, 0, None, definition, False, {}, kept, results.no_item(kept))
    total = math.fsum(below for _, _, below in triples)
    value = math.fsum(above for _, above, _ in triples) / total
    n = len(triples)
    spread = math.fsum((above - value * below) ** 2 for _, above, below in triples)
    stderr = math.sqrt(n / (n - 1) * spread) / total if n > 1 else None
    return Result(value, n, stderr, definition, False, per_item, kept, note, weights)
