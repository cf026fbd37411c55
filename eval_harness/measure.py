"""Measures on sets of rows: every sequence of every set is scored in one sorted run over the model.

What is asked of the model follows from the measures; what was asked of the same weights before comes from the cache,
row by row. `eval_harness.measures` lists the measures, docs/measures.md explains them.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from eval_harness import measures, prompts
from eval_harness.cache import VERSION, Cache, digest, tokenizer_digest, versions
from eval_harness.items import NO_TARGET, TOO_LONG, Answer, Ask, EvalSet, Item, Measured, Record
from eval_harness.measures import MEASURES
from eval_harness.measures.texts import surviving_bytes
from eval_harness.prompts import Encoded, PromptError
from eval_harness.results import Result
from eval_harness.rows import Row
from eval_harness.suggest import did_you_mean

if TYPE_CHECKING:  # scoring needs torch; a plan can be checked without
    from eval_harness.scoring import Progress, Score, ShouldStop
    from eval_harness.sharding import Shard

__all__ = ["MEASURES", "EvalSet", "MeasureError", "Measured", "check", "default_measures", "measure", "set_definition"]

SCORED_AT_ONCE = 4096  # rows between two writes of the cache; within them batches are sorted by length
WRITTEN_AT_ONCE = 256
DEFAULT_WINDOW = 2048  # tokens of a text window where the config names no context length


class MeasureError(ValueError):
    """A measure that does not exist or does not apply to a set's rows."""


def measure(
    model: Any,
    tokenizer: Any,
    sets: Sequence[EvalSet],
    *,
    batch_tokens: int | None = None,
    should_stop: ShouldStop | None = None,
    progress: Progress | None = None,
    shard: Shard | None = None,
    cache: Cache | None = None,
    identity: str | None = None,
    asking: Callable[[set[str]], None] | None = None,
) -> dict[str, dict[str, Result]]:
    """Measure a model on sets of rows.

    Args:
        model: a causal language model, or a function that loads it, called only if something must be scored.
        batch_tokens: tokens of a batch, padding counted; changes no value beyond rounding. None is what fits.
        should_stop: asked between batches.
        progress: called with (rows asked so far, rows to ask in all); what the cache knows is not asked.
        shard: this process among several that measure the same model on the same sets: every sequence is scored
            by one of them, and all return the same. A stop or an error of one ends the measurement on all.
        cache: where records are looked up and kept; the first process reads and writes it.
        identity: everything that decides what the model computes (hash of its weights, dtype, attention kernel,
            quantization; see `model_identity`). Without it nothing is cached.
        asking: told which sets have rows that the cache does not know, before the model is opened; not called if
            there are none.

    Returns:
        set name -> measure -> Result.

    Raises:
        MeasureError: two sets of one name, an empty set, an unknown measure, one that does not apply; a reasoning
            pattern that takes too long.
        PromptError: a row that the tokenizer cannot render.
        ScoringError: the model's logits are NaN.
        Interrupted: should_stop said so.
        CacheError: the cache is damaged.
    """
    wanted = check(sets)
    plans = [_Plan.of(one, wanted[one.name], tokenizer) for one in sets]
    items = [[Item(row) for row in one.rows] for one in sets]
    memory = _Memory(cache, identity, tokenizer, shard)
    todo = memory.recall(plans, items)
    if todo:
        if asking is not None:
            asking({one.plan.eval_set.name for one in todo})
        asked = _Asking(_opened(model), tokenizer, batch_tokens, should_stop, progress, shard)
        for answered in asked.answer(todo):
            memory.keep(answered)
    found = {}
    for plan, part in zip(plans, items, strict=True):
        measured = Measured(plan.eval_set, part, plan.prompting)
        found[plan.eval_set.name] = {name: MEASURES[name].function(measured) for name in wanted[plan.eval_set.name]}
    return found


