"""Which items were right before a stage and are wrong after it, and the reverse, from the items of eval/SET.json.

An item there has a value and an id, the hash of its content. Its text is read from the source that the stream names
(rows in the stream, a file, a generated task). Only a row whose hash is the id is shown, so a file that has changed
since shows nothing rather than something else. Nothing is fetched: rows of a data set on the Hub stay ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cpt.report.read import RunView, StageFiles, as_list, as_object, finite, results
from cpt.report.scaffold import isolated, shell

LARGEST = 64 << 20  # bytes of a source file that is read for texts
MOST_READ = 256 << 20  # bytes of items read for one report, the newest stages first
PER_SET = 3  # examples of one set and direction
LONGEST = 280  # characters of a prompt or an answer

Right = dict[str, bool]  # item id -> whether it was right


@dataclass(frozen=True)
class Example:
    """prompt and answer are None where the row's text is not known here; `why` says so."""

    name: str
    item: str
    prompt: str | None
    answer: str | None
    why: str = ""


@dataclass(frozen=True)
class Turned:
    """Items that a stage has turned, against an earlier one: all of them counted, some shown."""

    before: StageFiles
    after: StageFiles
    lost: int
    won: int
    compared: int
    lost_examples: tuple[Example, ...]
    won_examples: tuple[Example, ...]
    by_set: tuple[tuple[str, int, int], ...]
    command: Markup | None


def turned(view: RunView, most: int) -> tuple[list[Turned], list[str]]:
    """For every measured stage against the one before and against the base; and notes about what was left out.

    Args:
        most: examples on the page in all, the newest stages first.
    """
    right, notes = _right(view)
    pairs = [(view.rows[i - 1], view.rows[i]) for i in range(1, len(view.rows))]
    pairs += [(view.rows[0], stage) for stage in view.rows[2:]]
    pairs.sort(key=lambda pair: (-pair[1].index, -pair[0].index))
    texts = _Texts(view)
    found = []
    for before, after in pairs:
        one = _turned(view, before, after, right, texts, max(0, most))
        if one is not None:
            most -= len(one.lost_examples) + len(one.won_examples)
            found.append(one)
    return found, [*notes, *texts.notes]


def _right(view: RunView) -> tuple[dict[tuple[int, str], Right], list[str]]:
    """(stage, set) -> its items, of sets whose items are right or wrong."""
    found: dict[tuple[int, str], Right] = {}
    left, skipped = MOST_READ, 0
    for stage in [*view.rows[:1], *reversed(view.rows[1:])]:
        for name in view.sets:
            file, score = stage.items_of(name), view.score(stage, name)
            if score is None or not score.higher_is_better or file is None or not file.is_file():
                continue
            left -= file.stat().st_size
            if left < 0:
                skipped += 1
            elif items := _items(results(file).get(view.measures[name])):
                found[stage.index, name] = items
    note = f"items of {skipped} eval files were not read: together they are larger than {MOST_READ >> 20} MB"
    return found, [note] if skipped else []


def _items(result: Any) -> Right:
    """Empty where an item is neither right nor wrong; one that is no number is left out."""
    per_item = as_object(as_object(result).get("per_item"))
    known = {name: number for name, value in per_item.items() if (number := finite(value)) is not None}
    return {name: bool(value) for name, value in known.items()} if set(known.values()) <= {0, 1} else {}


