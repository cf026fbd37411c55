"""A set of rows that are measured together, what a model is asked about each, and what came back.

    answer       the row's own answer, end tokens included
    references   its further right answers, where any row of the set has some
    choices      every choice of a row that has some; its own answer is one of them
    paraphrase   the answer in other words
    perturbed    wrong answers of the same form
    text         the text of a text row, in windows of the model's context
    generation   a continuation of the prompt

What a measure needs of these is kept in a Record, which is what the cache holds: what it has of a row that was asked
the same way of the same weights is not scored again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from eval_harness.generation import Generation
from eval_harness.prompts import Prompting
from eval_harness.rows import Row

Ask = Literal["answer", "references", "choices", "paraphrase", "perturbed", "text", "generation"]
TOO_LONG = "longer_than_context"
NO_TARGET = "no_target_token"


@dataclass(slots=True)
class EvalSet:
    """Rows of one form that are measured together.

    measures      None takes what the rows' form allows, see `eval_harness.measure.default_measures`
    group         "task" for a column of the stream's matrix, "general" for an ability to be kept
    exact_match   by the scoring pass, or by decoding (completion rows only)
    prompting     how rows become prompts
    generation    how continuations are written
    fewshot       rows that shots are drawn from, where `prompting.num_fewshot` asks for some
    """

    name: str
    rows: list[Row]
    measures: tuple[str, ...] | None = None
    group: Literal["task", "general"] = "task"
    exact_match: Literal["one_pass", "generate"] = "one_pass"
    prompting: Prompting = field(default_factory=Prompting)
    generation: Generation = field(default_factory=Generation)
    fewshot: list[Row] = field(default_factory=list)


@dataclass(slots=True)
class Answer:
    """One scored answer.

    log_probs    nats per token, the end tokens last
    hits         whether each is the arg max
    end_tokens   how many of the last tokens end the answer and are no part of its text
    means        of log p under p, per token, where a measure asks for statistics
    variances    the same of its variance
    """

    log_probs: list[float]
    hits: list[bool]
    end_tokens: int = 0
    means: list[float] | None = None
    variances: list[float] | None = None

    @property
    def log_prob(self) -> float:
        """Sum over all tokens, in nats."""
        return math.fsum(self.log_probs)

    @property
    def of_text(self) -> slice:
        """The tokens of the answer's text: all but the end tokens."""
        return slice(0, len(self.log_probs) - self.end_tokens)

    @property
    def text_log_prob(self) -> float:
        """Sum over the tokens of the text, in nats."""
        return math.fsum(self.log_probs[self.of_text])

    @property
    def writes_it(self) -> bool:
        """Greedy decoding writes the text and then an end token: of several end tokens the first, decoding stops."""
        return all(self.hits[: len(self.hits) - max(0, self.end_tokens - 1)])


@dataclass(slots=True)
class Record:
    """What came back of one ask about one row.

    answers           in the order asked: one answer, its further ones, the choices, the perturbed ones, or the windows
                      of a text
    problem           why it could not be scored, as counted under `excluded`; None where it could
    generated         what was written, reasoning and stop string removed
    exact             whether the ids written are those of the row's answer, or of a further right one, and its end;
                      None where nobody asked
    surviving_bytes   of a text, after decode(encode(text))
    window            tokens of a text's windows
    """

    answers: list[Answer] = field(default_factory=list)
    problem: str | None = None
    generated: str | None = None
    exact: bool | None = None
    surviving_bytes: int = 0
    window: int = 0

    def to_json(self) -> dict[str, Any]:
        """Without what is at its default."""
        return {key: value for key, value in asdict(self).items() if value != getattr(_EMPTY, key)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Record:
        """Read what `to_json` wrote; raises TypeError for other keys."""
        return cls(**{**data, "answers": [Answer(**one) for one in data.get("answers", [])]})


_EMPTY = Record()


@dataclass(slots=True)
class Item:
    """One row and the records of what was asked about it."""

    row: Row
    records: dict[Ask, Record] = field(default_factory=dict)

    def answers(self, ask: Ask) -> list[Answer]:
        return self.records[ask].answers

    @property
    def own(self) -> Answer:
        """The row's own answer: asked for itself, or one of the choices."""
        if "answer" in self.records:
            return self.answers("answer")[0]
        return self.answers("choices")[self.row.choices.index(self.row.completion or "")]

    @property
    def is_exact(self) -> bool:
        """Greedy decoding writes the answer, or a further right one that was asked about, and ends."""
        others = self.answers("references") if "references" in self.records else []
        return any(one.writes_it for one in (self.own, *others))

    @property
    def references(self) -> list[str]:
        """Every right answer, the row's own first."""
        return [self.row.completion or "", *self.row.references]

    @property
    def written(self) -> str:
        return self.records["generation"].generated or ""

    def problem(self, asks: Sequence[Ask]) -> str | None:
        """The first reason why one of the asks has no answer."""
        found = (self.records[self._held(ask)].problem for ask in asks)
        return next((reason for reason in found if reason is not None), None)

    def _held(self, ask: Ask) -> Ask:
        return "choices" if ask == "answer" and "answer" not in self.records else ask


@dataclass(slots=True)
class Measured:
    """A set with all its items asked: what a measure's function sees.

    prompting   definition of how rows became prompts, e.g. "plain" or "chat:1f3a9c,5-shot:77e02b"
    """

    eval_set: EvalSet
    items: list[Item]
    prompting: str

    def kept(self, *asks: Ask) -> tuple[list[Item], Counter[str]]:
        """Items with an answer to all of the asks, and how many have none, by reason."""
        problems = [item.problem(asks) for item in self.items]
        excluded: Counter[str] = Counter(reason for reason in problems if reason is not None)
        return [item for item, reason in zip(self.items, problems, strict=True) if reason is None], excluded

    @property
    def has_references(self) -> bool:
        """Whether any row has further right answers: then the best of them counts, and the definition says so."""
        return any(row.references for row in self.eval_set.rows)

    @property
    def generation(self) -> str:
        """Definition of how continuations were written."""
        return self.eval_set.generation.definition()
