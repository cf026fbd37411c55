"""Two measurements side by side, item by item: python -m eval_harness compare A.json B.json

A set and measure of both documents are compared over the items that both have: B - A with a bootstrap interval
(`eval_harness.metrics.statistics`). Refused, each with what differs: unequal definitions, unlike settings that the
measure depends on, other n where there are no items to pair (a p-value such as forget_quality depends on n).

Exit codes: 0 compared; 2 something asked for was refused or nothing is common (the rest is still printed), or bad
input. `--set` and `--measure` narrow what is asked for.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from eval_harness.measures import MEASURES
from eval_harness.results import Result, ResultError, aggregate, aggregation, from_document

P_VALUES = ("forget_quality",)  # by how their definitions begin: shown side by side, never subtracted
ROUNDING = 1e-5  # relative
WIDTH = 80
NAME = 23  # columns of a measure's name in the table; a longer one gets a line of its own


class CompareError(ValueError):
    """A document that cannot be read, or a set or measure that neither document has."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One set and measure of both documents.

    a, b              the values, over the n items that both have
    difference        b - a; None for a p-value
    low, high         its interval of `level`; None where `reason` says why
    p_value           exact McNemar test where items are 0 or 1
    only_a, only_b    items that only one side has
    left_out          items that are not a number on one side
    """

    set: str
    measure: str
    definition: str
    higher_is_better: bool
    n: int
    a: float | None
    b: float | None
    difference: float | None = None
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    only_a: int = 0
    only_b: int = 0
    left_out: tuple[str, ...] = ()
    reason: str | None = None

    def _is_rounding(self) -> bool:
        """Within 1e-5 of the values' size: what other batches or processes make of the same model."""
        if self.n < 2 or self.difference is None or self.a is None or self.b is None:
            return False
        ends = [abs(one) for one in (self.difference, self.low, self.high) if one is not None]
        return max(ends) <= ROUNDING * max(abs(self.a), abs(self.b))

    @property
    def verdict(self) -> str:
        """Whether B is better, worse or equal; "unclear" where the interval holds 0; "-" without an interval."""
        if self._is_rounding():
            return "equal"
        if self.low is None or self.high is None:
            return "equal" if self.difference == 0 and self.n > 1 and self.reason else "-"
        if self.low <= 0 <= self.high:
            return "unclear"
        return "better" if (self.low > 0) is self.higher_is_better else "worse"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Two results that do not compare: what differs, as it is in A and in B."""

    set: str
    measure: str
    what: str
    a: str
    b: str

    def __str__(self) -> str:
        return f"{self.set} {self.measure}: unequal {self.what}\n  A: {self.a}\n  B: {self.b}"


@dataclass(slots=True)
class Comparison:
    """All pairs, what was refused, what only one side has ("set measure"), and what a reader should know.

    a, b   what each side is, in words
    """

    level: float
    a: str
    b: str
    pairs: list[Pair] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As strict JSON can hold it, with every pair's verdict."""
        pairs = [{**asdict(pair), "verdict": pair.verdict} for pair in self.pairs]
        return {**asdict(self), "pairs": pairs}


