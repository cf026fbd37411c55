"""Validation errors as a person reads them: place, value, what is allowed, the nearest name."""

import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from cpt.methods import registry
from cpt.suggest import did_you_mean


def explain(error: ValidationError, model: type[BaseModel], raw: Any) -> list[str]:
    """One line per problem: `stages.1.methods.0.ratio = 1.5: must be less than 1 (...)`."""
    lines: dict[str, list[str]] = {}
    for problem in error.errors(include_url=False):
        place, text = _line(problem | {"loc": _pasteable(problem["loc"])}, model, raw)
        lines.setdefault(place, []).append(text)
    # The branches of a union each give their reason for the same place.
    return [f"{place}: {', or '.join(dict.fromkeys(texts))}" for place, texts in lines.items()]


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
    return f"{place} = {_short(problem['input'])}", f"{text}{_described(known.get(field))}"


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
    if isinstance(raw, dict):
        return raw.get(part)
    if isinstance(raw, list | tuple) and isinstance(part, int) and part < len(raw):
        return raw[part]
    return raw  # a single mapping where a list is also allowed


def _method_class(raw: Any) -> type[BaseModel] | None:
    name = raw if isinstance(raw, str) else raw.get("type") if isinstance(raw, dict) else None
    return registry.find(name) if name in registry.homes() else None


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
