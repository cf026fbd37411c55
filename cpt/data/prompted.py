"""Rows of a stage that learns from what the model writes: prompts as the evaluation renders them, and what goes along.

A rewarded stage's rows bring what rewards compare with, a self-distilled one's the prompt with its demonstration.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import datasets

from cpt.data.tokens import TokenRows
from cpt.errors import DataError
from eval_harness.prompts import ChatTemplate, PromptError, prompt_ids
from eval_harness.rows import Row


def prompted(
    rows: Iterable[Row], tokenizer: Any, chat_template: ChatTemplate, room: int | None, place: str
) -> TokenRows:
    """Encode prompts, once, to the very ids that the evaluation generates from.

    The dataset's columns: input_ids (the prompt), prompt (text, or messages for every row as soon as one row is a
    conversation), answer, choices. Prompts longer than `room` tokens are dropped and counted. Raises DataError when
    a row cannot be rendered or none is left.
    """
    kept, counts = [], Counter[str]()
    rows = list(rows)
    as_messages = any(row.kind == "chat" or row.prompt is None for row in rows)
    for row in rows:
        counts["rows"] += 1
        try:
            ids = prompt_ids(tokenizer, row, chat_template)
        except PromptError as error:
            raise DataError(f"{place}: {error}") from error
        if room is not None and len(ids) > room:
            counts["dropped_too_long"] += 1
            continue
        prompt, answer = _parts(row)
        if as_messages and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        kept.append({"input_ids": ids, "prompt": prompt, "answer": answer, "choices": list(row.choices)})
    if not kept:
        raise DataError(
            f"{place}: none of {counts['rows']} prompts leaves room for a completion in the model's context "
            f"({room} tokens for the prompt). Lower training.max_completion_length, or shorten the prompts."
        )
    return TokenRows(datasets.Dataset.from_list(kept), dict(counts))


def demonstrated(
    rows: Iterable[Row], tokenizer: Any, chat_template: ChatTemplate, room: int | None, template: str, place: str
) -> TokenRows:
    """Encode each prompt alone and with its reference answer shown, both as the evaluation renders prompts.

    template: what a teacher is asked, with {prompt} and {privileged_context} in their places; of a conversation it
    takes the place of the last user's message. The dataset's columns: input_ids and prompt (the student's ids),
    privileged_context (the teacher's). Rows of which one is longer than `room` tokens are dropped and counted.
    Raises DataError as `prompted`, and for a conversation whose last turn before the answer is not a user's.
    """
    kept, counts = [], Counter[str]()
    for row in rows:
        counts["rows"] += 1
        try:
            ids = prompt_ids(tokenizer, row, chat_template)
            shown = prompt_ids(tokenizer, _shown(row, template, place), chat_template)
        except PromptError as error:
            raise DataError(f"{place}: {error}") from error
        if room is not None and max(len(ids), len(shown)) > room:
            counts["dropped_too_long"] += 1
            continue
        kept.append({"input_ids": ids, "prompt": ids, "privileged_context": shown})
    if not kept:
        raise DataError(
            f"{place}: none of {counts['rows']} prompts leaves room for its demonstration and a completion in the "
            f"model's context ({room} tokens for both). Lower training.max_completion_length, or shorten the rows."
        )
    return TokenRows(datasets.Dataset.from_list(kept), dict(counts))


def _shown(row: Row, template: str, place: str) -> Row:
    """The row's prompt with its answer put into it."""
    prompt, answer = _parts(row)
    if isinstance(prompt, str):
        return Row("completion", prompt=_filled(template, prompt, answer), id=row.id)
    *before, last = prompt
    if last["role"] != "user":
        raise DataError(
            f"{place}: row {row.id}: the turn before the answer is {last['role']!r}: a demonstration goes to a user's"
        )
    asked = {"role": "user", "content": _filled(template, last["content"], answer)}
    return Row("completion", messages=(*before, asked), id=row.id)


def _filled(template: str, prompt: str, answer: str) -> str:
    values = {"prompt": prompt, "privileged_context": answer}
    return re.sub(r"\{(prompt|privileged_context)\}", lambda field: values[field[1]], template)


def _parts(row: Row) -> tuple[Any, str]:
    """The prompt, a string or messages, and the reference answer."""
    if row.kind == "chat":
        last = max(i for i, message in enumerate(row.messages) if message["role"] == "assistant")
        return list(row.messages[:last]), row.messages[last]["content"]
    return (row.prompt if row.prompt is not None else list(row.messages)), row.completion or ""