class Prepared:
    """Sets encoded once, to be measured on one model again and again while it trains.

    Only what one scoring pass answers: nothing is written.
    """

    def __init__(self, tokenizer: Any, sets: Sequence[EvalSet], window: int | None = None):
        """window: tokens of the model's context (`eval_harness.scoring.context_length`).

        Raises:
            MeasureError: as `measure`, and for a measure that reads what the model writes.
            PromptError: a row that the tokenizer cannot render.
        """
        self.measures = check(sets)
        self.plans = [_Plan.of(one, self.measures[one.name], tokenizer) for one in sets]
        writing = [plan.eval_set.name for plan in self.plans if "generation" in plan.asks]
        if writing:
            raise MeasureError(f"{', '.join(writing)}: answers that must be written cannot be prepared")
        asking = _Asking(None, tokenizer, None, None, None, None)
        self.window = window or DEFAULT_WINDOW
        items = [(plan, Item(row)) for plan in self.plans for row in plan.eval_set.rows]
        self.asked = [_Todo(plan, item, ask, "") for plan, item in items for ask in plan.asks]
        self.encoded = [asking.encoded(one, self.window) for one in self.asked]
        self.surviving = [asking.surviving(one.item.row) if one.ask == "text" else 0 for one in self.asked]

    @property
    def tokens(self) -> int:
        """Tokens that a measurement reads, prefixes counted once for each of their answers."""
        return sum(len(sequence.input_ids) for part in self.encoded for sequence in part)

    def measure(
        self, model: Any, *, batch_tokens: int | None = None, shard: Shard | None = None
    ) -> dict[str, dict[str, Result]]:
        """As `measure`, without a cache: set name -> measure -> Result. Raises ScoringError."""
        from eval_harness.scoring import score

        for statistics in (False, True):
            part = [i for i, one in enumerate(self.asked) if one.plan.statistics is statistics]
            sequences = [sequence for i in part for sequence in self.encoded[i]]
            scores = iter(score(model, sequences, statistics=statistics, batch_tokens=batch_tokens, shard=shard))
            for i in part:
                record = _record(self.encoded[i], [next(scores) for _ in self.encoded[i]])
                record.window, record.surviving_bytes = self.window, self.surviving[i]
                self.asked[i].item.records[self.asked[i].ask] = record
        found = {}
        for plan in self.plans:
            items = list({id(one.item): one.item for one in self.asked if one.plan is plan}.values())
            measured = Measured(plan.eval_set, items, plan.prompting)
            found[plan.eval_set.name] = {
                name: MEASURES[name].function(measured) for name in self.measures[plan.eval_set.name]
            }
        return found


def model_identity(weights: str, **settings: Any) -> str:
    """One string for `identity`: the hash of the weights and what else decides their outputs, by name."""
    return digest(weights, {name: str(value) for name, value in settings.items()})


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
        return ("acc", "exact_match", "answer_loss")
    return ("exact_match", "answer_loss")


def set_definition(one: EvalSet, tokenizer: Any) -> str:
    """Digest of everything that decides what a set measures but the model: rows, measures, prompting, generation."""
    names = one.measures or default_measures(one.rows)
    shots = draw_shots(one)
    rows = [[row.id, row.separator] for row in one.rows]
    how = [one.exact_match, one.generation.definition(), one.generation.stop, one.prompting.strip_reasoning, one.group]
    meaning = [VERSION, measures.VERSION]
    return digest(rows, names, how, _prompt_key(one, shots, tokenizer), tokenizer_digest(tokenizer), meaning)


def draw_shots(one: EvalSet) -> list[Row]:
    """The solved rows put before every row of the set: seeded, none of them a row of the set itself.

    Raises:
        MeasureError: fewer rows to draw from than shots.
    """
    wanted = one.prompting.num_fewshot
    if not wanted:
        return []
    own = {row.id for row in one.rows}
    pool = [row for row in one.fewshot if row.id not in own and row.kind == "completion"]
    if len(pool) < wanted:
        raise MeasureError(
            f"set {one.name!r}: num_fewshot = {wanted}: only {len(pool)} completion rows to draw shots from that are "
            "not rows of the set; name their split or file"
        )
    return random.Random(one.prompting.fewshot_seed).sample(pool, wanted)


