"""The rows of an unlearning stage: those to forget, each with a template answer beside it, and those kept."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets

from cpt.data.rewritten import answered
from cpt.data.rewritten import turn as turn_of
from cpt.data.stage_data import TASK, StageData
from cpt.data.templates import Template
from cpt.data.tokens import TokenRows, joined
from cpt.errors import DataError
from eval_harness.rows import Row

RETAIN = "retain"
MOST = 100  # passes that have templates of their own
BESIDE = ("template_ids", "template_labels", "template_row")


@dataclass
class ForgetData(StageData):
    """As `StageData`; the task's rows are those to forget.

    templates: for each pass over them, a row beside each of theirs; empty where no method asks. After the last one
    they come round again.
    """

    templates: list[TokenRows] = field(default_factory=list)

    @property
    def origins(self) -> list[str]:
        """`forget` first, `template` last."""
        return ["forget", *self.names[1:], "template"]

    @property
    def copies(self) -> int:
        """A copy of the rows to forget for every pass that has templates of its own."""
        return max(1, len(self.templates))

    @property
    def beside(self) -> int:
        """Number of the origin `template`."""
        return len(self.origins) - 1

    @property
    def all_templates(self) -> TokenRows:
        """The template rows of all passes, numbered as their `row`."""
        return joined(self.templates)

    def _part(self, name: str) -> datasets.Dataset:
        """The rows to forget once for every pass, with their templates in columns of their own."""
        if name != TASK or not self.templates:
            return super()._part(name)
        part = datasets.concatenate_datasets([super()._part(name)] * self.copies)
        rows = self.all_templates.dataset
        for column, values in zip(BESIDE, (rows[:]["input_ids"], rows[:]["labels"], range(len(rows))), strict=True):
            part = part.add_column(column, list(values))
        return part


def forget_data(
    data: StageData,
    rows: Sequence[Row],
    encode: Callable[[Sequence[Row], str], TokenRows],
    template: Template | None,
    turns: int,
    seed: int,
    place: str,
) -> ForgetData:
    """The rows to forget, encoded, and for each of so many passes over them their templates, where one is given.

    Raises DataError where a template is cut off with its prompt.
    """
    forget = encode(rows, place)
    made = ForgetData(data.load, {TASK: forget}, place=data.place)
    if template is None:
        return made
    by_id = {row.id: row for row in rows}
    held = [by_id[one] for one in forget.ids]  # those that kept an answer
    for turn in range(turns if template.redraw == "epoch" else 1):
        beside = encode(template_rows(held, template, seed, turn), f"{place}, with templates")
        if len(beside.dataset) < len(held):
            raise DataError(f"{place}: prompts leave no room for their templates: raise training.max_length")
        made.templates.append(beside)
    return made


def passes(training: dict[str, Any], batch_rows: int, rows: int) -> int:
    """At most how often a stage goes through its rows; after `MOST` templates come round again."""
    if (steps := training.get("max_steps") or 0) > 0:
        return min(MOST, math.ceil(steps * batch_rows / rows))
    return min(MOST, math.ceil(training.get("num_train_epochs") or 3))


def template_rows(rows: Sequence[Row], template: Template, seed: int, turn: int) -> list[Row]:
    """The rows with the template answers of one pass in the place of their own."""
    lines = template.drawn(seed, turn, len(rows))
    return [answered(row, line) for row, line in zip(rows, lines, strict=True)]


def check_templates(rows: Sequence[Row], template: Template, place: str) -> None:
    """Raises DataError for rows without a prompt, and for those whose answer is a template."""
    problems, texts = [], {line.strip() for line in template.texts}
    if text := [row.id for row in rows if turn_of(row) is None]:
        problems.append(
            f"{place}: row {text[0]} has no single prompt with an answer ({len(text)} such rows), and a template "
            "stands in an answer's place: give those, or a method that goes by the rows alone, such as npo"
        )
    if same := [row.id for row in rows if (found := turn_of(row)) and found[1].strip() in texts]:
        problems.append(
            f"{place}: row {same[0]} is answered by a template already ({len(same)} such rows): leave it out, or give "
            "other templates"
        )
    if problems:
        raise DataError(*problems)
