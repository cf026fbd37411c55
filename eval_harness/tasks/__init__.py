"""Task families, one file each: a module with `TASKS`, name -> Task.

A family whose rows are generated here (tiny_world) has one line of text instead of a Task, and `rows(name, split)`.
Data sets are not part of this package: their rows come from a folder of yours, else from the Hub.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any

from eval_harness.prompts import ChatTemplate

Raw = Mapping[str, Any]
Form = Callable[[Raw], dict[str, Any]]

QUESTION = "Question: {question}\nAnswer:"


@dataclass(frozen=True, slots=True)
class Task:
    """A data set, how its rows are asked, and what is measured on them where a suite says nothing else.

    about           one line
    hub, config     of the data set on the Hub
    licence         of its rows, as far as known; look at the data set itself before you pass rows on
    source          paper
    test_rows       rows of the test split
    row             a row of the Hub to a raw form of `eval_harness.rows`; local files are in that form already
    splits          our split to the Hub's. Where a test split's answers are withheld, "test" is the validation split
    file            name of its local files, where not the task's
    prompt          wording around the question
    lettered        the choices are listed in the question, and the letter is asked for
    solved          a raw form to one whose answer is worked out: applied to the train split, so that shots and
                    training show how an answer is reached, and tests hold the bare result
    measures        of `eval_harness.measure.MEASURES`
    generate        fields of Generation
    num_fewshot     shots put before each row
    fewshot_split   where shots are drawn from
    chat_template   "none" where the prompt is the beginning of a text, not a question to anybody
    """

    about: str
    hub: str
    licence: str
    source: str
    test_rows: int
    row: Form
    measures: tuple[str, ...]
    config: str | None = None
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    file: str | None = None
    prompt: str = "{question}"
    lettered: bool = False
    solved: Form | None = None
    generate: Mapping[str, Any] = field(default_factory=dict)
    num_fewshot: int = 0
    fewshot_split: str = "train"
    chat_template: ChatTemplate = "auto"

    def asked(self, raw: Raw, split: str) -> dict[str, Any]:
        """A row in raw form as it is asked: solved, lettered, worded. Text stays as it is.

        Raises:
            KeyError: a field of the form is missing.
            ValueError: more choices than letters, or an answer_index beyond the choices.
        """
        row = dict(raw)
        if "text" in row:
            return row
        if self.solved is not None and split == "train":
            row |= self.solved(row)
        if self.lettered:
            row |= lettered(row)
        return row | {"question": self.prompt.format(question=row["question"])}


def lettered(raw: Raw) -> dict[str, Any]:
    """The choices as lines "A. ..." under the question, and their letters in the place of the choices."""
    choices = [str(choice) for choice in raw["choices"]]
    if len(choices) > len(ascii_uppercase):
        raise ValueError(f"{len(choices)} choices: at most {len(ascii_uppercase)} have letters")
    index = choices.index(str(raw["answer"])) if raw.get("answer_index") is None else int(raw["answer_index"])
    letters = list(ascii_uppercase[: len(choices)])
    lines = [str(raw["question"]).strip(), *(f"{one}. {text}" for one, text in zip(letters, choices, strict=True))]
    return {"question": "\n".join(lines), "choices": letters, "answer_index": index}


def whole(text: Any) -> str:
    """A number as it is written by hand: "145.0" is "145"; anything else stays."""
    said = str(text).strip()
    head, dot, tail = said.partition(".")
    return head if dot and head.lstrip("-").isdecimal() and set(tail) <= {"0"} else said
