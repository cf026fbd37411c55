"""Sources of a stage become one list of rows: read, recognised, weighted, fingerprinted."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cpt.errors import DataError
from eval_harness.rows import Row, RowError, canonical
from eval_harness.sources import SourceError, fingerprint, read_rows


@dataclass(frozen=True)
class Loaded:
    """Rows as recognised (after `limit`, in order), their hash, and under which licences they are, where told."""

    label: str
    rows: list[Row]
    fingerprint: str
    licences: tuple[str, ...] = ()


def load(source: Any, data_root: Path | None, place: str, seed: int = 0) -> Loaded:
    """Read one `Source` and recognise its rows.

    place names the source in errors, e.g. `stages.1.data.0`. Raises DataError with the first problems found:
    a missing file, an empty data set, rows of an unknown form, rows without an answer.
    """
    try:
        raw = read_rows(**source.origin(data_root))
    except SourceError as error:
        # "task = 'x': ..." stands behind its place as the dotted path that an override takes
        joint = "." if str(error).startswith(("hub = ", "file = ", "task = ", "rows = ")) else ": "
        raise DataError(f"{place}{joint}{error}") from error
    picked = _limited(raw, source.limit, source.shuffle, seed)
    rows, problems = [], []
    for number, item in enumerate(picked):
        try:
            rows.append(canonical(item, source.fields or None))
        except RowError as error:
            problems.append(f"{place} ({source.label}) row {number}: {error}")
            if len(problems) == 3:
                problems.append(f"{place}: stopped after three unreadable rows of {len(picked)}")
                break
    if problems:
        raise DataError(*problems)
    licences = (source.licence,) if source.licence else ()
    return Loaded(source.label, rows, fingerprint(rows), licences)  # as recognised: another mapping is other data


def _limited(raw: Sequence[Mapping[str, Any]], limit: int | None, shuffle: bool, seed: int) -> list[Mapping[str, Any]]:
    if limit is None or limit >= len(raw):
        return list(raw)
    if not shuffle:
        return [raw[i] for i in range(limit)]
    order = np.random.default_rng(seed).permutation(len(raw))[:limit]
    return [raw[int(i)] for i in sorted(order)]


def load_all(sources: Sequence[Any], data_root: Path | None, place: str, seed: int = 0) -> Loaded:
    """All sources of a stage as one list: whole, or by `count`, or in the proportion of their weights.

    With weights an epoch holds as many rows as all sources together; a source is repeated or thinned (seeded)
    to its share. Raises DataError with every source's problems.
    """
    loaded, problems = [], []
    for i, source in enumerate(sources):
        try:
            loaded.append(load(source, data_root, f"{place}.{i}", seed))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(*problems)
    counts = _counts(sources, [len(part.rows) for part in loaded])
    rows = [row for part, n in zip(loaded, counts, strict=True) for row in _resized(part, n, seed)]
    label = " + ".join(part.label for part in loaded)
    marks = [f"{part.fingerprint} {n}" for part, n in zip(loaded, counts, strict=True)]
    licences = tuple(dict.fromkeys(name for part in loaded for name in part.licences))
    return Loaded(label, rows, hashlib.sha256("\n".join(marks).encode()).hexdigest(), licences)


def drawn(part: Loaded, most: int | None, seed: int) -> list[Row]:
    """The rows, or `most` of them drawn by the seed where there are more."""
    return part.rows if most is None or most >= len(part.rows) else _resized(part, most, seed)


def part_of(loaded: Loaded, rows: list[Row]) -> Loaded:
    """Some of the rows, under the same label."""
    return loaded if len(rows) == len(loaded.rows) else replace(loaded, rows=rows, fingerprint=fingerprint(rows))


def wrong_kind(kind: str, loaded: Loaded, place: str) -> list[str]:
    """pretrain learns every token of plain text, the others need questions: rows of the other form are a mistake."""
    is_text = {row.kind == "text" for row in loaded.rows}
    if kind == "pretrain" and False in is_text:
        return [
            f"{place}: has rows with an answer, and a pretrain stage trains on plain text ({{text}}): use kind: sft"
        ]
    if kind == "sft" and True in is_text:
        return [f"{place}: has rows of plain text, which have no answer for an sft stage: use kind: pretrain"]
    if kind in ("rft", "sdft") and True in is_text:
        return [f"{place}: has rows of plain text, which ask nothing: an {kind} stage needs prompts with their answers"]
    return []


def _counts(sources: Sequence[Any], sizes: list[int]) -> list[int]:
    """Rows each source gives to an epoch; weighted shares by largest remainder, so they add up exactly."""
    if all(source.weight is not None for source in sources):
        total, weights = sum(sizes), [source.weight for source in sources]
        exact = [total * weight / sum(weights) for weight in weights]
        counts = [int(share) for share in exact]
        by_remainder = sorted(range(len(sizes)), key=lambda i: counts[i] - exact[i])
        for i in by_remainder[: total - sum(counts)]:
            counts[i] += 1
        return counts
    return [source.count or size for source, size in zip(sources, sizes, strict=True)]


def _resized(part: Loaded, count: int, seed: int) -> list[Row]:
    """`count` rows: whole copies first, then a seeded draw without repetition."""
    copies, rest = divmod(count, len(part.rows))
    picked = np.random.default_rng([seed, 1]).permutation(len(part.rows))[:rest]
    return part.rows * copies + [part.rows[i] for i in sorted(picked.tolist())]
