"""Measures on sets of rows: every sequence of every set is scored in one sorted run over the model.

    exact_match       share of rows whose whole answer, end token included, is what the model writes greedily
    choice_accuracy   share of rows whose right choice has the highest log-likelihood of all choices
    answer_loss       nats per answer token, end tokens included, mean over rows
    bits_per_byte     bits the model needs for a byte of text
    lost_bytes_share  share of the text's bytes that the tokenizer loses

`exact_match` is computed in the pass that `answer_loss` needs anyway: greedy decoding writes an answer if
and only if each of its tokens is the arg max given those before it. `EvalSet.exact_match = "generate"`
decodes instead; a test holds the two equal.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from eval_harness import prompts, results
from eval_harness.prompts import Encoded, PromptError, Style
from eval_harness.results import Result
from eval_harness.rows import Row

if TYPE_CHECKING:  # scoring needs torch; a plan can be checked without
    from eval_harness.scoring import Progress, Score, ShouldStop
    from eval_harness.sharding import Shard

DEFAULT_WINDOW = 2048  # tokens of a text window where the config names no context length
TOO_LONG = "longer_than_context"
NO_TARGET = "no_target_token"


class MeasureError(ValueError):
    """A measure that does not exist or does not apply to a set's rows."""


@dataclass(slots=True)
class EvalSet:
    """Rows of one form that are measured together.

    measures      None takes what the rows' form allows, see `default_measures`
    group         "task" for a column of the stream's matrix, "general" for an ability to be kept
    exact_match   by the scoring pass, or by decoding (completion rows only)
    """

    name: str
    rows: list[Row]
    measures: tuple[str, ...] | None = None
    group: Literal["task", "general"] = "task"
    exact_match: Literal["one_pass", "generate"] = "one_pass"
    style: Style = "auto"


@dataclass(slots=True)
class Item:
    """One row, what was asked of the model for it, and what came back.

    answers           the row's choices in their order, or its one answer, or the windows of a text
    scores            of the same length; None where the sequence did not fit in the context
    generated         the new ids, where exact match is decoded
    surviving_bytes   of a text, after decode(encode(text))
    """

    row: Row
    answers: list[Encoded]
    scores: list[Score | None] = field(default_factory=list)
    generated: list[int] | None = None
    surviving_bytes: int = 0

    @property
    def reason_excluded(self) -> str | None:
        if any(one is None for one in self.scores):
            return TOO_LONG
        return NO_TARGET if any(one.tokens == 0 for one in self.scores if one) else None


@dataclass(slots=True)
class Measured:
    """A set with all its items scored: what a measure's function sees."""

    eval_set: EvalSet
    items: list[Item]
    style: str  # "plain" or "chat:1f3a9c"
    window: int

    def kept(self) -> tuple[list[Item], Counter[str]]:
        """Items that could be scored, and how many could not, by reason."""
        excluded: Counter[str] = Counter(item.reason_excluded for item in self.items if item.reason_excluded)
        return [item for item in self.items if item.reason_excluded is None], excluded


@dataclass(frozen=True, slots=True)
class Measure:
    """A registered measure: its function, its direction, and the rows it applies to."""

    function: Callable[[Measured], Result]
    higher_is_better: bool
    kinds: frozenset[str]
    needs_choices: bool = False


def measure(
    model: Any,
    tokenizer: Any,
    sets: Sequence[EvalSet],
    *,
    batch_tokens: int = 8192,
    should_stop: ShouldStop | None = None,
    progress: Progress | None = None,
    shard: Shard | None = None,
) -> dict[str, dict[str, Result]]:
    """Measure a model on sets of rows.

    Args:
        batch_tokens: tokens of a batch, padding counted; changes no value beyond rounding.
        should_stop: asked between batches.
        progress: called with (sequences done, sequences in all).
        shard: this process among several that measure the same model on the same sets: every sequence is scored
            by one of them, and all return the same. A stop or an error of one ends the measurement on all.

    Returns:
        set name -> measure -> Result.

    Raises:
        MeasureError: two sets of one name, an empty set, an unknown measure, one that does not apply.
        PromptError: a row that the tokenizer cannot render.
        ScoringError: the model's logits are NaN.
        Interrupted: should_stop said so.
    """
    from eval_harness.scoring import context_length, score

    wanted = check(sets)
    window = context_length(model) or DEFAULT_WINDOW
    measured = [_encode(tokenizer, one, window) for one in sets]
    items = [item for one in measured for item in one.items]
    scores = iter(
        score(
            model,
            [encoded for item in items for encoded in item.answers],
            batch_tokens=batch_tokens,
            should_stop=should_stop,
            progress=progress,
            shard=shard,
        )
    )
    for item in items:
        item.scores = [next(scores) for _ in item.answers]
    for one in measured:
        if one.eval_set.exact_match == "generate" and "exact_match" in wanted[one.eval_set.name]:
            _decode(model, tokenizer, one, batch_tokens, should_stop, shard)
    return {
        one.eval_set.name: {name: MEASURES[name].function(one) for name in wanted[one.eval_set.name]}
        for one in measured
    }


