"""A forget request: the states it goes through, and what must have been measured before it counts as verified.

    requested -> applied -> verified            any of them -> failed, superseded
                 applied <- verified            a later stage trained the model: measure again

A state is never stored. It follows from the entries, by the rules here, each time the ledger is read.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from cpt.errors import ConfigError
from cpt.ledger.chain import Entry, canonical

State = Literal["requested", "applied", "verified", "failed", "superseded"]
STATES: tuple[State, ...] = ("requested", "applied", "verified", "failed", "superseded")
# What a verified request has passed, at least; of the names in one line any will do.
REQUIRED = (("forget_quality", "reference_distance"), ("extraction",), ("relearning",), ("four_bit",), ("paraphrase",))
SEEDS = 2  # a spread needs two retrained models
# Event -> the states of a request that it may follow.
FOLLOWS: dict[str, tuple[State, ...]] = {
    "applied": ("requested", "applied", "verified", "failed"),
    "measured": ("applied", "verified"),
    "verified": ("applied", "verified"),
    "failed": ("requested", "applied", "verified", "failed"),
    "superseded": ("requested", "applied", "verified", "failed"),
    "reopened": ("applied", "verified"),
}


class Refused(ValueError):
    """An event that does not follow from what a ledger holds; says what would."""


@dataclass(frozen=True)
class Reference:
    """The models that a threshold was taken from: trained without the rows, one for each of `seeds`.

    n: items that they were measured on; kind: how they were made.
    """

    seeds: tuple[int, ...]
    n: int
    kind: str = "retrained"


@dataclass(frozen=True)
class Check:
    """One measurement of a request, and the interval that a model passes in.

    name       forget_quality, reference_distance, extraction, relearning, four_bit, paraphrase, or one of yours
    measure    the definition of what was measured
    value      None where it could not be measured
    n          items
    low, high  passed from `low` to `high`; None leaves a side open, one must be there
    reference  what the interval was taken from

    Raises ConfigError for a value or bound that is not finite, no bound, no items, or a reference of another n.
    """

    name: str
    measure: str
    value: float | None
    n: int
    low: float | None = None
    high: float | None = None
    reference: Reference | None = None

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise ConfigError(*(f"check {self.name!r}: {problem}" for problem in problems))

    @property
    def passed(self) -> bool:
        """Whether it was measured and lies in its interval."""
        low, high = -math.inf if self.low is None else self.low, math.inf if self.high is None else self.high
        return self.value is not None and low <= self.value <= high

    @property
    def allowed(self) -> str:
        """Its interval in words."""
        if self.low is None or self.high is None:
            return f"at most {self.high:g}" if self.low is None else f"at least {self.low:g}"
        return f"{self.low:g} to {self.high:g}"

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> "Check":
        """A check as an entry holds it."""
        reference = stored.get("reference")
        return cls(**{**stored, "reference": _reference(reference) if reference else None})

    def _problems(self) -> Iterable[str]:
        for name in ("value", "low", "high"):
            number = getattr(self, name)
            if number is not None and not math.isfinite(number):
                unmeasured = "; None says that it could not be measured" if name == "value" else ""
                yield f"{name} = {number}: must be a finite number{unmeasured}"
        if self.low is None and self.high is None:
            yield "has no threshold: give `low`, `high` or both"
        elif self.low is not None and self.high is not None and self.low > self.high:
            yield f"low = {self.low} is above high = {self.high}: nothing could pass"
        if self.n < 1:
            yield f"n = {self.n}: must be at least 1; what was measured on nothing proves nothing"
        if self.reference is not None and self.reference.n != self.n:
            yield (
                f"its reference was measured on {self.reference.n} items, the model on {self.n}: measure both on the "
                "same items"
            )


def _reference(stored: Mapping[str, Any]) -> Reference:
    return Reference(**{**stored, "seeds": tuple(stored["seeds"])})


def failing(checks: Iterable[Check]) -> list[str]:
    """A sentence for each check that was measured and lies outside its interval."""
    return [
        f"{check.name} ({check.measure}) = {check.value:g}, must be {check.allowed}"
        for check in checks
        if check.value is not None and not check.passed
    ]


def missing(checks: Sequence[Check]) -> list[str]:
    """What a verified request would need and these checks do not show; failing ones count as there."""
    gaps = [f"{check.name} was not measured" for check in checks if check.value is None]
    for names in REQUIRED:
        given = [check for check in checks if check.name in names and check.value is not None]
        if not given and not any(check.name in names for check in checks):
            gaps.append(f"no {' or '.join(names)}")
        elif given and not any(check.reference and len(set(check.reference.seeds)) >= SEEDS for check in given):
            gaps.append(f"{given[0].name} has no reference of {SEEDS} seeds or more")
    return gaps


def verdict(checks: Sequence[Check]) -> Literal["verified", "measured", "failed"]:
    """The event that these checks amount to: `measured` where nothing fails and something is missing."""
    if failing(checks):
        return "failed"
    return "measured" if missing(checks) else "verified"


@dataclass(frozen=True)
class Request:
    """What the entries say of one request.

    rows          keyed hashes of the rows' content, sorted, each once
    asked, since  UTC: when it was asked, when its state was last written
    stage         that is to carry it out, or did
    method        as the stage gave it
    model_before  what the stage started from
    model         what the last verdict is, or must be, about: after the stage, or after a later one
    measurements  of the stage itself
    checks        of the last verdict
    missing       what a verdict of `verified` lacks
    reason        why it failed, was re-opened or superseded
    versions      of libraries, at the last verdict
    entries       numbers of its entries
    """

    id: str
    state: State
    who: str
    asked: str
    since: str
    rows: tuple[str, ...]
    note: str = ""
    stage: str = ""
    method: Mapping[str, Any] = field(default_factory=dict)
    model_before: str = ""
    model: str = ""
    measurements: Mapping[str, float] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    missing: tuple[str, ...] = ()
    reason: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    entries: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON, each check with its verdict."""
        checks = [asdict(check) | {"passed": check.passed} for check in self.checks]
        return json.loads(canonical(asdict(self) | {"checks": checks}))


