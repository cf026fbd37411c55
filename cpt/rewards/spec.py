"""A reward as a user writes it, and the function it names. Validation imports neither torch nor the user's module."""

import functools
import hashlib
import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from keyword import iskeyword
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, BeforeValidator, Field, JsonValue, ValidationError, create_model, model_validator
from pydantic_core import PydanticCustomError

from cpt.data.spec import Name, Strict, refuse
from cpt.errors import ConfigError
from cpt.rewards.numbers import math, numeric
from cpt.rewards.text import exact_match, format
from cpt.suggest import did_you_mean

RewardFunction = Callable[..., Any]
Problem = tuple[tuple[str | int, ...], Any, str]  # location, value, sentence

BUNDLED: dict[str, RewardFunction] = {
    "exact_match": exact_match,
    "format": format,
    "math": math,
    "numeric": numeric,
}
# What TRL passes to every reward beside the columns of the rows.
FROM_TRL = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}
EXAMPLE = "my_package.rewards:helpful"
SHAPE = "def helpful(completions, **columns) -> list[float]"


class Reward(Strict):
    """One function that scores completions, its share of the sum, and its arguments."""

    type: str = Field(description="a bundled reward's name, or the path of a function")
    name: Name | None = Field(None, description="what logs call it; default: the function's own name")
    weight: float = Field(1.0, allow_inf_nan=False, description="multiplies it in the sum of a stage's rewards")
    arguments: dict[str, JsonValue] = Field({}, description="keyword arguments of the function")

    @model_validator(mode="after")
    def _known(self) -> "Reward":
        found: list[Problem] = []
        if self.weight == 0:
            found.append((("weight",), 0.0, "must not be 0, which would leave the reward out: take it off the list"))
        if self.type in BUNDLED:
            settings, wrong = _settings(self.type, self.arguments)
            object.__setattr__(self, "arguments", settings)
            found += wrong
        elif not _is_path(self.type):
            found.append((("type",), self.type, _unknown(self.type)))
        refuse(*found)
        return self


def _as_mapping(value: Any) -> Any:
    if isinstance(value, str):
        return {"type": value}
    if not isinstance(value, dict | Reward):
        raise PydanticCustomError("cpt", "must be a reward's name or a mapping with its name under 'type'")
    return value


StageReward = Annotated[Reward, BeforeValidator(_as_mapping, json_schema_input_type=str | Reward)]


def label(reward: Reward) -> str:
    """The name a reward has in logs: its own, or the function's. A stage refuses two of one label."""
    return reward.name or reward.type.replace(":", ".").rpartition(".")[2]


def resolve(reward: Reward, place: str = "rewards") -> RewardFunction:
    """The function, its arguments bound; called with keywords only, as TRL does.

    An argument wins over a column of the rows of the same name. `place` is where the reward stands in the stream,
    for errors: stages.1.rewards.0. Raises ConfigError: no such module or attribute, a module that fails to import,
    something that is not a function of completions, arguments it does not have.
    """
    function = _found(reward, place)

    @functools.wraps(function)
    def bound(**columns: Any) -> Any:
        return function(**(columns | reward.arguments))

    return bound


def columns(reward: Reward, place: str = "rewards") -> list[str]:
    """Columns that the rows must have, or the reward would raise on every one of them. Raises as `resolve`."""
    parameters = inspect.signature(_found(reward, place)).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return [name for name in required if name not in FROM_TRL and name not in reward.arguments]


def identity(reward: Reward, place: str = "rewards") -> dict[str, Any]:
    """What makes the reward another one: type, weight, arguments, and the source a path leads to.

    `sources` maps module names to the sha256 of their files: the module that the path names and, where that is
    another, the one that defines the function; None for a module without a file. Files that those import are not
    looked at. Raises as `resolve`.
    """
    known = {"type": reward.type, "weight": reward.weight, "arguments": reward.arguments}
    if reward.type in BUNDLED:
        return known
    defined: Any = _found(reward, place)
    while isinstance(defined, functools.partial):
        defined = defined.func
    modules = {_split(reward.type)[0], inspect.unwrap(defined).__module__}  # an instance has its class's
    return known | {"sources": {name: _file_hash(name) for name in sorted(modules)}}


# ---- bundled rewards: the signature is the schema ---------------------------------------------------


