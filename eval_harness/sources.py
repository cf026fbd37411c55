"""Raw rows from a file, the hub, a task family of this package, or memory. Always exactly one of them."""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import io
import json
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval_harness.tasks import Task

RawRow = Mapping[str, Any]


class SourceError(ValueError):
    """A source that gives no rows; names the file and line, the hub name, or the task."""


def read_rows(
    *,
    hub: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    file: str | Path | None = None,
    task: str | None = None,
    rows: Sequence[RawRow] | None = None,
    split: str = "train",
    data: str | Path | None = None,
) -> Sequence[RawRow]:
    """Read raw rows from exactly one origin.

    Args:
        hub: a data set's name on the Hugging Face hub, with `config` and `revision` where it has them.
        file: .jsonl, .jsonl.gz, .json (a list of objects), .csv (with a header) or .parquet.
        task: "family/name" of eval_harness.tasks, e.g. "tiny_world/facts" or "multiple_choice/arc_easy", as it is
            asked: with its wording. `revision` is that of its data set.
        rows: rows in memory.
        split: of the hub data set or the task; a file and rows in memory are one split already.
        data: folder whose files win over the hub where a task's data set is asked for: NAME.SPLIT.jsonl and the
            other suffixes, or NAME.jsonl, in a raw form of `eval_harness.rows`; in it, or in a folder below it.

    Raises:
        SourceError: none or several origins, nothing there, malformed content, or no rows at all.
    """
    given = {"hub": hub, "file": file, "task": task, "rows": rows}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        found = " and ".join(named) or "none"
        raise SourceError(f"a source needs exactly one of hub, file, task, rows; found {found}")
    if hub is not None:
        found_rows: Sequence[RawRow] = _read_hub(hub, config, split, revision)
    elif file is not None:
        found_rows = _read_file(Path(file))
    elif task is not None:
        found_rows = _read_task(task, split, revision, data)
    else:
        found_rows = _checked(rows or [])
    if len(found_rows) == 0:
        raise SourceError(f"{named[0]} = {_name(given[named[0]])}: no rows (split {split!r})")
    return found_rows


def find_task(task: str) -> Task | None:
    """The Task of "family/name"; None for one whose rows are generated.

    Raises:
        SourceError: there is none, with the nearest name.
    """
    family, _, name = task.partition("/")
    families = task_families()
    if family not in families:
        raise SourceError(f"task = {task!r}: unknown family {family!r}. {_nearest(family, families)}")
    module = import_module(f"eval_harness.tasks.{family}")
    if name not in module.TASKS:
        raise SourceError(f"task = {task!r}: {family} has no task {name!r}. {_nearest(name, list(module.TASKS))}")
    found = module.TASKS[name]
    return None if isinstance(found, str) else found


def fingerprint(rows: Iterable[Any]) -> str:
    """SHA-256 (hex) over the rows in order, one canonical JSON line each; reads them one by one."""
    digest = hashlib.sha256()
    for row in rows:
        plain = dict(row) if isinstance(row, Mapping) else row
        line = json.dumps(plain, sort_keys=True, separators=(",", ":"), default=_plain)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def task_families() -> list[str]:
    """The modules of eval_harness.tasks, from their files: nothing is imported."""
    package = import_module("eval_harness.tasks")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def _read_hub(hub: str, config: str | None, split: str, revision: str | None) -> Sequence[RawRow]:
    from datasets import load_dataset

    place = f"hub = {hub!r}" + (f" (config {config!r})" if config else "")
    try:
        return load_dataset(hub, config, split=split, revision=revision)
    except (OSError, ValueError) as error:  # not found, offline and unknown config or split are all of these
        reason = str(error).strip().split("\n")[0]
        raise SourceError(
            f"{place}, split {split!r}: cannot be loaded: {reason}. Check the name and the split; offline, "
            "only data sets of the local cache can be read; give the rows as `file:`"
        ) from error


def _read_task(task: str, split: str, revision: str | None, data: str | Path | None) -> Sequence[RawRow]:
    found = find_task(task)
    family, _, name = task.partition("/")
    if found is None:
        try:
            return import_module(f"eval_harness.tasks.{family}").rows(name, split)
        except ValueError as error:
            raise SourceError(f"task = {task!r}, split {split!r}: {error}") from error
    file = None if data is None else local_file(Path(data), found.file or name, split)
    raw = _read_file(file) if file else _of_hub(task, found, split, revision, data)
    return _shaped(raw, lambda row: found.asked(row, split), str(file or f"task = {task!r}, split {split!r}"))


def hub_of(task: str, split: str, data: str | Path | None = None) -> str | None:
    """The data set of the Hub that a task's rows would be read from; None where they are ours or a file of the folder.

    Raises:
        SourceError: no such task; no such folder.
    """
    found = find_task(task)
    if found is None or split not in found.splits:
        return None
    name = found.file or task.partition("/")[2]
    return None if data is not None and local_file(Path(data), name, split) else found.hub