def check(sets: Sequence[EvalSet]) -> dict[str, tuple[str, ...]]:
    """The measures of every set; needs no model, so that a bad plan fails before one is loaded.

    Raises:
        MeasureError: all problems, one a line.
    """
    problems = [f"set {name!r}: given {n} times" for name, n in Counter(one.name for one in sets).items() if n > 1]
    for one in sets:
        problems += _problems(one)
    if problems:
        raise MeasureError("\n".join(problems))
    return {one.name: one.measures or default_measures(one.rows) for one in sets}


def default_measures(rows: Sequence[Row]) -> tuple[str, ...]:
    """By form: text, rows that all have choices, every other completion or conversation."""
    if all(row.kind == "text" for row in rows):
        return ("bits_per_byte",)
    if all(row.choices for row in rows):
        return ("choice_accuracy", "exact_match", "answer_loss")
    return ("exact_match", "answer_loss")


def exact_match(measured: Measured) -> Result:
    """Share of rows whose answer tokens and first end token are all the arg max."""
    items, excluded = measured.kept()
    how = measured.eval_set.exact_match
    return results.from_items(
        ((item.row.id, float(_is_exact(item))) for item in items),
        definition=f"exact_match@1({how},{measured.style})",
        higher_is_better=True,
        excluded=excluded,
    )


def choice_accuracy(measured: Measured) -> Result:
    """Share of rows whose right choice has the highest summed log-likelihood.

    Sums, not means per token; the end tokens are left out, so that a template's tail weighs nothing. A tie
    goes to the choice that the row lists first.
    """
    items, excluded = measured.kept()
    chance = math.fsum(1 / len(item.row.choices) for item in items) / len(items) if items else math.nan
    return results.from_items(
        ((item.row.id, float(_chosen(item) == item.row.completion)) for item in items),
        definition=f"choice_accuracy@1(sum,no_end,{measured.style})",
        higher_is_better=True,
        excluded=excluded,
        note=f"chance level {chance:.4g}",
    )


def answer_loss(measured: Measured) -> Result:
    """Nats per answer token (end tokens included) of each row, averaged over rows."""
    items, excluded = measured.kept()
    pairs = [(item.row.id, _answer(item)) for item in items]
    return results.from_items(
        ((name, -answer.log_prob / answer.tokens) for name, answer in pairs),
        definition=f"answer_loss@1(nats_per_token,with_end,{measured.style})",
        higher_is_better=False,
        excluded=excluded,
    )


def bits_per_byte(measured: Measured) -> Result:
    """Bits of all tokens over the bytes that survive tokenisation, over the whole set.

    Windows of the model's context; each starts with the last token of the one before (the first with bos,
    else eos), so every token is predicted once. The end of a text is not predicted. The standard error is
    that of a ratio of sums: sqrt(n / (n - 1) * sum (bits_i - r bytes_i)^2) / sum bytes.
    """
    items, excluded = measured.kept()
    survivors = [item for item in items if item.surviving_bytes]
    excluded["no_byte_survives"] += len(items) - len(survivors)
    pairs = [(item.row.id, _bits(item), float(item.surviving_bytes)) for item in survivors]
    lost = lost_bytes_share(measured).value
    note = None if not lost else f"the tokenizer loses {lost:.2%} of the text's bytes; they are not counted"
    return _ratio(pairs, f"bits_per_byte@1(window={measured.window},surviving_bytes)", excluded, note)


def lost_bytes_share(measured: Measured) -> Result:
    """Share of the text's bytes that are gone after decode(encode(text)), over the whole set."""
    pairs = []
    for item in measured.items:
        total = len((item.row.text or "").encode())
        pairs.append((item.row.id, float(total - item.surviving_bytes), float(total)))
    return _ratio(pairs, "lost_bytes_share@1(characters_as_multiset)", Counter(), None)


_ANSWERED = frozenset({"completion", "chat"})
_TEXT = frozenset({"text"})
MEASURES: dict[str, Measure] = {
    "exact_match": Measure(exact_match, True, _ANSWERED),
    "choice_accuracy": Measure(choice_accuracy, True, frozenset({"completion"}), needs_choices=True),
    "answer_loss": Measure(answer_loss, False, _ANSWERED),
    "bits_per_byte": Measure(bits_per_byte, False, _TEXT),
    "lost_bytes_share": Measure(lost_bytes_share, False, _TEXT),
}


def surviving_bytes(text: str, decoded: str) -> int:
    """UTF-8 bytes of the characters of `text` that are still there in `decoded`, counted as multisets:
    exact where a tokenizer drops or replaces characters, which is how bytes are lost."""
    kept = Counter(text) & Counter(decoded)
    return sum(count * len(character.encode("utf-8", "surrogatepass")) for character, count in kept.items())


