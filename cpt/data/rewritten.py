"""Answers that a model wrote anew: how it is asked for them, and how they are kept in the run's memory."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cpt.data.memory import ABOUT, ROWS, Memory, entry, read_rows
from cpt.data.recording import as_first, launched
from cpt.data.sources import Loaded
from eval_harness.rows import Row
from eval_harness.sources import fingerprint

PART = 512  # rows that are written again after a kill, at most
FIELDS = ("question", "answer")  # of a template
ONE_TURN = (["user"], ["system", "user"])


@dataclass(frozen=True)
class Written:
    """What a model wrote, without its end; ended: False where it was cut off."""

    text: str
    ended: bool


# What a model writes for parts of rows, part by part, the same on every process; None where a prompt leaves no room.
Generate = Callable[[Sequence[Sequence[Row]]], Iterator[list[Written | None]]]
# The rows to keep of those asked, and what to say of them; asked of the first process alone.
Decide = Callable[[list[Written | None]], tuple[list[Row], dict[str, Any]]]


def turn(row: Row) -> tuple[str, str] | None:
    """Question and answer of a row; None for plain text and for a conversation of several turns."""
    if row.kind == "completion" and row.prompt is not None:
        return row.prompt, row.completion or ""
    messages = list(row.messages)
    answer = row.completion or ""
    if row.kind == "chat" and messages[-1]["role"] == "assistant":
        answer = messages.pop()["content"]
    one = [message["role"] for message in messages] in ONE_TURN
    return (messages[-1]["content"], answer) if one else None


def asked(row: Row, template: str) -> Row:
    """The row that a model is asked to get this row's answer anew; a system message stays."""
    found = turn(row)
    assert found is not None
    values = dict(zip(FIELDS, found, strict=True))
    text = re.sub(r"\{(question|answer)\}", lambda field: values[field[1]], template)
    if row.prompt is not None:
        return Row("completion", prompt=text, id=row.id)
    system = [message for message in row.messages if message["role"] == "system"]
    return Row("completion", messages=(*system, {"role": "user", "content": text}), id=row.id)


def answered(row: Row, text: str) -> Row:
    """The row with another answer behind the white space of its own, known by its id: it is forgotten by that too."""
    _, old = turn(row) or ("", "")
    text = old[: len(old) - len(old.lstrip())] + text.strip()
    if row.kind == "chat":
        return replace(row, messages=(*row.messages[:-1], {"role": "assistant", "content": text}))
    return replace(row, completion=text)


def chosen(
    rows: Sequence[Row], found: Sequence[Written | None], markers: Sequence[str], agrees: Callable[[Row, str], bool]
) -> tuple[list[Row], dict[str, Any]]:
    """The rows with the answers written for them, and how many stay as they were for which reason.

    markers: whoever says one that the reference does not refuses. agrees: whether a row's reference says the same.
    """
    kept, stay = [], Counter[str]()
    for row, new in zip(rows, found, strict=True):
        if new is not None and (why := _why_not(row, new, markers, agrees)) is None:
            kept.append(answered(row, new.text))
        else:
            stay["too_long" if new is None else str(why)] += 1
    told = "".join(f", {count:,} {name.replace('_', ' ')}" for name, count in sorted(stay.items()))
    note = f"{len(kept):,} of {len(rows):,} answers written anew{told}"
    return kept, {"asked": len(rows), "rewritten": len(kept), "stay": dict(sorted(stay.items())), "note": note}


def _why_not(row: Row, new: Written, markers: Sequence[str], agrees: Callable[[Row, str], bool]) -> str | None:
    if not new.ended:
        return "cut_off"
    if not (text := new.text.strip()):
        return "empty"
    low, reference = text.casefold(), (turn(row) or ("", ""))[1].casefold()
    if any(one.casefold() in low and one.casefold() not in reference for one in markers):
        return "refused"
    return None if agrees(row, text) else "wrong"


def rewritten(
    memory: Path, name: str, about: dict[str, Any], loaded: Loaded, asking: list[Row], make: Generate, decide: Decide
) -> tuple[dict[str, Row], dict[str, Any]]:
    """Rows by id that were written anew, and what `decide` said of them; made once, then read.

    about: what decides the content, JSON. loaded: where the rows are from. asking: the prompts. A stop or a kill loses
    the part that is being written. Every process calls it, and all of them make or none.
    """
    folder, where = entry(memory, name, about), launched()
    if not as_first((folder / ABOUT).is_file()):
        is_main = where.get("rank", 0) == 0
        found = _written(folder / "parts", asking, make, is_main)
        if is_main:
            rows, said = decide(found)
            shutil.rmtree(folder / "parts", ignore_errors=True)  # first: a finished entry holds these rows alone
            kept = replace(loaded, rows=rows, fingerprint=fingerprint(rows))
            Memory(memory).write_rows(folder, kept, about | {"said": said})
        where.get("meet", lambda: None)()
    said = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["said"]
    return {row.id: row for row in read_rows(folder / ROWS)}, said


def _written(folder: Path, asking: list[Row], make: Generate, is_main: bool) -> list[Written | None]:
    """What a model wrote for every prompt, on the first process; parts that lie in the folder are not made again."""
    parts = [asking[at : at + PART] for at in range(0, len(asking), PART)]
    files = [folder / f"{number:06d}.json" for number in range(len(parts))]
    missing = as_first([number for number, file in enumerate(files) if not file.is_file()])
    made = make([parts[number] for number in missing]) if missing else iter(())
    for found, number in zip(made, missing, strict=True):
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)
            aside = files[number].with_suffix(".partial")
            aside.write_text(json.dumps([one and asdict(one) for one in found]), encoding="utf-8")
            aside.replace(files[number])
    if not is_main:
        return []
    read = (one for file in files for one in json.loads(file.read_text(encoding="utf-8")))
    return [one and Written(**one) for one in read]
