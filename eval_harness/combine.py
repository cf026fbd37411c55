"""Quantities over several sets, or against another model's results: what a suite names under `combined`.

    model_utility     sets: {retain, real_authors, world_facts}, truth_ratio: geometric | arithmetic
    forget_quality    set, reference: a results file of a model that never saw the set
    membership_auc    members, nonmembers, score: loss_score | zlib_score | min_k | min_k_plus_plus
    privleak          members, nonmembers, score, reference: a results file, or an area in MUSE's direction

The formulas are those of `eval_harness.metrics`; docs/forgetting_metrics.md explains them. Nothing of a quantity can be
paired item by item, so its definition holds a hash of what it is made of: the definitions and the items of its parts.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from eval_harness.metrics import forgetting, membership
from eval_harness.results import Result, ResultError, from_document
from eval_harness.suggest import did_you_mean

SCORES = ("loss_score", "zlib_score", "min_k", "min_k_plus_plus")
FORMS = ("geometric", "arithmetic")
Results = Mapping[str, Mapping[str, Result]]
Spec = Mapping[str, Any]


class CombineError(ValueError):
    """A combined quantity that cannot be computed: every problem, one a line."""


def check_combined(combined: Mapping[str, Spec], measures: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse quantities whose parts are not measured; reads the reference files, needs no model.

    Args:
        combined: name -> what it is, as a suite says it.
        measures: set -> its measures.

    Raises:
        CombineError: every problem at once.
    """
    problems = [problem for name, spec in combined.items() for problem in _problems(name, spec, measures)]
    if problems:
        raise CombineError("\n".join(problems))


def combine(combined: Mapping[str, Spec], results: Results) -> dict[str, dict[str, Result]]:
    """name -> measure -> Result of every combined quantity, from the sets' results."""
    return {name: {spec["measure"]: QUANTITIES[spec["measure"]][0](spec, results)} for name, spec in combined.items()}


def _model_utility(spec: Spec, results: Results) -> Result:
    form = spec.get("truth_ratio", "geometric")
    parts = {
        one: [results[_utility_set(spec, one)][measure] for measure in _utility_measures(one, form)]
        for one in forgetting.UTILITY_SETS
    }
    scores = {
        one: dict(zip(forgetting.UTILITY_QUANTITIES, (part.value for part in three), strict=True))
        for one, three in parts.items()
    }
    found = forgetting.model_utility(scores, truth_ratio=form)
    made_of = _made_of(part for three in parts.values() for part in three)
    definition = f"model_utility@2({form},harmonic_of_9,{made_of})"
    return Result(found.value, found.n, None, definition, True, note=found.reason)


def _utility_set(spec: Spec, one: str) -> str:
    return spec["sets"].get(one, one)


def _utility_measures(one: str, form: str) -> tuple[str, str, str]:
    likely = "probability" if one == "retain" else "normalised_probability"
    return likely, "rouge_l_recall", f"truth_ratio_{form}_true_better"


def _forget_quality(spec: Spec, results: Results) -> Result:
    own = results[spec["set"]]["truth_ratio_geometric"]
    reference = _alike(spec, spec["set"], own) if "reference" in spec else None
    try:
        found = forgetting.forget_quality(own.per_item, reference.per_item if reference else None)
    except ValueError as error:  # other items, or another number of them
        raise CombineError(f"forget_quality of set {spec['set']!r} against {spec['reference']}: {error}") from error
    against = _identity(spec["reference"]) if reference else "none"
    said = f"ks,{own.definition},n={found.n}/{found.n_ref},{_made_of([own])},reference={against}"
    note = found.reason or f"D = {found.statistic:.6g}, {found.method} p"
    return Result(found.p, found.n, None, f"forget_quality@2({said})", True, note=note)


def _membership_auc(spec: Spec, results: Results) -> Result:
    score = spec.get("score", "min_k")
    members, nonmembers = sides = _sides(spec, results, score)
    area = _area(*sides)
    definition = f"membership_auc@2({score},members_lower,{_made_of(sides)})"
    if area is None:
        return Result(None, 0, None, definition, False, note="a side has no item with a score")
    note = f"{area.level:.0%} interval {_number(area.low)} to {_number(area.high)}; {area.members} members"
    both = len(members.per_item.keys() & nonmembers.per_item.keys())
    note += f"; {both} texts are on both sides" if both else ""
    return Result(area.value, area.members + area.nonmembers, area.stderr, definition, False, note=note)


def _privleak(spec: Spec, results: Results) -> Result:
    score = spec.get("score", "min_k")
    sides = _sides(spec, results, score)
    own, reference = _area(*sides), spec.get("reference")
    if isinstance(reference, str):
        names = (spec["members"], spec["nonmembers"])
        reference = _area(*(_alike(spec, name, side) for name, side in zip(names, sides, strict=True)))
    definition = f"privleak@2({score},muse,{_made_of(sides)},"
    if own is None or reference is None:
        why = "a side has no item with a score" if own is None else "no reference: the area of a model without the set"
        return Result(None, 0, None, f"{definition}reference=none)", False, note=why)
    found = membership.privleak(own, reference)
    definition += f"reference={found.auc_reference:.4g})"
    areas = f"area {found.auc:.4g} (MUSE's direction), the reference's {found.auc_reference:.4g}"
    note = "; ".join(part for part in (areas, found.reason) if part)
    return Result(found.value, own.members + own.nonmembers, None, definition, False, note=note)


