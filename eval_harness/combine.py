"""Quantities over several sets, or against another model's results: what a suite names under `combined`.

    model_utility     sets: {retain, real_authors, world_facts}, truth_ratio: geometric | arithmetic
    forget_quality    set, reference: a results file of a model that never saw the set
    membership_auc    members, nonmembers, score: loss_score | zlib_score | min_k | min_k_plus_plus
    privleak          members, nonmembers, score, reference: a results file, or an area in MUSE's direction

The formulas are those of `eval_harness.metrics`; docs/forgetting_metrics.md explains them.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from eval_harness.metrics import forgetting, membership
from eval_harness.results import Result, ResultError, from_document

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
    scores = {
        one: {
            what: results[_utility_set(spec, one)][measure].value
            for what, measure in zip(forgetting.UTILITY_QUANTITIES, _utility_measures(one, form), strict=True)
        }
        for one in forgetting.UTILITY_SETS
    }
    found = forgetting.model_utility(scores, truth_ratio=form)
    return Result(found.value, found.n, None, f"model_utility@1({form},harmonic_of_9)", True, note=found.reason)


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
    definition = f"forget_quality@1(ks,{own.definition},n={found.n}/{found.n_ref})"
    note = found.reason or f"D = {found.statistic:.6g}, {found.method} p"
    return Result(found.p, found.n, None, definition, True, note=note)


def _membership_auc(spec: Spec, results: Results) -> Result:
    score = spec.get("score", "min_k")
    area = _area(results, spec["members"], spec["nonmembers"], score)
    definition = f"membership_auc@1({score},members_lower)"
    if area is None:
        return Result(None, 0, None, definition, False, note="a side has no item with a score")
    note = f"{area.level:.0%} interval {_number(area.low)} to {_number(area.high)}; {area.members} members"
    return Result(area.value, area.members + area.nonmembers, area.stderr, definition, False, note=note)


def _privleak(spec: Spec, results: Results) -> Result:
    score = spec.get("score", "min_k")
    definition = f"privleak@1({score},muse)"
    own = _area(results, spec["members"], spec["nonmembers"], score)
    given = spec.get("reference")
    reference: Any = given
    if isinstance(given, str):
        sides = [spec[side] for side in ("members", "nonmembers")]
        parts = {one: {score: _alike(spec, one, results[one][score])} for one in sides}
        reference = _area(parts, spec["members"], spec["nonmembers"], score)
    if own is None or reference is None:
        why = "a side has no item with a score" if own is None else "no reference: the area of a model without the set"
        return Result(None, 0, None, definition, False, note=why)
    found = membership.privleak(own, reference)
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


def _area(results: Results, members: str, nonmembers: str, score: str) -> membership.Auc | None:
    sides = (results[name][score].per_item.values() for name in (members, nonmembers))
    return membership.auc(*([value for value in side if not math.isnan(value)] for side in sides))


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
        document = json.loads(Path(file).read_text(encoding="utf-8"))
        return from_document(document)[name][measure]
    except (OSError, ValueError, KeyError, AttributeError, ResultError) as error:
        raise CombineError(
            f"reference {file}: has no {measure} of set {name!r} ({type(error).__name__}: {error}); it must be a "
            "results.json of the same suite, of a model that never saw that set"
        ) from error


def _problems(name: str, spec: Spec, measures: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    place, kind = f"combined.{name}", spec.get("measure")
    if kind not in QUANTITIES:
        near = difflib.get_close_matches(str(kind), QUANTITIES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        yield f"{place}.measure = {kind!r}: {hint}known: {', '.join(QUANTITIES)}"
        return
    _, needed, optional = QUANTITIES[kind]
    allowed = ("measure", *needed, *optional)
    yield from (f"{place}.{key}: unknown key; allowed: {', '.join(allowed)}" for key in spec if key not in allowed)
    lacking = [key for key in needed if key not in spec]
    yield from (f"{place}.{key}: is missing" for key in lacking)
    for key, values in (("score", SCORES), ("truth_ratio", FORMS)):
        if key in spec and spec[key] not in values:
            yield f"{place}.{key} = {spec[key]!r}: must be one of {', '.join(values)}"
            return
    if lacking:
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
