"""Rows of a stage that is rewarded: prompts as the evaluation renders them, with what the rewards compare with."""

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


def _parts(row: Row) -> tuple[Any, str]:
    """The prompt, a string or messages, and the reference answer."""
    if row.kind == "chat":
        last = max(i for i, message in enumerate(row.messages) if message["role"] == "assistant")
        return list(row.messages[:last]), row.messages[last]["content"]
    return (row.prompt if row.prompt is not None else list(row.messages)), row.completion or ""