Quantity = tuple[Callable[[Spec, Results], Result], tuple[str, ...], tuple[str, ...]]
QUANTITIES: dict[str, Quantity] = {  # function, keys that it needs, keys that it may have
    "model_utility": (_model_utility, ("sets",), ("truth_ratio",)),
    "forget_quality": (_forget_quality, ("set",), ("reference",)),
    "membership_auc": (_membership_auc, ("members", "nonmembers"), ("score",)),
    "privleak": (_privleak, ("members", "nonmembers"), ("score", "reference")),
}


def _sides(spec: Spec, results: Results, score: str) -> tuple[Result, Result]:
    return results[spec["members"]][score], results[spec["nonmembers"]][score]


def _area(members: Result, nonmembers: Result) -> membership.Auc | None:
    sides = (side.per_item.values() for side in (members, nonmembers))
    return membership.auc(*([value for value in side if not math.isnan(value)] for side in sides))


def _made_of(parts: Iterable[Result]) -> str:
    """The parts' definitions and items as `parts=` and 6 hex digits: other rows or prompts make another quantity."""
    return f"parts={_hash([[part.definition, sorted(part.per_item)] for part in parts])}"


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:6]


def _alike(spec: Spec, name: str, own: Result) -> Result:
    """The reference's result of a set, if it is of the same definition."""
    measure = own.definition.partition("@")[0]
    found = _reference(spec["reference"], name, measure)
    if found.definition != own.definition:
        raise CombineError(
            f"reference {spec['reference']}: {measure} of set {name!r} is {found.definition} there and "
            f"{own.definition} here: measure the reference with the same prompting"
        )
    return found


def _reference(file: str, name: str, measure: str) -> Result:
    if not Path(file).is_file():
        raise CombineError(f"reference {file}: no such file")
    try:
        return from_document(_read(file))[name][measure]
    except (OSError, ValueError, KeyError, AttributeError, ResultError) as error:
        raise CombineError(
            f"reference {file}: has no {measure} of set {name!r} ({type(error).__name__}: {error}); it must be a "
            "results.json of the same suite, of a model that never saw that set"
        ) from error


def _identity(file: str) -> str:
    """Which model a reference is of: 6 hex digits of its weights' fingerprint, of its results where it has none."""
    document = _read(file)
    return _hash(document.get("weights") or document["results"])


def _read(file: str) -> dict[str, Any]:
    return dict(json.loads(Path(file).read_text(encoding="utf-8")))


def _problems(name: str, spec: Spec, measures: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    place, kind = f"combined.{name}", spec.get("measure")
    if not isinstance(kind, str) or kind not in QUANTITIES:
        yield f"{place}.measure = {kind!r}: {did_you_mean(kind, QUANTITIES)}known: {', '.join(QUANTITIES)}"
        return
    _, needed, optional = QUANTITIES[kind]
    allowed = ("measure", *needed, *optional)
    yield from (f"{place}.{key}: unknown key; allowed: {', '.join(allowed)}" for key in spec if key not in allowed)
    lacking = [key for key in needed if key not in spec]
    yield from (f"{place}.{key}: is missing" for key in lacking)
    wrong = [key for key in needed if key in spec and not _names_sets(key, spec[key])]
    for key in wrong:
        what = f"must map {', '.join(forgetting.UTILITY_SETS)} to sets" if key == "sets" else "must name a set"
        yield f"{place}.{key} = {spec[key]!r}: {what}"
    for key, values in (("score", SCORES), ("truth_ratio", FORMS)):
        if key in spec and spec[key] not in values:
            yield f"{place}.{key} = {spec[key]!r}: must be one of {', '.join(values)}"
            return
    if lacking or wrong:
        return
    if "members" in spec and spec["members"] == spec["nonmembers"]:
        yield f"{place}: members and nonmembers are both {spec['members']!r}: name a set that was not trained on"
        return
    parts = list(_parts(kind, spec))
    for one, wanted in parts:
        if one not in measures:
            yield f"{place}: names the set {one!r}, which the suite does not have: {', '.join(measures)}"
            continue
        missing = [measure for measure in wanted if measure not in measures[one]]
        if missing:
            yield f"{place}: needs {', '.join(missing)} among the measures of set {one!r}"
    yield from _reference_problems(place, spec, parts)


def _names_sets(key: str, value: Any) -> bool:
    if key != "sets":
        return isinstance(value, str)
    known = isinstance(value, dict) and set(value) <= set(forgetting.UTILITY_SETS)
    return known and all(isinstance(one, str) for one in value.values())


def _reference_problems(place: str, spec: Spec, parts: list[tuple[str, tuple[str, ...]]]) -> Iterator[str]:
    reference = spec.get("reference")
    if isinstance(reference, str):
        for one, wanted in parts:
            try:
                _reference(reference, one, wanted[0])
            except CombineError as error:
                yield f"{place}: {error}"
    elif reference is not None and not (type(reference) in (int, float) and 0 <= reference <= 1):
        yield f"{place}.reference = {reference!r}: must be a results file, or an area from 0 to 1"


def _parts(kind: str, spec: Spec) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The sets a quantity reads, with the measures it needs of each."""
    if kind == "model_utility":
        form = spec.get("truth_ratio", "geometric")
        for one in forgetting.UTILITY_SETS:
            yield _utility_set(spec, one), _utility_measures(one, form)
    elif kind == "forget_quality":
        yield spec["set"], ("truth_ratio_geometric",)
    else:
        score = spec.get("score", "min_k")
        yield from ((spec[side], (score,)) for side in ("members", "nonmembers"))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