def _turned(
    view: RunView,
    before: StageFiles,
    after: StageFiles,
    right: Mapping[tuple[int, str], Right],
    texts: _Texts,
    most: int,
) -> Turned | None:
    lost: dict[str, list[str]] = {}
    won: dict[str, list[str]] = {}
    compared = 0
    for name in view.sets:
        old, new = right.get((before.index, name), {}), right.get((after.index, name), {})
        both = [item for item in old if item in new]
        compared += len(both)
        lost[name] = [item for item in both if old[item] and not new[item]]
        won[name] = [item for item in both if new[item] and not old[item]]
    if not compared:
        return None
    shown_lost = list(_examples(lost, texts, most - most // 3))
    shown_won = list(_examples(won, texts, most // 3))
    by_set = tuple((name, len(lost[name]), len(won[name])) for name in lost if lost[name] or won[name])
    return Turned(
        before,
        after,
        sum(map(len, lost.values())),
        sum(map(len, won.values())),
        compared,
        tuple(shown_lost),
        tuple(shown_won),
        tuple(sorted(by_set, key=lambda one: (-one[1], -one[2]))),
        _command(view, before, after, [*shown_lost, *shown_won]),
    )


def _examples(by_set: Mapping[str, Sequence[str]], texts: _Texts, most: int) -> Iterator[Example]:
    """A few of every set in turn, sets with most first."""
    ordered = sorted(by_set.items(), key=lambda one: -len(one[1]))
    picked = [(name, item) for place in range(PER_SET) for name, items in ordered for item in items[place : place + 1]]
    for name, item in sorted(picked[: min(most, 12)], key=lambda one: [n for n, _ in ordered].index(one[0])):
        yield texts.example(name, item)


def _command(view: RunView, before: StageFiles, after: StageFiles, examples: Sequence[Example]) -> Markup | None:
    """`cpt ask` with the first prompt that stands on one line whole; None without one."""
    fits = (one.prompt for one in examples if one.prompt and len(one.prompt) <= LONGEST and one.prompt.isprintable())
    prompt = next(fits, None)
    if prompt is None:
        return None
    return shell("cpt", "ask", str(view.path), prompt, "--stages", f"{before.index},{after.index}")


class _Texts:
    """Rows by set and id, each source read at most once and only when an example of it is shown."""

    def __init__(self, view: RunView) -> None:
        self.view = view
        self.known: dict[str, dict[str, tuple[str, str]]] = {}
        self.notes: list[str] = []

    def example(self, name: str, item: str) -> Example:
        if name not in self.known:
            self.known[name] = self._read(name)
        text = self.known[name].get(item.partition("-")[0])  # the second row of one content is ID-2
        if text is None:
            return Example(name, item, None, None, "the row's text is not kept with its score")
        return Example(name, item, *text)

    def _read(self, name: str) -> dict[str, tuple[str, str]]:
        from eval_harness.rows import RowError, canonical
        from eval_harness.sources import SourceError, read_rows

        source = self._source(name)
        try:
            raw = read_rows(**_origin(source, self.view.stream.get("data_root")))
            fields = as_object(source.get("fields")) or None
            rows = [canonical(row, fields) for row in raw]
        except (SourceError, RowError, OSError, _NotHere) as error:
            self.notes.append(f"{isolated(name)}: rows are shown by their ids: {str(error).splitlines()[0]}")
            return {}
        return {row.id: (_asked(row), row.completion or "") for row in rows if row.kind == "completion"}

    def _source(self, name: str) -> dict[str, Any]:
        stages = map(as_object, as_list(self.view.stream.get("stages")))
        own = next((stage for stage in stages if stage.get("name") == name), None)
        general = as_object(as_object(self.view.stream.get("evaluation")).get("general"))
        return as_object(general.get(name) if own is None else own.get("test"))


class _NotHere(Exception):
    """Rows that lie elsewhere."""


def _origin(source: Mapping[str, Any], data_root: Any) -> dict[str, Any]:
    """Arguments of read_rows for rows that lie here; raises _NotHere for those of the Hub, or of a large file."""
    from eval_harness.sources import find_task, local_file

    root = Path(str(data_root)) if data_root else None
    split = str(source.get("split") or "train")
    if rows := as_list(source.get("rows")):
        return {"rows": rows}
    if source.get("file"):
        file = Path(str(source["file"]).replace("{split}", split))
        return {"file": _small(file if file.is_absolute() or root is None else root / file)}
    if task := source.get("task"):
        known = find_task(str(task))
        if known is None:
            return {"task": str(task), "split": split}
        if root is not None and (found := local_file(root, known.file or str(task).partition("/")[2], split)):
            _small(found)
            return {"task": str(task), "split": split, "data": root}
    where = source.get("hub") or source.get("task")
    raise _NotHere(f"{where} lies on the Hub" if where else "the stream does not name their source")


def _small(file: Path) -> Path:
    if file.is_file() and file.stat().st_size > LARGEST:
        raise _NotHere(f"{file.name} is larger than {LARGEST >> 20} MB")
    return file


def _asked(row: Any) -> str:
    asked = row.prompt if row.prompt is not None else "\n".join(f"{m['role']}: {m['content']}" for m in row.messages)
    return str(asked)