@dataclass(slots=True)
class _Plan:
    """A set with what its measures ask of the model; exact: what is written is compared with the answers, id by id."""

    eval_set: EvalSet
    asks: tuple[Ask, ...]
    statistics: bool
    exact: bool
    shots: list[Row]
    prompting: str
    prompt_key: Any

    @classmethod
    def of(cls, one: EvalSet, names: Sequence[str], tokenizer: Any) -> _Plan:
        asks = list(dict.fromkeys(ask for name in names for ask in MEASURES[name].asked_of(one)))
        if "choices" in asks and "answer" in asks:  # the own answer is one of them
            asks.remove("answer")
        shots = draw_shots(one)
        is_text = one.rows[0].kind == "text"
        prompting = "text" if is_text else one.prompting.definition(tokenizer, shots)
        statistics = any(MEASURES[name].statistics for name in names)
        exact = one.exact_match == "generate" and "exact_match" in names
        return cls(one, tuple(asks), statistics, exact, shots, prompting, _prompt_key(one, shots, tokenizer))

    def key(self, row: Row, ask: Ask) -> Any:
        """What decides the record of an ask about a row, beside model and tokenizer."""
        if ask == "text":
            return [ask, row.text, self.statistics]
        asked = [row.kind, row.prompt, row.messages, row.separator, self.prompt_key]
        if ask == "generation":
            how = self.eval_set.generation
            settings = [how.definition(), list(how.stop), self.eval_set.prompting.strip_reasoning]
            return [ask, asked, texts_of(row, ask) if self.exact else None, settings]
        right = row.completion if ask == "choices" else None  # the one choice that is scored with its end
        return [ask, asked, texts_of(row, ask), right, self.statistics]


def texts_of(row: Row, ask: Ask) -> tuple[str | None, ...]:
    """What an ask scores after the row's prompt, or compares what is written with; None is a conversation's own."""
    if ask == "generation":
        return (row.completion, *row.references)
    if ask == "references":
        return row.references
    if ask == "choices":
        return row.choices
    if ask == "paraphrase":
        return () if row.paraphrase is None else (row.paraphrase,)
    if ask == "perturbed":
        return row.perturbed
    return (row.completion,)


def _prompt_key(one: EvalSet, shots: Sequence[Row], tokenizer: Any) -> Any:
    style = prompts.resolve(tokenizer, one.prompting.chat_template)
    solved = [[shot.prompt, shot.messages, shot.separator, shot.completion] for shot in shots]
    return digest(style, one.prompting.system, solved)


@dataclass(slots=True)
class _Todo:
    """One ask about one item that nobody has answered yet."""

    plan: _Plan
    item: Item
    ask: Ask
    key: str


class _Memory:
    """Records of earlier measurements of the same model; without cache and identity it remembers nothing."""

    def __init__(self, cache: Cache | None, identity: str | None, tokenizer: Any, shard: Shard | None):
        self.cache = cache if identity is not None and (shard is None or shard.rank == 0) else None
        self.used = cache is not None and identity is not None
        self.about = [identity, tokenizer_digest(tokenizer), versions(), VERSION] if self.used else []
        self.shard = shard

    def recall(self, plans: Sequence[_Plan], items: Sequence[Sequence[Item]]) -> list[_Todo]:
        """Give the items the records that are known; what is left to ask."""
        about = digest(*self.about)
        todo = [
            _Todo(plan, item, ask, digest(about, plan.key(item.row, ask)) if self.used else "")
            for plan, part in zip(plans, items, strict=True)
            for item in part
            for ask in plan.asks
        ]
        known = self._known([one.key for one in todo])
        left = []
        for one in todo:
            if one.key in known:
                one.item.records[one.ask] = Record.from_json(known[one.key])
            else:
                left.append(one)
        return left

    def keep(self, answered: Sequence[_Todo]) -> None:
        if self.cache is not None:
            self.cache.put({one.key: one.item.records[one.ask].to_json() for one in answered})

    def _known(self, keys: Sequence[str]) -> dict[str, Any]:
        if not self.used:
            return {}
        found = {} if self.cache is None else self.cache.get(keys)
        return found if self.shard is None else self.shard.gather(found)[0]


