"""The recipes that ship with cpt: what there is, and a copy of one to edit."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cpt.errors import ConfigError
from cpt.resources import BUNDLED_MODELS, bundled, find_recipe, recipe_files

WIDTH = 80


@dataclass(frozen=True)
class Recipe:
    """A shipped stream. kinds: of its stages, or "sweep". needs: the Hub, where base or rows come from there."""

    name: str
    file: Path
    says: str
    kinds: tuple[str, ...]
    needs: str


def recipes() -> list[Recipe]:
    """All of them, those that run anywhere first."""
    found = [_recipe(name, file) for name, file in recipe_files().items()]
    return sorted(found, key=lambda one: (bool(one.needs), one.name))


def _recipe(name: str, file: Path) -> Recipe:
    text = file.read_text(encoding="utf-8")
    raw = yaml.safe_load(text)
    comment = re.match(r"# (.*)", text)
    kinds = tuple(stage.get("kind", "sft") for stage in raw.get("stages", []))
    if "stream" in raw:
        return Recipe(name, file, comment[1] if comment else "", ("sweep",), "")
    return Recipe(name, file, comment[1] if comment else "", kinds, "" if _is_local(raw) else "the Hub")


def _is_local(raw: dict[str, Any]) -> bool:
    model = raw["model"]
    return (model["path"] if isinstance(model, dict) else model) in BUNDLED_MODELS


def text(found: list[Recipe]) -> str:
    """A paragraph a recipe, at most 80 columns wide, then what to do with one and where they lie."""
    lines = []
    for one in found:
        stages = " ".join(one.kinds) or "no stages"
        lines.append(f"{one.name}  ({stages}{'; needs ' + one.needs if one.needs else ''})")
        lines += textwrap.wrap(one.says, WIDTH, initial_indent="    ", subsequent_indent="    ")
    step = "cpt run NAME starts one; cpt cp NAME my.yaml copies it, to edit."
    return "\n".join([*lines, "", step, f"They lie in {bundled('recipes')}, launch files in {bundled('launch')}."])


def next_step(file: Path) -> str:
    """The commands for a recipe's copy."""
    if _is_sweep(file):
        return f"cpt sweep {file} --list; cpt sweep {file}"
    return f"cpt validate {file}; cpt run {file}"


def _is_sweep(file: Path) -> bool:
    """A file that is no stream, nor any YAML, was copied all the same: `cpt validate` says what is wrong with it."""
    try:
        raw = yaml.safe_load(file.read_bytes())
    except (yaml.YAMLError, ValueError):
        return False
    return isinstance(raw, dict) and "stream" in raw and not raw.keys() & {"model", "stages"}


def copy(recipe: str, target: Path, force: bool = False) -> Path:
    """Write a recipe's text, comments and all, to a file that is not there yet. Raises ConfigError."""
    source = find_recipe(recipe)
    if target.is_dir():
        target = target / source.name
    if target.exists() and not force:
        raise ConfigError(f"{target}: is there already. Name another file, or use --force.")
    if target.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{target}: a stream is a .yaml file; write {target}.yaml")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror}). Name another file.") from error
    return target
