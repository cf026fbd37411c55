"""What differs between resolved streams, in as few lines as say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

ABSENT = "-"
LONGEST = 160  # characters of a value
IGNORED = {("name",), ("output_dir",)}  # what tells runs apart, and nothing of how they were trained


class Differs(NamedTuple):
    """A key that is not the same in all streams: `stages.*.methods.replay` is that of every stage.

    values   one per stream, as YAML; "-" where the stream has no such key, or nothing under it
    """

    key: str
    values: tuple[str, ...]


def differing(streams: Sequence[Mapping[str, Any]]) -> list[Differs]:
    """Every differing key of resolved streams (the content of stream.yaml), outermost where a whole part is missing.

    Lists of named parts (stages, methods, data) are compared by name, not by place; None, {} and [] count as absent.
    """
    found = [(path, values) for path, values in _differing((), list(streams)) if path not in IGNORED]
    stages = {name for stream in streams for name in _by_name(stream.get("stages")) or {}}
    alike: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for path, values in found:
        if len(path) > 2 and path[0] == "stages":
            alike.setdefault((path[2:], values), []).append(path[1])
    lines = dict[str, tuple[str, ...]]()
    for path, values in found:
        whole = path[0] == "stages" and len(stages) > 1 and len(alike.get((path[2:], values), ())) == len(stages)
        lines[".".join(("stages", "*", *path[2:]) if whole else path)] = values
    return [Differs(key, values) for key, values in lines.items()]


def _differing(path: tuple[str, ...], values: Sequence[Any]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    parts = [_by_name(value) for value in values]
    if len(known := [part for part in parts if part is not None]) == len(values):
        keys = dict.fromkeys(key for part in known for key in part)
        lines = [line for key in keys for line in _differing((*path, key), [part.get(key) for part in known])]
        return [*_order(path, values, known), *lines]
    said = tuple(map(_said, values))
    return [(path, said)] if len(set(said)) > 1 else []


def _order(
    path: tuple[str, ...], values: Sequence[Any], parts: Sequence[Mapping[str, Any]]
) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """A line where the same named parts stand in another order."""
    orders = [tuple(part) for part in parts]
    if not isinstance(values[0], list) or len(set(orders)) == 1 or len({frozenset(order) for order in orders}) > 1:
        return []
    return [((f"order of {'.'.join(path)}",), tuple(", ".join(order) for order in orders))]


def _by_name(value: Any) -> dict[str, Any] | None:
    """A mapping as it is, a list of named parts by name or type; None for anything else, and where nothing is in it."""
    if isinstance(value, Mapping):
        return {str(key): part for key, part in value.items()} or None
    if not isinstance(value, list) or not value or not all(isinstance(part, Mapping) for part in value):
        return None
    names = [part.get("name") or part.get("type") for part in value]
    return dict(zip(map(str, names), value, strict=True)) if all(names) and len(set(names)) == len(names) else None


def _said(value: Any) -> str:
    if (kept := _bare(value)) is None:
        return ABSENT
    text = yaml.safe_dump(kept, default_flow_style=True, width=float("inf"), sort_keys=False, allow_unicode=True)
    text = text.removesuffix("\n...\n").strip()
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def _bare(value: Any) -> Any:
    """Without what is not set; None where nothing is left."""
    if isinstance(value, Mapping):
        value = {key: part for key, given in value.items() if (part := _bare(given)) is not None}
    elif isinstance(value, list):
        value = [part for given in value if (part := _bare(given)) is not None]
    return None if value in ({}, []) else value
