"""A suite: named sets of rows with their measures, from a YAML file.

    description: what it is for
    sets:
      NAME: {task | file | hub: ..., config: ..., revision: ..., split: test, limit: 200, fields: {...},
             measures: [...], group: task | general, exact_match: one_pass | generate,
             style: auto | chat | plain}

A `file` is looked for relative to the suite's own file.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from eval_harness.measure import EvalSet
from eval_harness.rows import RowError, canonical
from eval_harness.sources import SourceError, read_rows

SHIPPED = Path(__file__).parent / "suites"
ORIGINS = ("task", "file", "hub")
ALLOWED: dict[str, tuple[str, ...]] = {
    "group": ("task", "general"),
    "exact_match": ("one_pass", "generate"),
    "style": ("auto", "chat", "plain"),
}
KEYS = (*ORIGINS, "config", "revision", "split", "limit", "fields", "measures", *ALLOWED)


class SuiteError(ValueError):
    """A suite that cannot be used: every problem, one a line."""


def shipped() -> dict[str, str]:
    """Name -> description of the suites of this package."""
    return {path.stem: _read(path).get("description", "") for path in sorted(SHIPPED.glob("*.yaml"))}


def load_suite(name_or_path: str, *, limit: int | None = None) -> list[EvalSet]:
    """The evaluation sets of a suite, with their rows.

    Args:
        name_or_path: a shipped suite's name, or a YAML file.
        limit: at most so many rows of each set, the first ones; a set's own smaller limit stays.

    Returns:
        Sets that eval_harness.measure.measure takes.

    Raises:
        SuiteError: unknown suite, unknown keys or values, sources without rows, rows of no known form.
    """
    path = _find(name_or_path)
    sets = _read(path).get("sets")
    if not isinstance(sets, dict) or not sets:
        raise SuiteError(f"{path}: `sets` must map at least one name to its source")
    problems = [problem for name, spec in sets.items() for problem in _problems(f"{path}: sets.{name}", spec)]
    built = []
    if not problems:
        for name, spec in sets.items():
            try:
                built.append(_build(str(name), spec, path.parent, limit))
            except (SourceError, RowError) as error:
                problems.append(f"{path}: sets.{name}: {error}")
    if problems:
        raise SuiteError("\n".join(problems))
    return built


def _build(name: str, spec: Mapping[str, Any], folder: Path, limit: int | None) -> EvalSet:
    origin = {key: spec[key] for key in (*ORIGINS, "config", "revision") if key in spec}
    if "file" in origin:
        origin["file"] = folder / origin["file"]
    raw = read_rows(**origin, split=spec.get("split", "test"))
    limits = [one for one in (limit, spec.get("limit")) if one is not None]
    rows = []
    for position in range(min([len(raw), *limits])):
        try:
            rows.append(canonical(raw[position], spec.get("fields")))
        except RowError as error:
            raise RowError(f"row {position}: {error}") from error
    measures = tuple(spec["measures"]) if "measures" in spec else None
    return EvalSet(name, rows, measures, **{key: spec[key] for key in ALLOWED if key in spec})


def _problems(place: str, spec: Any) -> Iterator[str]:
    if not isinstance(spec, dict):
        yield f"{place} = {spec!r}: must be a mapping, e.g. {{task: tiny_world/facts, split: test}}"
        return
    for key in spec:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            yield f"{place}.{key}: unknown key: {hint}allowed: {', '.join(KEYS)}"
    if sum(key in spec for key in ORIGINS) != 1:
        yield f"{place}: needs exactly one of {', '.join(ORIGINS)}"
    for key, allowed in ALLOWED.items():
        if key in spec and spec[key] not in allowed:
            yield f"{place}.{key} = {spec[key]!r}: must be one of {', '.join(allowed)}"
    limit = spec.get("limit")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        yield f"{place}.limit = {limit!r}: must be a whole number of at least 1"
    measures = spec.get("measures", [])
    if not isinstance(measures, list) or not all(isinstance(one, str) for one in measures):
        yield f"{place}.measures = {measures!r}: must be a list of names"
    if not isinstance(spec.get("fields", {}), dict):
        yield f"{place}.fields = {spec['fields']!r}: must map a canonical field to the row's own"


def _find(name_or_path: str) -> Path:
    if name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not path.is_file():
            raise SuiteError(f"{path}: no such file")
        return path
    path = SHIPPED / f"{name_or_path}.yaml"
    names = [one.stem for one in sorted(SHIPPED.glob("*.yaml"))]
    if name_or_path not in names:
        near = difflib.get_close_matches(name_or_path, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise SuiteError(
            f"suite {name_or_path!r}: unknown: {hint}known: {', '.join(names)}; a file's name ends in .yaml"
        )
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SuiteError(f"{path}: not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise SuiteError(f"{path}: must be a mapping with `sets`")
    unknown = sorted(set(content) - {"description", "sets"})
    if unknown:
        raise SuiteError(f"{path}: unknown keys {', '.join(map(str, unknown))}; allowed: description, sets")
    return content