def compare(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    *,
    sets: Sequence[str] = (),
    measures: Sequence[str] = (),
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compare two results documents (`results.to_document`).

    Args:
        a, b: documents; the difference is b - a.
        sets, measures: what is asked for; empty is everything.
        level, resamples, seed: of the intervals.

    Raises:
        ResultError: a document of another schema.
        CompareError: a set or measure that neither document has.
    """
    first, second = from_document(a), from_document(b)
    asked = list(dict.fromkeys([*_keys(first), *_keys(second)]))
    _check_asked(asked, sets, measures)
    out = Comparison(level, _described(a), _described(b))
    for name, measure in asked:
        if (sets and name not in sets) or (measures and measure not in measures):
            continue
        one, other = first.get(name, {}).get(measure), second.get(name, {}).get(measure)
        if one is None or other is None:
            (out.only_b if one is None else out.only_a).append(f"{name} {measure}")
            continue
        refusal = _refusal(name, measure, one, other, _settings(a, name), _settings(b, name))
        if refusal:
            out.refused.append(refusal)
        else:
            out.pairs.append(_pair(name, measure, one, other, level=level, resamples=resamples, seed=seed))
    out.notes = list(_notes(a, b))
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m eval_harness compare A B`; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        documents = [read(path) for path in (options.a, options.b)]
        found = compare(*documents, sets=options.set, measures=options.measure, level=options.level)
        found.a, found.b = f"{options.a}: {found.a}", f"{options.b}: {found.b}"
    except (CompareError, ResultError) as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    print(json.dumps(found.to_json(), indent=1) if options.json else table(found))
    for refusal in found.refused:
        print(f"error: {refusal}", file=sys.stderr)
    if not found.pairs and not found.refused:
        print("error: no set and measure that both documents have", file=sys.stderr)
    return 0 if found.pairs and not found.refused else 2


def read(path: str | Path) -> dict[str, Any]:
    """A results document: a file, or results.json of a folder. Raises CompareError."""
    file = Path(path)
    file = file / "results.json" if file.is_dir() else file
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CompareError(f"{file}: no such file; `python -m eval_harness --out DIR` writes results.json") from None
    except (OSError, ValueError) as error:
        raise CompareError(f"{file}: cannot be read as JSON ({error}); measure again") from error
    if not isinstance(document, dict) or "results" not in document:
        raise CompareError(f"{file}: is no results document; give a results.json of `python -m eval_harness --out DIR`")
    return document


def table(found: Comparison) -> str:
    """At most 80 columns: what A and B are; by set its measures with A, B, B - A, interval and verdict; what is only on
    one side."""
    lines = [line for side in (f"A  {found.a}", f"B  {found.b}") for line in _wrapped(side)]
    lines += ["", f"{'set':<{NAME}} {'A':>8} {'B':>8} {'B - A':>8}  [{found.level:.3g} interval]"]
    for name, group in groupby(found.pairs, key=lambda pair: pair.set):
        pairs = list(group)
        alike = len({pair.n for pair in pairs}) == 1
        lines += _wrapped(f"{name} (n = {pairs[0].n})" if alike else name)
        for pair in pairs:
            lines += _lines(pair, says_n=not alike)
    for side, names in (("A", found.only_a), ("B", found.only_b)):
        lines += _wrapped(f"only in {side}: {', '.join(names)}") if names else []
    return "\n".join([*lines, *(line for note in found.notes for line in _wrapped(note))])


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="   ", break_on_hyphens=False)


def _lines(pair: Pair, says_n: bool) -> Iterator[str]:
    name = f"  {pair.measure}"
    if len(name) > NAME:
        yield name
        name = ""
    interval = "" if pair.low is None or pair.high is None else f"[{_number(pair.low)}, {_number(pair.high)}]"
    change = "-" if pair.difference is None else _number(pair.difference, sign=True)
    figures = f"{_number(pair.a):>8} {_number(pair.b):>8} {change:>8}  {interval:<18} {pair.verdict}"
    yield f"{name:<{NAME}} {figures}".rstrip()
    said = [f"n = {pair.n}"] if says_n else []
    said += [f"{count} items only in {side}" for side, count in (("A", pair.only_a), ("B", pair.only_b)) if count]
    said += [f"{len(pair.left_out)} not a number: {_some(pair.left_out)}"] if pair.left_out else []
    said += [pair.reason] if pair.reason and pair.verdict != "equal" else []
    yield from textwrap.wrap("; ".join(said), WIDTH, initial_indent="    ", subsequent_indent="    ")


def _pair(name: str, measure: str, a: Result, b: Result, **how: Any) -> Pair:
    of: dict[str, Any] = {"definition": a.definition, "higher_is_better": a.higher_is_better}
    kind = aggregation(a)
    if a.definition.startswith(P_VALUES):
        why = "a p-value: equal n, but no difference is taken"
        return Pair(name, measure, n=a.n, a=a.value, b=b.value, reason=why, **of)
    if kind is None or aggregation(b) != kind:
        change = None if a.value is None or b.value is None else b.value - a.value
        why = "undefined on one side" if change is None else "does not follow from its items: no interval"
        return Pair(name, measure, n=min(a.n, b.n), a=a.value, b=b.value, difference=change, reason=why, **of)
    import numpy

    from eval_harness.metrics.statistics import paired_difference

    found = paired_difference(
        a.per_item,
        b.per_item,
        weights_a=a.weights or None,
        weights_b=b.weights or None,
        transform=numpy.exp if kind == "exp_of_mean" else None,
        **how,
    )
    common = [item for item in a.per_item if item in b.per_item and item not in found.left_out]
    return Pair(
        name,
        measure,
        n=found.n,
        a=aggregate(a, kind, common) if common else None,
        b=aggregate(b, kind, common) if common else None,
        difference=found.value,
        stderr=found.stderr,
        low=found.low,
        high=found.high,
        p_value=found.p_value,
        only_a=found.only_a,
        only_b=found.only_b,
        left_out=found.left_out,
        reason=found.reason,
        **of,
    )


def _refusal(
    name: str, measure: str, a: Result, b: Result, settings_a: dict[str, Any], settings_b: dict[str, Any]
) -> Refusal | None:
    if a.definition != b.definition:
        return Refusal(name, measure, "definitions", a.definition, b.definition)
    used = [key for key in {**settings_a, **settings_b} if _depends(measure, a.definition, key)]
    unlike = [key for key in used if settings_a.get(key) != settings_b.get(key)]
    if unlike and settings_a and settings_b:
        said = [", ".join(f"{key} = {side.get(key)!r}" for key in unlike) for side in (settings_a, settings_b)]
        return Refusal(name, measure, "settings", *said)
    if a.n != b.n and (aggregation(a) is None or aggregation(b) is None):
        return Refusal(name, measure, "n, and no items to pair", str(a.n), str(b.n))
    return None


def _depends(measure: str, definition: str, key: str) -> bool:
    """Whether a measure depends on a setting of its set. lm-eval's definitions name every setting themselves."""
    if definition.startswith("lm_eval:"):
        return False
    known = MEASURES.get(measure)
    if key != "generation" or known is None:
        return True
    return "generation" in known.asks or "(generate," in definition


def _settings(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a document says of a set's prompts and continuations; ids hold the rows too, which are paired by item."""
    return {key: value for key, value in document.get("settings", {}).get(name, {}).items() if key != "id"}


def _described(document: Mapping[str, Any]) -> str:
    """Model, weights, and how they are held where that is not the default; so many rows of each set."""
    said = [str(document.get("model", "a model without a name"))]
    said += [f"weights {document['weights'][:8]}"] if document.get("weights") else []
    usual = {"dtype": "auto", "quantization": "trained", "limit": None}
    said += [f"{key} {document[key]}" for key, value in usual.items() if document.get(key, value) != value]
    return ", ".join(said)


def _notes(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    if a.get("weights") and a.get("weights") == b.get("weights"):
        yield "A and B are measurements of the same weights"
    first, second = a.get("libraries", {}), b.get("libraries", {})
    unlike = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    if unlike and first and second:
        said = ", ".join(f"{name} {first.get(name, 'none')} and {second.get(name, 'none')}" for name in unlike)
        yield f"measured with other versions: {said}"


def _keys(results: Mapping[str, Mapping[str, Result]]) -> Iterator[tuple[str, str]]:
    return ((name, measure) for name, by in results.items() for measure in by)


def _check_asked(known: Sequence[tuple[str, str]], sets: Sequence[str], measures: Sequence[str]) -> None:
    problems = []
    for what, asked, there in (("set", sets, {n for n, _ in known}), ("measure", measures, {m for _, m in known})):
        listed = ", ".join(sorted(there)) or "none"
        problems += [
            f"--{what} {one}: neither document has it; they have {listed}" for one in asked if one not in there
        ]
    if problems:
        raise CompareError("\n".join(problems))


def _number(value: float | None, sign: bool = False) -> str:
    """At most eight characters: four decimals, or an exponent where they say nothing or are too many."""
    if value is None:
        return "-"
    mark = "+" if sign else ""
    size = abs(value)
    if 0 < size < 5e-4 or size >= 1e5:
        return f"{value:{mark}.1e}"
    form = ".4f" if size < 10 else ".3f" if size < 100 else ".2f" if size < 1000 else ".0f"
    return f"{value:{mark}{form}}"


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _level(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must lie between 0 and 1, e.g. 0.95")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval_harness compare", description="Compare two measurements item by item."
    )
    parser.add_argument("a", metavar="A", help="results.json, or a folder with one")
    parser.add_argument("b", metavar="B", help="the same of another model; differences are B - A")
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    parser.add_argument("--set", action="append", default=[], metavar="NAME", help="only this set; may be repeated")
    parser.add_argument("--measure", action="append", default=[], metavar="NAME", help="only this measure; the same")
    parser.add_argument("--level", type=_level, default=0.95, help="of the intervals; default: 0.95")
    return parser