@functools.cache
def _schema(name: str) -> type[BaseModel]:
    """A model whose fields are the keyword-only parameters of a bundled reward."""
    hints = get_type_hints(BUNDLED[name], include_extras=True)
    parameters = inspect.signature(BUNDLED[name]).parameters.values()
    options = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    fields: dict[str, Any] = {p.name: (hints[p.name], ... if p.default is p.empty else p.default) for p in options}
    return create_model(name, __base__=Strict, **fields)


def _settings(name: str, arguments: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Every argument of a bundled reward, defaults written, and what is wrong with those given."""
    schema = _schema(name)
    try:
        return schema.model_validate(arguments).model_dump(), []
    except ValidationError as error:
        return arguments, [
            (("arguments", *e["loc"]), None if e["type"] == "missing" else e["input"], _sentence(e, name, schema))
            for e in error.errors()
        ]


def _sentence(error: Any, name: str, schema: type[BaseModel]) -> str:
    known = ", ".join(schema.model_fields) or "nothing"
    if error["type"] == "extra_forbidden":
        hint = did_you_mean(error["loc"][-1], schema.model_fields)
        return f"is no argument of {name}.{hint} It takes: {known}."
    if error["type"] == "missing":
        return f"is required: {name} takes {known}"
    return error["msg"].replace("Input should be", "must be").replace("Value error, ", "")


def _unknown(name: str) -> str:
    if "." in name or ":" in name:
        return f"is no path of a function: write module and function, as in {EXAMPLE}"
    return f"is no reward.{did_you_mean(name, BUNDLED)} Known: {', '.join(BUNDLED)}; yours by its path: {EXAMPLE}."


# ---- a user's function, by its path -----------------------------------------------------------------


def _is_path(text: str) -> bool:
    module, attribute = _split(text)
    return all(part.isidentifier() and not iskeyword(part) for part in [*module.split("."), *attribute.split(".")])


def _split(path: str) -> tuple[str, str]:
    """Module and attribute of `module:attribute.of.it` or `module.attribute`."""
    module, colon, attribute = path.partition(":")
    if not colon:
        module, _, attribute = path.rpartition(".")
    return module, attribute


def _found(reward: Reward, place: str) -> RewardFunction:
    if reward.type in BUNDLED:
        return BUNDLED[reward.type]
    function = _imported(reward.type, f"{place} = {reward.type!r}")
    problems = _misfits(function, reward.arguments)
    if problems:
        raise ConfigError(*(f"{place} = {reward.type!r}: {text}" for text in problems))
    return function


def _imported(path: str, place: str) -> Any:
    name, attribute = _split(path)
    found: Any = _module(name, place)
    for part in attribute.split("."):
        known = dir(found)
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise ConfigError(f"{place}: {name} has no {attribute}.{did_you_mean(part, known)}") from error
        except Exception as error:  # a module that imports its parts when they are asked for
            raise ConfigError(f"{place}: importing {attribute} fails: {_said(error)}") from error
    return found


def _module(name: str, place: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if not error.name or not f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(f"{place}: importing {name} fails: {_said(error)}") from error
        advice = "install its package or set PYTHONPATH to its folder (for a method of a class: module:Class.method)"
        raise ConfigError(f"{place}: there is no module {error.name}: {advice}") from error
    except Exception as error:
        raise ConfigError(f"{place}: importing {name} fails: {_said(error)}") from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _misfits(function: Any, arguments: dict[str, Any]) -> list[str]:
    """Why TRL could not call the function with its columns and these arguments."""
    if not callable(function) or inspect.isclass(function):
        return [f"is a {type(function).__name__}, no function: {SHAPE}"]
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return [f"has no signature to read: wrap it in a function of Python, {SHAPE}"]
    found = []
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    by_position = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if by_position or not (takes_any or "completions" in named):
        found.append(f"does not accept completions= by name: {SHAPE}")
    elif not takes_any:
        found.append(f"needs **columns, for every column of the rows is passed, and trainer_state: {SHAPE}")
    options = sorted(named - FROM_TRL)
    for name in arguments.keys() - set(options):
        known = ", ".join(options) or "none"
        found.append(f"has no argument {name!r}.{did_you_mean(name, options)} Its own: {known}.")
    return sorted(found)


def _file_hash(module: str) -> str | None:
    file = getattr(sys.modules.get(module), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None
