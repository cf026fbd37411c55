"""Rows become token rows: the same rendering that evaluation uses, cut to length, optionally packed."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from cpt.errors import DataError
from eval_harness.prompts import ChatTemplate, PromptError, encode
from eval_harness.rows import Row

IGNORED = -100


@dataclass(frozen=True)
class TokenSettings:
    """How a stage turns rows into tokens; names as in TRL's SFTConfig.

    max_length: tokens per row, None for no limit. completion_only_loss: None means yes for rows with a
    prompt. assistant_only_loss: for conversations, train on the assistant's turns only.
    """

    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    packing: bool = False
    packing_strategy: str = "bfd"
    chat_template: ChatTemplate = "auto"


@dataclass(frozen=True)
class TokenRows:
    """Token rows of one source as an arrow-backed dataset: input_ids, labels (and seq_lengths when packed).

    counts: what happened on the way: rows, dropped_without_target, truncated, packed_rows, lost_characters.
    ids: of the rows that were encoded, in the dataset's order; a packed row holds several.
    """

    dataset: datasets.Dataset
    counts: dict[str, int] = field(default_factory=dict)
    ids: tuple[str, ...] = ()

    def lengths(self) -> Any:
        """(rows,) tokens of every row, as numpy has it."""
        import pyarrow.compute as pc

        return np.asarray(pc.list_value_length(self.dataset.with_format("arrow")[:]["input_ids"]))


def joined(parts: Sequence[TokenRows]) -> TokenRows:
    """Several token rows as one source, their counts added."""
    counts = sum((Counter(part.counts) for part in parts), Counter[str]())
    ids = tuple(one for part in parts for one in part.ids)
    return TokenRows(datasets.concatenate_datasets([part.dataset for part in parts]), dict(counts), ids)


def tokenise(rows: Iterable[Row], tokenizer: Any, settings: TokenSettings, place: str) -> TokenRows:
    """Encode rows and mask what is not learned with -100.

    Rows that keep no learned token after the cut are dropped and counted; when nothing is left, or a row
    cannot be rendered, DataError names the place and the next step.
    """
    ids, labels, kept_ids, counts = [], [], list[str](), Counter[str]()
    for row in rows:
        counts["rows"] += 1
        try:
            row_ids, learned = _encoded(row, tokenizer, settings)
        except PromptError as error:
            raise DataError(f"{place}: {error}") from error
        counts["lost_characters"] += _lost(row, tokenizer)
        kept = _cut(len(row_ids), settings)
        counts["truncated"] += kept != slice(0, len(row_ids))
        row_ids, learned = row_ids[kept], learned[kept]
        # The first position has no prediction: a row whose only target stands there teaches nothing.
        if not any(learned[1:]):
            counts["dropped_without_target"] += 1
            continue
        ids.append(np.asarray(row_ids, dtype=np.int32))
        labels.append(np.where(learned, ids[-1], IGNORED).astype(np.int32))
        kept_ids.append(row.id)
    if not ids:
        raise DataError(
            f"{place}: none of {counts['rows']} rows keeps an answer token within max_length "
            f"{settings.max_length}. Raise training.max_length, or shorten the prompts."
        )
    dataset = datasets.Dataset(pa.table({"input_ids": _lists(ids), "labels": _lists(labels)}))
    if settings.packing:
        dataset = _packed(dataset, settings, place)
        counts["packed_rows"] = len(dataset)
    return TokenRows(dataset, dict(counts), tuple(kept_ids))


def check_rendering(rows: Iterable[Row], tokenizer: Any, settings: TokenSettings, place: str) -> None:
    """Render the first row of each form: raises DataError long before the stage that trains on them begins."""
    first: dict[tuple[str, bool], Row] = {}
    for row in rows:
        first.setdefault((row.kind, row.prompt is None), row)
    for row in first.values():
        try:
            _encoded(row, tokenizer, settings)
        except PromptError as error:
            raise DataError(f"{place}: {error}") from error


def _encoded(row: Row, tokenizer: Any, settings: TokenSettings) -> tuple[list[int], list[bool]]:
    whole = settings.completion_only_loss is False if row.kind == "completion" else not settings.assistant_only_loss
    if row.kind == "chat" and whole:
        if tokenizer.chat_template is None:
            raise PromptError("the tokenizer has no chat template; set `tokenizer.chat_template` to a Jinja file")
        ids = tokenizer.apply_chat_template(list(row.messages), tokenize=True, return_dict=True)["input_ids"]
        return list(ids), [True] * len(ids)
    encoded = encode(tokenizer, row, settings.chat_template)
    return encoded.input_ids, [True] * len(encoded.input_ids) if whole else encoded.is_target


def _cut(length: int, settings: TokenSettings) -> slice:
    if settings.max_length is None or length <= settings.max_length:
        return slice(0, length)
    if settings.truncation_mode == "keep_end":
        return slice(length - settings.max_length, length)
    return slice(0, settings.max_length)


def _lost(row: Row, tokenizer: Any) -> int:
    """Characters that do not survive the tokenizer, white space aside."""
    text = row.text or " ".join([row.prompt or "", *(m["content"] for m in row.messages or ()), row.completion or ""])
    back = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
    missing = Counter("".join(text.split())) - Counter("".join(back.split()))
    return missing.total()


def _lists(rows: list[np.ndarray]) -> pa.ListArray:
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows)))


def _packed(dataset: datasets.Dataset, settings: TokenSettings, place: str) -> datasets.Dataset:
    """TRL's own packing, one source at a time, so that no packed row mixes origins."""
    from trl.data_utils import pack_dataset

    if settings.max_length is None:
        raise DataError(f"{place}: packing needs training.max_length, the length of a packed row")
    packed = pack_dataset(dataset, settings.max_length, settings.packing_strategy)
    if "seq_lengths" not in packed.column_names:  # "wrapped" cuts rows anywhere: one sequence per packed row
        packed = packed.add_column("seq_lengths", [[len(ids)] for ids in packed["input_ids"]])
    return packed
