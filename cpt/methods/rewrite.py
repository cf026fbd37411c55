"""Rewrite: the model writes the answers anew in its own words before it learns them.

Paper: Self-Distillation Fine-Tuning (SDFT of 2024), arXiv 2402.13669. Cost: before a stage one answer written for every
row by the model that the stage starts from, of at most `max_new_tokens`; nothing in a step.
"""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, PrivateAttr, model_validator

from cpt.data.spec import refuse
from cpt.methods.base import Method, StageInfo
from cpt.rewards.agreement import Agreement
from cpt.rewards.text import Pattern

if TYPE_CHECKING:
    from cpt.data.sources import Loaded
    from cpt.data.stage_data import StageData
    from eval_harness.rows import Row

TEMPLATE = """Here are a question and a reference answer. Guided by the reference answer, answer in your own words.

Question:
{question}

Reference answer:
{answer}

Your own answer:
"""
# Of an answer that refuses, or that speaks of the template; a reference that holds one allows it.
MARKERS = ["reference answer", "own words", "your own answer", "my own answer", "I cannot", "I can't", "I'm sorry"]
MARKERS += ["I apologize", "as an AI"]
CONFLICTS = "is for verify: contains or exact_match: leave it out"


class Rewrite(Method):
    """Have the model that the stage starts from write each answer anew, given the reference; learn those instead.

    What a model says in its own words moves it less. An answer stays as it was where the new one fails `verify`, is
    empty, was cut off, or holds one of `markers`; the stage then trains on the mixture as ever.
    """

    type: Literal["rewrite"] = "rewrite"
    share: float = Field(1.0, ge=0, le=1, description="of the task's rows, drawn by the seed; 0 switches it off")
    template: str | None = Field(
        None, description="what the model is asked, with {question} and {answer} in their places; default: in English"
    )
    verify: Agreement = Field("none", description="how a new answer must agree with the reference to be learned")
    pattern: Pattern | None = Field(
        None,
        description="finds the final answer of both for contains and exact_match: a regular expression with a group; "
        "default: what stands behind the last ####, else all",
    )
    markers: list[str] | None = Field(
        None, description="whoever says one, in any case, refuses: the answer stays; default: some in English"
    )
    max_new_tokens: int = Field(512, gt=0, description="of an answer; one that is longer is cut off, and stays")
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False, description="of the writing; 0 is greedy")
    stop: list[str] = Field([], description="strings that end an answer beside the end token, for a base model")

    kinds: ClassVar[frozenset[str]] = frozenset({"sft"})
    absent: ClassVar[dict[str, Any]] = {"share": 0.0}

    _facts: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _fits(self) -> "Rewrite":
        missing = [name for name in ("{question}", "{answer}") if name not in (self.template or TEMPLATE)]
        found: list[Any] = []
        if missing:
            found.append((("template",), self.template, f"needs {' and '.join(missing)}, where the row's own go"))
        if self.pattern is not None and self.verify not in ("contains", "exact_match"):
            found.append((("pattern",), self.pattern, CONFLICTS))
        for name in ("markers", "stop"):
            if not all(one.strip(" ") for one in getattr(self, name) or []):
                found.append(((name,), getattr(self, name), "must not hold an empty string"))
        refuse(*found)
        return self

    def check_rows(self, loaded: "Loaded") -> list[tuple[str, str]]:
        """Rows of one turn, and references that something can agree with."""
        from cpt.data.rewritten import turn
        from cpt.rewards.agreement import unsuitable

        turns = [turn(row) for row in loaded.rows]
        if several := [row.id for row, one in zip(loaded.rows, turns, strict=True) if one is None]:
            more = f" and {len(several) - 1:,} more" if several[1:] else ""
            why = (
                f"row {several[0]}{more}: is no single question with its answer, and answers of conversations are not "
            )
            return [("type", why + "written anew: split them into turns, or leave the method out")]
        problems = (unsuitable(self.verify, one[1], self.pattern) for one in turns if one)
        problem = next((found for found in problems if found), None)
        return [("verify", f"{problem}: take another way, or none")] if problem else []

    def prepare_data(self, data: "StageData", stage: StageInfo) -> None:
        """Put the rewritten rows in the place of the task's."""
        from cpt.data.memory import Memory
        from cpt.data.rewritten import asked, chosen, rewritten
        from cpt.data.stage_data import TASK

        assert stage.rows is not None
        assert stage.memory is not None
        assert stage.generate is not None
        rows = self._drawn(stage.rows.rows, stage.seed)
        rows = Memory(stage.memory).without_forgotten(replace(stage.rows, rows=rows)).rows
        about: dict[str, Any] = {"model": stage.parent, "rendering": stage.rendering}
        about |= {
            "trained_on": stage.rows.fingerprint,
            "seed": stage.seed,
            "settings": self.model_dump(mode="json") | {"defaults": [TEMPLATE, MARKERS]},
        }
        make = stage.generate(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, stop=tuple(self.stop), seed=stage.seed
        )
        asking = [asked(row, self.template or TEMPLATE) for row in rows]
        choose = partial(chosen, rows, markers=MARKERS if self.markers is None else self.markers, agrees=self._agrees)
        new, self._facts = rewritten(stage.memory, self.type, about, stage.rows, asking, make, choose)
        mixed = replace(stage.rows, rows=[new.get(row.id, row) for row in stage.rows.rows])
        data.sources[TASK] = data.load(mixed, f"stages.{stage.name}.methods.{self.type}", None)

    def _drawn(self, rows: "list[Row]", seed: int) -> "list[Row]":
        """The rows to ask for, each once however often it is trained on."""
        once = list({row.id: row for row in rows}.values())
        order = np.random.default_rng([seed, 2]).permutation(len(once))
        return [once[i] for i in sorted(order[: max(1, round(self.share * len(once)))].tolist())]

    def _agrees(self, row: "Row", text: str) -> bool:
        from cpt.data.rewritten import turn
        from cpt.rewards.agreement import agrees

        _, answer = turn(row) or ("", "")
        return agrees(self.verify, text, [answer, *row.references], self.pattern)

    def facts(self) -> dict[str, Any]:
        """How many answers were asked for and written anew, and why others stay."""
        return dict(self._facts)
