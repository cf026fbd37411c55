"""Rows that a stream's base draws itself: general rows for those who have none of the base's own kind.

A text is what the model writes behind its begin token. A conversation is a user's turn that the model writes behind the
head of its chat template, and its own answer (Magpie, arXiv 2406.08464). At temperature 1 a row is a fair sample of
what the base would say, so replaying it holds, on average over rows, the base's own distribution.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpt.checkpoints import write_text
from cpt.config import Stream
from cpt.errors import ConfigError, DataError
from cpt.models import base_identity, base_tokenizer, open_model
from cpt.progress import Say, counting, still
from cpt.quiet import quiet
from cpt.run_dir import digest
from cpt.signals import stop_requests
from eval_harness.errors import Interrupted, ScoringError
from eval_harness.generation import Generation, end_ids, generate
from eval_harness.metrics.text import until_stop
from eval_harness.prompts import PromptError, prompt_ids, text_start, user_turn
from eval_harness.rows import Row

PART = 64  # draws that are made again after a kill, at most
MOST = 4  # draws for every row asked for, before it is given up


@dataclass(frozen=True)
class Drawing:
    """How rows are drawn. chat: conversations of one turn, not texts; max_new_tokens: of a text, a turn, an answer."""

    rows: int
    chat: bool = False
    max_new_tokens: int = 512
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        found = [f"{name} = {getattr(self, name)}: must be at least 1" for name in ("rows", "max_new_tokens")]
        found = [problem for problem, one in zip(found, (self.rows, self.max_new_tokens), strict=True) if one < 1]
        if not 0 < self.temperature < float("inf"):
            found.append(f"temperature = {self.temperature}: must be positive: greedily every row would be the same")
        if found:
            raise ConfigError(*found)


def draw(stream: Stream, drawing: Drawing, to: Path, say: Say = print, *, force: bool = False) -> dict[str, int]:
    """Write a .jsonl of rows that the stream's base draws: `{text}`, or `{prompt, completion}` of a conversation.

    Interrupted, the same call goes on. Returns what became of the draws: `rows`, of them texts `without_end` within
    max_new_tokens, and those left out as `empty`, `cut_off` (a turn or an answer without an end) or `twice`.

    Raises ConfigError for a file that is there (unless force) or no .jsonl, DataError where the model gives too few
    rows, Stopped on SIGTERM and Ctrl-C.
    """
    if to.suffix != ".jsonl":
        raise ConfigError(f"{to}: rows are written as .jsonl; write {to.with_suffix('.jsonl')}")
    if to.exists() and not force:
        raise ConfigError(f"{to}: is there already. Name another file, or use --force.")
    try:
        tokenizer = base_tokenizer(stream)
        start = user_turn(tokenizer) if drawing.chat else (text_start(tokenizer), ())
    except PromptError as error:
        raise DataError(str(error)) from error
    aside = to.with_name(f".{to.name}.partial")
    about = {"base": digest(base_identity(stream)), **asdict(drawing)}
    try:
        made = _begun(aside, about)
    except OSError as error:
        raise ConfigError(f"{to}: cannot be written ({error.strerror}). Name another file.") from error
    rows, counts = _picked(made)
    if len(rows) < drawing.rows:
        with quiet(), stop_requests() as stop:
            model, told = open_model(None, stream.model), counting("rows", say)
            while len(rows) < drawing.rows and len(made) < MOST * drawing.rows:
                numbers = range(len(made), len(made) + PART)
                try:
                    found = list(_drawn(model, tokenizer, start, drawing, numbers, stop.here))
                except Interrupted as error:
                    raise stop.error(f"after {len(made)} draws") from error
                except (ScoringError, PromptError) as error:
                    raise DataError(f"{stream.model.path}: {error}") from error
                _append(aside, found)
                made += found
                rows, counts = _picked(made)
                if told is not None:
                    told(min(len(rows), drawing.rows), drawing.rows)
            still(say)
    if len(rows) < drawing.rows:
        why = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items() if n)
        raise DataError(
            f"{stream.model.path}: {len(made)} draws gave {len(rows)} of {drawing.rows} rows ({why}): ask for fewer, "
            "for longer ones, at another temperature" + (", or for texts" if drawing.chat else "")
        )
    rows = rows[: drawing.rows]
    write_text(to, "".join(json.dumps(one["row"], ensure_ascii=False) + "\n" for one in rows))
    aside.unlink()
    return {"rows": len(rows), "without_end": sum(not one["ended"] for one in rows), **counts}


Found = dict[str, Any]  # a draw: {"row": ..., "ended": ...}, or {"why": ...} it is none


def _begun(aside: Path, about: dict[str, Any]) -> list[Found]:
    """Draws that an interrupted call of the same settings has made; a line that was cut off is made again."""
    head = json.dumps(about, sort_keys=True)
    lines = aside.read_text(encoding="utf-8").split("\n") if aside.is_file() else []
    if not lines or lines[0] != head:
        aside.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(head + "\n", encoding="utf-8")
        return []
    whole = lines[1:-1]  # what stands behind the last line break is cut off, or nothing
    whole = whole[: len(whole) // PART * PART]
    aside.write_text("\n".join([head, *whole, ""]), encoding="utf-8")
    return [json.loads(line) for line in whole]


def _append(aside: Path, found: Sequence[Found]) -> None:
    with open(aside, "a", encoding="utf-8") as stream:
        stream.write("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in found))
        stream.flush()
        os.fsync(stream.fileno())


def _picked(made: Sequence[Found]) -> tuple[list[Found], dict[str, int]]:
    """The draws that are rows, each once, and how many were left out why."""
    rows: dict[str, Found] = {}
    counts = dict.fromkeys(("empty", "cut_off", "twice"), 0)
    for one in made:
        if (why := one.get("why")) is not None:
            counts[why] += 1
        elif (key := json.dumps(one["row"])) in rows:
            counts["twice"] += 1
        else:
            rows[key] = one
    return list(rows.values()), counts


def _drawn(
    model: Any, tokenizer: Any, start: tuple[list[int], tuple[str, ...]], drawing: Drawing, numbers: range, stop: Any
) -> Iterator[Found]:
    head, ends = start
    how = Generation(drawing.max_new_tokens, stop=ends, temperature=drawing.temperature, seed=drawing.seed)
    turns = list(_texts(model, tokenizer, [head] * len(numbers), how, numbers, stop))
    if not drawing.chat:
        yield from ({"row": {"text": text}, "ended": end} if text else {"why": "empty"} for text, end in turns)
        return
    asked = {number: text for number, (text, ended) in zip(numbers, turns, strict=True) if text and ended}
    prompts = [prompt_ids(tokenizer, Row("completion", prompt=text)) for text in asked.values()]
    how = Generation(drawing.max_new_tokens, temperature=drawing.temperature, seed=drawing.seed)
    answers = dict(zip(asked, _texts(model, tokenizer, prompts, how, list(asked), stop), strict=True))
    for number, turn in zip(numbers, turns, strict=True):
        last = answers.get(number, turn)
        if not last[1]:
            yield {"why": "cut_off"}
        elif not last[0]:
            yield {"why": "empty"}
        else:
            yield {"row": {"prompt": turn[0], "completion": last[0]}, "ended": True}


def _texts(
    model: Any, tokenizer: Any, prompts: list[list[int]], how: Generation, draws: Sequence[int], stop: Any
) -> Iterator[tuple[str, bool]]:
    """What the model writes behind each prompt, and whether it came to an end."""
    ends = set(end_ids(model, tokenizer, how.stop))
    for ids in generate(model, tokenizer, prompts, how, should_stop=stop, draws=draws):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        short = until_stop(text, how.stop)
        yield short.strip(), ids[-1] in ends or short != text
