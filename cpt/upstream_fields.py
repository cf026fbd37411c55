"""The fields of upstream configuration classes by name, known without importing their libraries.

Importing TRL or PEFT costs seconds (they bring torch), so field names and simple types are read once per
installed version in a process of their own, and kept in the user's cache.
"""

import json
import os
import subprocess
import sys
from collections.abc import Collection, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Union

from pydantic import StrictBool, TypeAdapter, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from cpt.suggest import did_you_mean

_READ = """
import dataclasses, importlib, json, sys
library, name = sys.argv[1].split(":")
cls = getattr(importlib.import_module(library), name)
fields = {f.name: f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type))
          if not hasattr(f.type, "__args__") else str(f.type) for f in dataclasses.fields(cls) if f.init}
json.dump(fields, sys.stdout)
"""


# Arguments whose values are names of transformers'.
CHOICES = {"lr_scheduler_type", "optim", "report_to"}
_READ_CHOICES = """
import json, sys
from transformers import SchedulerType
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames
json.dump({"lr_scheduler_type": [one.value for one in SchedulerType], "optim": [one.value for one in OptimizerNames],
           "report_to": ["none", "all", *sorted(INTEGRATION_TO_CALLBACK)]}, sys.stdout)
"""


def cache_file(home: str) -> Path:
    """Where the field names of `home`, e.g. trl:SFTConfig, are kept for the installed versions."""
    module, name = home.split(":")
    library = module.split(".")[0]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "cpt" / f"{name}-{library}{version(library)}-transformers{version('transformers')}.json"


@cache
def known(home: str) -> dict[str, str]:
    """Field name -> annotation of every field of an installed dataclass, `home` being library:Class."""
    return _kept(home, _READ)


@cache
def choices(name: str) -> list[str]:
    """The values that transformers knows of one of CHOICES."""
    found: list[str] = _kept("transformers:choices", _READ_CHOICES)[name]
    return found


def _kept(home: str, script: str) -> Any:
    """What a script prints as JSON, from the cache where it was run before."""
    file = cache_file(home)
    if not file.exists():
        print(f"reading the field names of {home} (once per installed version) ...", file=sys.stderr)
        found = subprocess.run([sys.executable, "-c", script, home], capture_output=True, text=True, check=False)
        if found.returncode:
            raise RuntimeError(f"could not import {home}:\n{found.stderr[-2000:]}")
        file.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed: two first runs at once must not read half a file.
        aside = file.with_suffix(f".{os.getpid()}")
        aside.write_text(found.stdout, encoding="utf-8")
        aside.replace(file)
    return json.loads(file.read_text(encoding="utf-8"))


_SIMPLE: dict[str, Any] = {"int": int, "float": float, "bool": StrictBool, "str": str}


@cache
def _adapter(annotation: str) -> TypeAdapter[Any] | None:
    """A check for annotations made of int, float, bool, str and None; None for richer ones."""
    parts = [part.strip() for part in annotation.replace("Optional[", "None|").rstrip("]").split("|")]
    if not all(part in _SIMPLE or part == "None" for part in parts):
        return None
    kinds = tuple(type(None) if part == "None" else _SIMPLE[part] for part in parts)
    union: Any = Union[kinds]  # noqa: UP007  (made of a tuple)
    return TypeAdapter(union)


def check_fields(
    values: dict[str, Any],
    home: str,
    *,
    owned: Mapping[str, str],
    positive: Collection[str] = (),
) -> dict[str, Any]:
    """The values with simple types coerced; unknown names, owned ones and wrong types are refused, all at once.

    owned: field -> who decides it. positive: fields where zero or less fails deep inside the library.
    Raises a pydantic ValidationError whose locations are the fields' names.
    """
    checked, problems = {}, []
    for name, value in values.items():
        sentence, checked[name] = _check_field(name, value, home, owned, positive)
        if sentence:
            error = PydanticCustomError("cpt", "{sentence}", {"sentence": sentence})
            problems.append(InitErrorDetails(type=error, loc=(name,), input=value))
    if problems:
        raise ValidationError.from_exception_data(home, problems)
    return checked


def _check_field(
    name: str,
    value: Any,
    home: str,
    owned: Mapping[str, str],
    positive: Collection[str],
) -> tuple[str, Any]:
    if name in owned:
        return f"is not for a stage to set: {owned[name]}", value
    names = known(home)
    if name not in names:
        cls, library = home.partition(":")[2], home.partition(".")[0].partition(":")[0]
        return f"is no field of {library.upper()} {version(library)}'s {cls}.{did_you_mean(name, names)}", value
    adapter = _adapter(names[name])
    if adapter is None:
        return "", value
    try:
        checked = adapter.validate_python(value)
    except ValidationError:
        return f"must be of type {names[name]}", value
    return ("must be greater than 0" if name in positive and checked is not None and checked <= 0 else ""), checked