def _of_hub(task: str, found: Task, split: str, revision: str | None, data: str | Path | None) -> Sequence[RawRow]:
    if split not in found.splits:
        raise SourceError(
            f"task = {task!r}: {found.hub} has no split {split!r} here; it has {', '.join(found.splits)}. A file "
            f"{found.file or task.partition('/')[2]}.{split}.jsonl in the data folder would be read"
        )
    try:
        raw = _read_hub(found.hub, found.config, found.splits[split], revision)
    except SourceError as error:
        name = f"{found.file or task.partition('/')[2]}.{split}.jsonl"
        where = "none is given" if data is None else f"{str(data)!r} has no {name}"
        raise SourceError(f"task = {task!r}: {error}, or in a data folder ({where})") from error
    return _shaped(raw, found.row, f"task = {task!r}: {found.hub}, split {found.splits[split]!r}")


def _shaped(raw: Sequence[RawRow], shape: Callable[[RawRow], RawRow], place: str) -> list[RawRow]:
    made = []
    for position, row in enumerate(raw):
        try:
            made.append(shape(row))
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            lacking = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise SourceError(
                f"{place}: row {position}: {lacking} (fields found: {', '.join(map(str, row)) or 'none'})"
            ) from error
    return made


def local_file(folder: Path, name: str, split: str) -> Path | None:
    """The file of a data set's split in a folder or below it: NAME.SPLIT.SUFFIX, else NAME.SUFFIX; None without one.

    Raises:
        SourceError: no such folder, or several files that it could be.
    """
    if not folder.is_dir():
        raise SourceError(f"data = {str(folder)!r}: no such folder")
    for stem in (f"{name}.{split}", name):
        found = [file for suffix in READERS for file in sorted(folder.rglob(f"{stem}{suffix}"))]
        if len(found) > 1:
            raise SourceError(
                f"data = {str(folder)!r}: {stem} is there {len(found)} times: {', '.join(map(str, found))}"
            )
        if found:
            return found[0]
    return None


def _read_file(path: Path) -> list[RawRow]:
    if not path.is_file():
        raise SourceError(f"file = {str(path)!r}: {_absent(path)}")
    reader = next((reader for suffix, reader in READERS.items() if path.name.lower().endswith(suffix)), None)
    if reader is None:
        raise SourceError(f"file = {str(path)!r}: suffix {path.suffix!r} is not one of {', '.join(READERS)}")
    try:
        return reader(path)
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except (OSError, EOFError) as error:
        raise SourceError(f"{path}: cannot be read: {error}") from error


def _read_jsonl(path: Path) -> list[RawRow]:
    with path.open("rb") as file:
        return list(_json_lines(path, io.TextIOWrapper(file, encoding="utf-8-sig")))


def _read_jsonl_gz(path: Path) -> list[RawRow]:
    with gzip.open(path, "rt", encoding="utf-8-sig") as file:
        return list(_json_lines(path, file))


def _json_lines(path: Path, lines: Iterable[str]) -> Iterator[RawRow]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SourceError(f"{path}:{number}: malformed JSON: {error.msg} (column {error.colno})") from error
        if not isinstance(row, dict):
            raise SourceError(f"{path}:{number}: a line must be a JSON object, this is {type(row).__name__}")
        yield row


def _read_json(path: Path) -> list[RawRow]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line in a .json file, as many hub data sets have it
            return _read_jsonl(path)
        raise SourceError(f"{path}:{error.lineno}: malformed JSON: {error.msg}") from error
    if not isinstance(content, list):
        raise SourceError(f"{path}: must hold a list of objects, holds {type(content).__name__}")
    return _checked(content, str(path))


def _read_csv(path: Path) -> list[RawRow]:
    rows: list[RawRow] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    columns = len(reader.fieldnames or ())
                    raise SourceError(f"{path}:{reader.line_num}: not the header's {columns} columns")
                rows.append(row)
        except csv.Error as error:
            raise SourceError(f"{path}:{reader.line_num}: malformed CSV: {error}") from error
    return rows


def _read_parquet(path: Path) -> list[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise SourceError(f"{path}: not a readable parquet file: {error}") from error


READERS: dict[str, Callable[[Path], list[RawRow]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl_gz,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _checked(rows: Sequence[Any], place: str = "rows") -> list[RawRow]:
    for position, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise SourceError(f"{place}[{position}]: a row must be an object, this is {type(row).__name__}")
    return list(rows)


def _absent(path: Path) -> str:
    if path.is_dir():
        return "is a folder; name a file"
    folder = path.parent
    if not folder.is_dir():
        return f"no such file: the folder {str(folder)!r} does not exist either"
    near = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=3)
    return f"no such file. Nearest in {str(folder)!r}: {', '.join(near) or 'nothing alike'}"


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return (f"Did you mean {near[0]!r}? " if near else "") + f"Known: {', '.join(known)}"


def _name(value: Any) -> str:
    return "[]" if isinstance(value, Sequence) and not isinstance(value, str) else repr(str(value))


def _plain(value: Any) -> Any:
    if not is_dataclass(value) or isinstance(value, type):
        return str(value)
    fields = asdict(value)
    if not fields.get("references"):  # they came later: rows without any keep the fingerprint that runs know them by
        fields.pop("references", None)
    return fields
