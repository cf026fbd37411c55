"""Validation errors as a person reads them: place, value, what is allowed, the nearest name."""

import copy
import difflib
import re
from functools import reduce
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from cpt.methods import registry
from cpt.suggest import did_you_mean

# In the place of an entry that cannot be read: a method that is absent, a reward of its own name.
STAND_INS = {
    "methods": lambda place: {"type": "replay", "ratio": 0},
    "rewards": lambda place: {"type": "numeric", "name": f"unnamed-{place}"},
}


def every_problem(error: ValidationError, model: type[BaseModel], raw: Any) -> tuple[list[str], BaseModel | None]:
    """One line per problem, `stages.1.methods.0.ratio = 1.5: must be less than 1 (...)`, and what is left without them.

    Checks across fields only run on parts that parse. So what is wrong is taken out of a copy and the rest is
    looked at again, until nothing new shows: the user hears of everything in one round. The second value is the
    rest as a model, None where it cannot stand without what was wrong.
    """
    rest, lines, seen = copy.deepcopy(raw), list[str](), list[tuple[Any, ...]]()
    while True:
        found = [problem | {"loc": _pasteable(problem["loc"])} for problem in error.errors(include_url=False)]
        fresh = [problem for problem in found if not any(_covers(problem["loc"], other) for other in seen)]
        lines += _lines(fresh, model, rest)
        for problem in fresh:
            seen.append(problem["loc"])
            _take_out(rest, problem)
        if not fresh:
            return lines, None
        try:
            return lines, model.model_validate(rest)
        except ValidationError as again:
            error = again


def _lines(problems: list[Any], model: type[BaseModel], raw: Any) -> list[str]:
    lines: dict[str, list[str]] = {}
    for problem in problems:
        place, text = _line(problem, model, raw)
        lines.setdefault(place, []).append(text)
    # The branches of a union each give their reason for the same place.
    return [f"{place}: {', or '.join(dict.fromkeys(texts))}" for place, texts in lines.items()]


def _covers(path: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether one path leads through the other: what is said of one is then said of both."""
    n = min(len(path), len(other))
    return path[:n] == other[:n]


def _take_out(raw: Any, problem: Any) -> None:
    """Remove the value a problem is about, or put in its place what keeps the rest as it was meant: a choice's nearest
    word, a method's or reward's stand-in, a new name."""
    path = problem["loc"]
    listed = next((part for part in path if part in STAND_INS), None)
    if listed and len(path) > (at := path.index(listed)) + 1:
        path = path[: at + 2]
    while len(path) > 1 and not isinstance(_at(raw, path[:-1]), dict | list):
        path = path[:-1]  # a word stands for a mapping: `kl: base` is kl.to
    here, last = _at(raw, path[:-1]), path[-1] if path else None
    if isinstance(here, list) and not listed and path[-2] != "stages":
        here, last = _at(raw, path[:-2]), path[-2]  # without one entry the others would have other numbers
    if isinstance(here, list):
        if listed and isinstance(last, int) and last < len(here):
            here[last] = STAND_INS[listed](last)
    elif isinstance(here, dict) and last == "name":
        here["name"] = "-".join(["unnamed", *(str(part) for part in path if isinstance(part, int))])
    elif isinstance(here, dict) and last in STAND_INS and problem["type"] == "list_type":
        here[last] = [STAND_INS[last](0)]
    elif isinstance(here, dict) and (meant := _meant(problem)):
        here[last] = meant
    elif isinstance(here, dict):
        here.pop(last, None)


def _meant(problem: Any) -> str | None:
    """The choice that a misspelt one is nearest to, if it is near one."""
    if problem["type"] != "literal_error":
        return None
    choices = re.findall(r"'([^']+)'", problem["ctx"]["expected"])
    return next(iter(difflib.get_close_matches(str(problem["input"]), choices, n=1)), None)


def _at(raw: Any, path: tuple[Any, ...]) -> Any:
    return reduce(_step_into, path, raw)


def _pasteable(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """Without pydantic's names for the branches of a union, which are no part of the YAML."""
    return tuple(
        part for part in path if isinstance(part, int) or not re.search(r"[\[\]]|^(constrained|function)-", part)
    )


def _line(problem: Any, model: type[BaseModel], raw: Any) -> tuple[str, str]:
    path = problem["loc"]
    owner, field = _owner(path, model, raw)
    place = ".".join(str(part) for part in path) or "stream"
    kind, known = problem["type"], owner.model_fields if owner else {}
    if kind == "extra_forbidden":
        hint = did_you_mean(path[-1], known)
        return f"{place} = {_short(problem['input'])}", f"unknown key.{hint} Known keys: {', '.join(known)}."
    if kind == "missing":
        return place, f"is required{_described(known.get(field))}."
    text = problem["msg"].replace("Input should be", "must be").replace("Value error, ", "")
    if kind == "string_pattern_mismatch":
        text = "may hold letters, digits, _ and -, and starts with a letter or digit"
    about = _described(known.get(field))
    if kind in ("model_type", "dict_type"):
        inner = _model_in(known[field].annotation) if field in known else owner
        keys = f" Its keys: {', '.join(inner.model_fields)}." if inner and kind == "model_type" else ""
        text, about = "must be a mapping, key: value", f"{about}.{keys}"
    if kind == "list_type":
        text = "must be a list: a line with - for each, or [ ] around them"
    return f"{place} = {_short(problem['input'])}", f"{text}{about}"


def _owner(path: tuple[Any, ...], model: type[BaseModel], raw: Any) -> tuple[type[BaseModel] | None, str]:
    """The class that owns the last named field of the path: follows annotations, and `type` for methods."""
    owner: type[BaseModel] | None = model
    field = ""
    for depth, part in enumerate(path):
        value = raw
        raw = _step_into(raw, part)
        if isinstance(part, int):
            if field == "methods":
                owner = _method_class(raw)
            continue
        if owner is None or depth == len(path) - 1:
            field = part
            continue
        found = owner.model_fields.get(part)
        field = part
        if found is not None:
            owner = _model_in(found.annotation)
        elif not isinstance(value, dict):
            owner = None
    return owner, field


def _step_into(raw: Any, part: Any) -> Any:
    if isinstance(raw, dict) and (part in raw or isinstance(part, str)):
        return raw.get(part)
    if isinstance(raw, list | tuple) and isinstance(part, int) and part < len(raw):
        return raw[part]
    return raw  # a single mapping where a list is also allowed


def _method_class(raw: Any) -> type[BaseModel] | None:
    name = raw if isinstance(raw, str) else raw.get("type") if isinstance(raw, dict) else None
    try:
        found = registry.find(name) if name in registry.homes() else None
    except (Exception, SystemExit):  # the code of another package; the problem itself is told elsewhere
        return None
    return found if isinstance(found, type) and issubclass(found, BaseModel) else None


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside Optional, list, dict or Annotated; None when there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)


def _described(field: Any) -> str:
    return f" ({field.description})" if field is not None and field.description else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
