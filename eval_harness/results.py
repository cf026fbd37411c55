"""One schema for every measurement: a Result, and documents of results; schema/results.json publishes it."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

SCHEMA_VERSION = 2
SCHEMA_FILE = Path(__file__).parent / "schema" / "results.json"
Kind = Literal["document", "set", "result", "matrix"]
Aggregation = Literal["mean", "ratio_of_sums", "exp_of_mean"]


class ResultError(ValueError):
    """A stored result that is not of this schema."""


@dataclass(slots=True)
class Result:
    """What was measured, on how many items, how exactly, and by which definition.

    value              None where it is undefined; `note` says why
    n                  items that entered the value
    stderr             standard error over items (sample standard deviation / sqrt(n)); None for n < 2
    definition         names the formula, its version and the prompt style; only equal ones compare
    higher_is_better   direction
    per_item           item id -> the item's own value
    excluded           reason -> items that could not be measured
    note               what a reader must know, e.g. the chance level
    weights            item id -> its weight, where the value is sum(weight * item) / sum(weight): a ratio of sums.
                       Empty where all weigh the same
    """

    value: float | None
    n: int
    stderr: float | None
    definition: str
    higher_is_better: bool
    per_item: dict[str, float] = field(default_factory=dict)
    excluded: dict[str, int] = field(default_factory=dict)
    note: str | None = None
    weights: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A dict that strict JSON can hold and `from_json` reads back exactly: what is not finite is null."""
        out = asdict(self)
        if self.value is not None and not math.isfinite(self.value):
            reason = f"the value is {self.value}"
            out["note"] = f"{self.note}; {reason}" if self.note else reason
        out["value"], out["stderr"] = _finite(self.value), _finite(self.stderr)
        out["per_item"] = {name: _finite(value) for name, value in self.per_item.items()}
        if not self.weights:
            del out["weights"]
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Result:
        """Read what `to_json` wrote; an item's null is NaN.

        Raises:
            ResultError: fields are missing or unknown.
        """
        known = {item.name for item in fields(cls)}
        missing, unknown = known - set(data) - {"weights"}, set(data) - known
        if missing or unknown:
            raise ResultError(f"not a result: missing {sorted(missing)}, unknown {sorted(unknown)}")
        per_item = {name: math.nan if value is None else value for name, value in data["per_item"].items()}
        copied = {"per_item": per_item, "excluded": dict(data["excluded"]), "weights": dict(data.get("weights", {}))}
        return cls(**{**data, **copied})


def from_items(
    items: Iterable[tuple[str, float]],
    *,
    definition: str,
    higher_is_better: bool,
    excluded: Mapping[str, int] | None = None,
    note: str | None = None,
) -> Result:
    """The mean over items with its standard error; without items the value is None.

    Args:
        items: (item id, value); an id that comes again gets "-2", "-3".
    """
    per_item = unique_ids(items)
    values = list(per_item.values())
    skipped = {reason: count for reason, count in (excluded or {}).items() if count}
    if not values:
        return Result(None, 0, None, definition, higher_is_better, {}, skipped, no_item(skipped))
    mean = math.fsum(values) / len(values)
    return Result(mean, len(values), _stderr(values, mean), definition, higher_is_better, per_item, skipped, note)


def no_item(excluded: Mapping[str, int]) -> str:
    """The note of a result without items: `no item could be measured: 4 longer_than_context`."""
    why = ", ".join(f"{count} {reason}" for reason, count in excluded.items())
    return f"no item could be measured: {why}" if why else "no item could be measured"


def aggregation(result: Result) -> Aggregation | None:
    """How the value follows from its items, found by computing it again; None where it does not.

    A value of other items, a p-value, or a null among the items gives None: then nothing can be resampled.
    """
    if result.value is None or not result.per_item or len(result.per_item) != result.n:
        return None
    if result.weights:
        if set(result.weights) != set(result.per_item):
            return None
        return "ratio_of_sums" if _agrees(aggregate(result, "ratio_of_sums"), result.value) else None
    candidates: tuple[Aggregation, ...] = ("mean", "exp_of_mean")
    return next((how for how in candidates if _agrees(aggregate(result, how), result.value)), None)


def aggregate(result: Result, how: Aggregation, items: Iterable[str] | None = None) -> float:
    """The value over some of the items; None is all of them. Raises KeyError for an item that is not there."""
    names = list(result.per_item if items is None else items)
    weights = [result.weights[name] if how == "ratio_of_sums" else 1.0 for name in names]
    total = math.fsum(w * result.per_item[name] for w, name in zip(weights, names, strict=True))
    mean = total / math.fsum(weights)
    if how == "exp_of_mean":
        return math.exp(mean) if mean < 700 else math.inf
    return mean


def _agrees(found: float, value: float) -> bool:
    return math.isclose(found, value, rel_tol=1e-6, abs_tol=1e-9)


def unique_ids(items: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Item id -> value, in order; an id that comes again gets "-2", "-3"."""
    out: dict[str, float] = {}
    times: dict[str, int] = {}
    for name, value in items:
        times[name] = times.get(name, 0) + 1
        out[name if times[name] == 1 else f"{name}-{times[name]}"] = float(value)
    return out


def to_document(results: Mapping[str, Mapping[str, Result]], **about: Any) -> dict[str, Any]:
    """Results by set and measure as one JSON document with its schema; `about` says what was measured.

    Of `about`, `settings` (set -> what decided its prompts and continuations) and `libraries` (name -> version) have a
    meaning of their own: sets of unlike settings do not compare, unlike versions are said.
    """
    sets = {name: {measure: r.to_json() for measure, r in by.items()} for name, by in results.items()}
    return {"schema_version": SCHEMA_VERSION, **about, "results": sets}


def from_document(document: Mapping[str, Any]) -> dict[str, dict[str, Result]]:
    """Read what `to_document` made.

    Raises:
        ResultError: another schema version, or none; results of another shape.
    """
    if document.get("schema_version") != SCHEMA_VERSION:
        found = document.get("schema_version")
        raise ResultError(f"schema_version = {found!r}: this version reads {SCHEMA_VERSION}; measure again")
    try:
        sets = document["results"].items()
        return {name: {measure: Result.from_json(one) for measure, one in by.items()} for name, by in sets}
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, ResultError):
            raise
        raise ResultError(f"results: not of the schema ({type(error).__name__}: {error}); measure again") from error


def schema(kind: Kind = "document") -> dict[str, Any]:
    """The JSON Schema (2020-12) of a results document, a run's eval/SET.json, one Result, or a run's matrix.json."""
    whole = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    return {**whole, "$ref": f"#/$defs/{kind}"}


def write_json(path: str | Path, document: Mapping[str, Any]) -> None:
    """Write strict JSON so that `path` holds either the old content or all of the new, never a part."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1, allow_nan=False, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide a result from its readers
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _stderr(values: list[float], mean: float) -> float | None:
    if len(values) < 2:
        return None
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