def advance(requests: Mapping[str, Request], entry: Entry) -> dict[str, Request]:
    """The requests that an entry changes or adds, by id. Raises Refused where it does not follow from the others."""
    try:
        if (entry.event == "opened") != (entry.number == 1):
            raise Refused("a ledger begins with the event opened, and has it once")
        if entry.event == "opened":
            return {}
        if entry.event == "requested":
            return {entry.request: _asked(requests, entry)}
        if entry.event == "reopened":
            return {id: _after(requests, id, entry) for id in entry.body["requests"]}
        return {entry.request: _after(requests, entry.request, entry)}
    except (KeyError, TypeError, ConfigError) as error:
        raise Refused(f"{entry.event}: is no event of a ledger ({error})") from error


def _asked(requests: Mapping[str, Request], entry: Entry) -> Request:
    if entry.request in requests:
        raise Refused(f"{entry.request}: was requested before")
    said = {name: entry.body[name] for name in ("who", "note", "stage")}
    rows = tuple(entry.body["rows"])
    return Request(
        entry.request, "requested", asked=entry.at, since=entry.at, rows=rows, entries=(entry.number,), **said
    )


def _after(requests: Mapping[str, Request], id: str, entry: Entry) -> Request:
    if id not in requests:
        raise Refused(f"{id}: was never requested")
    request = requests[id]
    if request.state not in FOLLOWS[entry.event]:
        allowed = " or ".join(FOLLOWS[entry.event])
        raise Refused(f"{id}: is {request.state}; it can be {entry.event} when it is {allowed}")
    changed = _CHANGES[entry.event](request, entry.body)
    return replace(request, since=entry.at, entries=(*request.entries, entry.number), **changed)


def _applied(request: Request, body: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "state": "applied",
        **{name: body[name] for name in ("stage", "method", "model_before", "measurements")},
        "model": body["model_after"],
        "checks": (),
        "missing": tuple(missing(())),
        "reason": "",
    }


def _judged(event: str, request: Request, body: Mapping[str, Any]) -> dict[str, Any]:
    checks = tuple(Check.of(one) for one in body["checks"])
    if body["model"] != request.model:
        raise Refused(f"{request.id}: model {body['model']} was measured, and the request stands on {request.model}")
    if (found := verdict(checks)) != event:
        raise Refused(f"{request.id}: is said to be {event}, its checks amount to {found}")
    state = "applied" if event == "measured" else event
    gaps, reason = tuple(missing(checks)), "; ".join(failing(checks))
    return {"state": state, "checks": checks, "missing": gaps, "reason": reason, "versions": body["versions"]}


def _measured(request: Request, body: Mapping[str, Any]) -> dict[str, Any]:
    return _judged("measured", request, body)


def _verified(request: Request, body: Mapping[str, Any]) -> dict[str, Any]:
    return _judged("verified", request, body)


def _failed(request: Request, body: Mapping[str, Any]) -> dict[str, Any]:
    """By a verdict, or by what a stage says: a loss that is no number, a gate."""
    if "checks" in body:
        return _judged("failed", request, body)
    return {"state": "failed", "reason": body["reason"], "stage": body["stage"] or request.stage}


def _superseded(request: Request, body: Mapping[str, Any]) -> dict[str, Any]:
    return {"state": "superseded", "reason": body["reason"]}


def _reopened(request: Request, body: Mapping[str, Any]) -> dict[str, Any]:
    gaps = tuple(missing(()))
    reason = f"stage {body['stage']} trained after it"
    return {"state": "applied", "model": body["model"], "checks": (), "missing": gaps, "reason": reason}


_CHANGES = {
    "applied": _applied,
    "measured": _measured,
    "verified": _verified,
    "failed": _failed,
    "superseded": _superseded,
    "reopened": _reopened,
}