@dataclass(slots=True)
class _Asking:
    """A model that is asked: scoring passes first, then what must be written."""

    model: Any
    tokenizer: Any
    batch_tokens: int | None
    should_stop: ShouldStop | None
    progress: Progress | None
    shard: Shard | None
    _before: tuple[int, int, int] = (0, 0, 0)  # rows before the present part, its size, all

    def answer(self, todo: Sequence[_Todo]) -> Iterator[Sequence[_Todo]]:
        """Fill in the records, part by part: a stop loses one part's work."""
        done = 0
        for part in _parts(todo):
            self._before = done, len(part), len(todo)
            if part[0].ask == "generation":
                self._write(part)
            else:
                self._score(part)
            done += len(part)
            yield part

    def _progress(self, done: int, total: int, before: int = 0, of: int | None = None) -> None:
        """Sequences of the present part, told as rows asked of all; `before` of them, `of` all, were done in a call
        of their own."""
        if self.progress is not None:
            rows, size, all_of_them = self._before
            self.progress(rows + size * (before + done) // (of or total), all_of_them)

    def _score(self, todo: Sequence[_Todo]) -> None:
        from eval_harness.scoring import context_length, score

        window = context_length(self.model) or DEFAULT_WINDOW
        encoded = [self.encoded(one, window) for one in todo]
        scores = iter(
            score(
                self.model,
                [sequence for part in encoded for sequence in part],
                statistics=todo[0].plan.statistics,
                batch_tokens=self.batch_tokens,
                should_stop=self.should_stop,
                progress=self._progress,
                shard=self.shard,
            )
        )
        for one, part in zip(todo, encoded, strict=True):
            record = _record(part, [next(scores) for _ in part])
            if one.ask == "text":
                record.window = window
                record.surviving_bytes = self.surviving(one.item.row)
            one.item.records[one.ask] = record

    def encoded(self, one: _Todo, window: int) -> list[Encoded]:
        if one.ask == "text":
            return self._windows(one.item.row, window)
        row, how = one.item.row, one.plan.eval_set.prompting
        if row.kind == "chat":
            return [prompts.encode(self.tokenizer, row, system=how.system)]
        texts = [text for text in texts_of(row, one.ask) if text is not None]
        shots = one.plan.shots
        encoded = prompts.encode_answers(self.tokenizer, row, texts, how.chat_template, system=how.system, shots=shots)
        if one.ask == "choices":  # what the model would write has an end, what it is only asked about has none
            encoded = [
                part if text == row.completion else part.without_end()
                for text, part in zip(texts, encoded, strict=True)
            ]
        return encoded

    def _windows(self, row: Row, window: int) -> list[Encoded]:
        first = self.tokenizer.bos_token_id
        first = first if first is not None else self.tokenizer.eos_token_id
        if first is None:
            raise PromptError("a text starts with bos or eos, and the tokenizer has neither")
        ids = self._ids(row)
        stream = [first, *ids]
        windows = [stream[at : at + window] for at in range(0, len(ids), window - 1)]
        return [Encoded(part, [i > 0 for i in range(len(part))]) for part in windows]

    def surviving(self, row: Row) -> int:
        decoded = self.tokenizer.decode(self._ids(row), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return surviving_bytes(row.text or "", decoded)

    def _ids(self, row: Row) -> list[int]:
        return list(self.tokenizer(row.text or "", add_special_tokens=False, verbose=False)["input_ids"])

    def _write(self, todo: Sequence[_Todo]) -> None:
        """Continue the prompts of sets with one way of writing; a prompt that leaves no room is a problem."""
        from eval_harness.generation import generate
        from eval_harness.scoring import context_length

        limit = context_length(self.model)
        how = todo[0].plan.eval_set.generation
        by_room: dict[int, list[tuple[_Todo, list[Encoded], list[int]]]] = {}
        for one in todo:
            right, asked = self.encoded(one, 0) if one.plan.exact else [], self._prompt(one)
            needed = how.max_new_tokens or max(len(answer.input_ids) for answer in right) - len(asked)
            if limit is not None and len(asked) + needed > limit:
                one.item.records["generation"] = Record(problem=TOO_LONG)
            else:
                room = how.max_new_tokens or _power_of_two(needed)
                by_room.setdefault(room, []).append((one, right, asked))
        done, total = 0, sum(map(len, by_room.values()))
        for room, part in sorted(by_room.items(), reverse=True):
            new = generate(
                self.model,
                self.tokenizer,
                [asked for _, _, asked in part],
                how.limited_to(room),
                batch_tokens=self.batch_tokens,
                should_stop=self.should_stop,
                progress=partial(self._progress, before=done, of=total),
                shard=self.shard,
            )
            done += len(part)
            for (one, right, asked), ids in zip(part, new, strict=True):
                exact = any(_is_written(answer, len(asked), ids) for answer in right) if right else None
                one.item.records["generation"] = Record(generated=self._text(one, ids), exact=exact)

    def _prompt(self, one: _Todo) -> list[int]:
        how = one.plan.eval_set.prompting
        return prompts.prompt_ids(
            self.tokenizer, one.item.row, how.chat_template, system=how.system, shots=one.plan.shots
        )

    def _text(self, one: _Todo, ids: list[int]) -> str:
        """What was written, without stop string and reasoning."""
        from eval_harness.metrics.text import strip_reasoning, until_stop

        pattern = one.plan.eval_set.prompting.strip_reasoning
        text = self.tokenizer.decode(ids, skip_special_tokens=pattern is None)
        text = until_stop(text, one.plan.eval_set.generation.stop)
        if pattern is not None:  # the marks of reasoning may be special tokens
            try:
                text = strip_reasoning(text, pattern)
            except TimeoutError as error:
                raise MeasureError(f"set {one.plan.eval_set.name!r}: strip_reasoning: {error}") from error
            for token in self.tokenizer.all_special_tokens:
                text = text.replace(token, "")
        return text.strip()


def _is_written(answer: Encoded, prompt: int, ids: list[int]) -> bool:
    """Whether ids written after so many of the prompt are those of an answer and its first end token: decoding stops
    there, and the rest of a template is no target."""
    target = [i for i, is_target in zip(answer.input_ids, answer.is_target, strict=True) if is_target]
    needed = target[: len(target) - max(0, answer.end_tokens - 1)]
    return answer.start == prompt and ids[: len(needed)] == needed


def _parts(todo: Sequence[_Todo]) -> Iterator[list[_Todo]]:
    """What one scoring pass or one way of writing can take together, not more than is dear to lose."""
    alike: dict[Any, list[_Todo]] = {}
    for one in todo:
        writes = one.ask == "generation"
        key = one.plan.eval_set.generation if writes else one.plan.statistics
        alike.setdefault((writes, key), []).append(one)
    for (writes, _), part in alike.items():
        size = WRITTEN_AT_ONCE if writes else SCORED_AT_ONCE
        yield from (part[at : at + size] for at in range(0, len(part), size))


def _record(encoded: Sequence[Encoded], scores: Sequence[Score | None]) -> Record:
    if any(one is None for one in scores):
        return Record(problem=TOO_LONG)
    found = [one for one in scores if one is not None]
    if any(one.tokens == 0 for one in found):
        return Record(problem=NO_TARGET)
    return Record(
        [
            Answer(one.log_probs, one.hits, part.end_tokens, one.means, one.variances)
            for part, one in zip(encoded, found, strict=True)
        ]
    )


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def _opened(model: Any) -> Any:
    return model() if isinstance(model, FunctionType | MethodType | partial) else model


def _problems(one: EvalSet) -> Iterator[str]:
    if not one.rows:
        yield f"set {one.name!r}: no rows"
        return
    if {row.kind for row in one.rows} > {"text"}:
        yield f"set {one.name!r}: mixes text rows with others; make two sets"
    names = one.measures or default_measures(one.rows)
    for name in names:
        if name not in MEASURES:
            hint = did_you_mean(name, MEASURES)
            yield f"set {one.name!r}: unknown measure {name!r}: {hint}known: {', '.join(MEASURES)}"
            continue
        unfit = next((row for row in one.rows if not _applies(name, row)), None)
        if unfit is not None:
            yield f"set {one.name!r}: {name} does not apply to {_form(name, unfit)} (row {unfit.id})"
    yield from (f"set {one.name!r}: generate.{problem}" for problem in one.generation.problems())
    yield from (f"set {one.name!r}: {problem}" for problem in one.prompting.problems())
    known = [MEASURES[name] for name in names if name in MEASURES]
    if any("generation" in measure.asks for measure in known) and one.generation.max_new_tokens is None:
        yield f"set {one.name!r}: what is written has no end: give generate.max_new_tokens, e.g. 64"
    if one.exact_match == "generate" and "exact_match" in names:
        unfit = next((row for row in one.rows if row.kind == "chat"), None)
        if unfit is not None:
            yield f"set {one.name!r}: exact_match: generate does not apply to chat rows; use one_pass"
    if one.prompting.num_fewshot:
        unfit = next((row for row in one.rows if row.kind != "completion"), None)
        if unfit is not None:
            yield f"set {one.name!r}: num_fewshot does not apply to {unfit.kind} rows"
        try:
            draw_shots(one)
        except MeasureError as error:
            yield str(error)


def _applies(name: str, row: Row) -> bool:
    return row.kind in MEASURES[name].kinds and all(getattr(row, need) for need in MEASURES[name].needs)


def _form(name: str, row: Row) -> str:
    lacking = [need for need in MEASURES[name].needs if not getattr(row, need)]
    return f"{row.kind} rows" + (f" without {' or '.join(lacking)}" if lacking and row.kind == "completion" else "")