def _problems(one: EvalSet) -> Iterator[str]:
    if not one.rows:
        yield f"set {one.name!r}: no rows"
        return
    if {row.kind for row in one.rows} > _TEXT:
        yield f"set {one.name!r}: mixes text rows with others; make two sets"
    for name in one.measures or ():
        if name not in MEASURES:
            near = difflib.get_close_matches(name, MEASURES, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            yield f"set {one.name!r}: unknown measure {name!r}: {hint}known: {', '.join(MEASURES)}"
            continue
        unfit = next((row for row in one.rows if not _applies(MEASURES[name], row)), None)
        if unfit is not None:
            yield f"set {one.name!r}: {name} does not apply to {_form(unfit)} (row {unfit.id})"
    decodes = one.exact_match == "generate"
    if decodes and "exact_match" in (one.measures or default_measures(one.rows)):
        unfit = next((row for row in one.rows if row.kind == "chat"), None)
        if unfit is not None:
            yield f"set {one.name!r}: exact_match: generate does not apply to {_form(unfit)}; use one_pass"


def _applies(one: Measure, row: Row) -> bool:
    return row.kind in one.kinds and (bool(row.choices) or not one.needs_choices)


def _form(row: Row) -> str:
    return f"{row.kind} rows" + (" without choices" if row.kind == "completion" and not row.choices else "")


def _encode(tokenizer: Any, one: EvalSet, window: int) -> Measured:
    is_text = one.rows[0].kind == "text"
    wants_choices = "choice_accuracy" in (one.measures or default_measures(one.rows))
    items = [
        _text_item(tokenizer, row, window) if is_text else _answer_item(tokenizer, row, one.style, wants_choices)
        for row in one.rows
    ]
    style = "text" if is_text else prompts.definition(tokenizer, one.style)
    return Measured(one, items, style, window)


def _answer_item(tokenizer: Any, row: Row, style: Style, wants_choices: bool) -> Item:
    if not (wants_choices and row.choices):
        return Item(row, [prompts.encode(tokenizer, row, style)])
    return Item(row, [prompts.encode(tokenizer, row, style, completion=choice) for choice in row.choices])


def _text_item(tokenizer: Any, row: Row, window: int) -> Item:
    text = row.text or ""
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise PromptError("bits_per_byte starts a text with bos or eos, and the tokenizer has neither")
    stream = [first, *ids]
    windows = [stream[at : at + window] for at in range(0, len(ids), window - 1)]
    decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    answers = [Encoded(part, [i > 0 for i in range(len(part))]) for part in windows]
    return Item(row, answers, surviving_bytes=surviving_bytes(text, decoded))


def _decode(
    model: Any,
    tokenizer: Any,
    measured: Measured,
    batch_tokens: int,
    should_stop: ShouldStop | None,
    shard: Shard | None,
) -> None:
    from eval_harness.scoring import generate

    items, _ = measured.kept()
    answers = [_own(item) for item in items]
    longest = max((len(a.input_ids) - a.start for a in answers), default=0)
    new = generate(
        model,
        tokenizer,
        [a.input_ids[: a.start] for a in answers],
        longest,
        batch_tokens=batch_tokens,
        should_stop=should_stop,
        shard=shard,
    )
    for item, ids in zip(items, new, strict=True):
        item.generated = ids


def _position(item: Item) -> int:
    """Where the row's own answer stands among the item's answers."""
    return item.row.choices.index(item.row.completion or "") if len(item.answers) > 1 else 0


def _own(item: Item) -> Encoded:
    return item.answers[_position(item)]


def _answer(item: Item) -> Score:
    found = item.scores[_position(item)]
    assert found is not None  # kept() leaves out items with a score that is None
    return found


def _is_exact(item: Item) -> bool:
    own, found = _own(item), _answer(item)
    needed = found.tokens - max(0, own.end_tokens - 1)  # of several end tokens the first: decoding stops there
    if item.generated is None:
        return found.greedy_tokens >= needed
    target = [i for i, is_target in zip(own.input_ids, own.is_target, strict=True) if is_target]
    return item.generated[:needed] == target[:needed]


def _chosen(item: Item) -> str:
    totals = [
        math.fsum(one.log_probs[: one.tokens - answer.end_tokens])
        for one, answer in zip(item.scores, item.answers, strict=True)
        if one is not None
    ]
    return item.row.choices[max(range(len(totals)), key=totals.__getitem__)]


def _bits(item: Item) -> float:
    return -math.fsum(one.log_prob for one in item.scores if one is not None) / math.log(2)


def _ratio(
    pairs: Sequence[tuple[str, float, float]], definition: str, excluded: Mapping[str, int], note: str | None
) -> Result:
    """Sum of numerators over sum of denominators; per item their own ratio."""
    per_item = results.unique_ids((name, above / below) for name, above, below in pairs)
    kept = {reason: count for reason, count in excluded.items() if count}
    if not pairs:
        return Result(None, 0, None, definition, False, {}, kept, f"no item could be measured (excluded: {kept})")
    total = math.fsum(below for _, _, below in pairs)
    value = math.fsum(above for _, above, _ in pairs) / total
    n = len(pairs)
    spread = math.fsum((above - value * below) ** 2 for _, above, below in pairs)
    stderr = math.sqrt(n / (n - 1) * spread) / total if n > 1 else None
    return Result(value, n, stderr, definition, False, per_item, kept, note)
