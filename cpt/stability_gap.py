"""The stability gap of a run: its stages' curves of scores (within.jsonl) put together, and what is told of them.

Source: De Lange et al. 2023 (ICLR, arXiv 2205.13452); the formulas are eval_harness.metrics.stability's.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from eval_harness.metrics import stability
from eval_harness.metrics.continual import Summary

FILE = "within.jsonl"
WINDOW = 10  # evaluations: WF^10, WP^10


def read_curve(file: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """A curve's head (None where there is no curve) and its lines; an unfinished last line (a kill) is left out.

    head   {every, rows, steps, plan, sets: {set: {id, group, measures: {measure: {definition, higher_is_better, n}}}}}
    line   {step, scores: {set: {measure: value or None}}}, and `undefined` with the reasons where there are some
    """
    if not file.is_file():
        return None, []
    head, *lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]] or [None]
    return head, lines


@dataclass(frozen=True)
class Trained:
    """A finished stage as its curve tells it. name: of its set among the scores; steps: optimizer steps it took."""

    name: str
    steps: int
    head: dict[str, Any] | None
    lines: list[dict[str, Any]]

    @classmethod
    def read(cls, name: str, steps: int, folder: Path) -> "Trained":
        """Of a stage's folder, with or without a curve."""
        return cls(name, steps, *read_curve(folder / FILE))

    def cut(self) -> str | None:
        """Why the curve is not the whole stage's, as when its plan changed between a kill and going on."""
        if self.lines and (self.lines[0]["step"], self.lines[-1]["step"]) == (0, self.steps):
            return None
        return f"the scores within stage {self.name} do not reach from its first to its last step"

    def lacks(self, name: str, known: dict[str, Any]) -> str | None:
        """Why this curve does not tell of a set all through the stage, of the rows that another curve knows it by."""
        if self.head is None:
            return f"stage {self.name} was not scored while it trained"
        if self.head["sets"].get(name, {}).get("id") != known["id"]:
            return f"stage {self.name} was not scored on the same rows of {name} in the same way"
        return self.cut()


def stability_gap(stages: Sequence[Trained], tasks: Collection[str]) -> dict[str, Any] | None:
    """What the curves of a run tell of its last stage here: measure -> metric -> {value, formula, n, reason}.

    stages: the first to the one asked about. tasks: names of those stages that have a test. None without a curve.

    `min_acc` and `wc_acc` take the worst score of each earlier task since the end of its own stage, `min_general` that
    of each general set since the stream began; the windows of `wf_10` and `wp_10` lie in this stage alone. A stage on
    the way that has no curve, or one of other rows, makes the first three undefined: a minimum over the rest would
    only be too good.
    """
    last = stages[-1]
    if last.head is None:
        return None
    found: dict[str, Any] = {"every": last.head["every"], "rows": last.head["rows"], "evaluations": len(last.lines)}
    measures = dict.fromkeys(m for known in last.head["sets"].values() for m in known["measures"])
    return found | {"measures": {name: _gap(stages, tasks, name) for name in measures}}


def _gap(stages: Sequence[Trained], tasks: Collection[str], measure: str) -> dict[str, Any]:
    last = stages[-1]
    assert last.head is not None
    sets = {name: known for name, known in last.head["sets"].items() if measure in known["measures"]}
    higher = next(known["measures"][measure]["higher_is_better"] for known in sets.values())
    ends = dict(zip((stage.name for stage in stages), accumulate(stage.steps for stage in stages), strict=True))
    mine = [name for name in sets if name in tasks]
    before = {name: ends[name] for name in mine if name != last.name}
    general = {name: 0 for name, known in sets.items() if known["group"] == "general"}
    whole, own = _joined(stages, measure), _joined(stages[-1:], measure)

    def lacking(names: dict[str, int]) -> str | None:
        later = ((stage, name) for name, end in names.items() for stage in stages if ends[stage.name] > end)
        return next((reason for stage, name in later if (reason := stage.lacks(name, sets[name]))), None)

    cut = last.cut()
    untested = None if last.name in mine else f"stage {last.name} has no test with this measure"
    forgetting = stability.windowed_forgetting(own, WINDOW, tasks=mine, higher_is_better=higher)
    plasticity = stability.windowed_plasticity(own, WINDOW, tasks=mine, higher_is_better=higher)
    return {
        "min_acc": _as_json(stability.min_acc(whole, before, higher_is_better=higher), lacking(before)),
        "wc_acc": _as_json(
            stability.wc_acc(whole, before, last.name, higher_is_better=higher), untested or cut or lacking(before)
        ),
        "wf_10": _as_json(forgetting, cut),
        "wp_10": _as_json(plasticity, cut),
        "min_general": _as_json(
            stability.min_acc(whole, general, higher_is_better=higher),
            lacking(general) if general else "no general set has this measure",
        ),
    }


def _joined(stages: Sequence[Trained], measure: str) -> list[tuple[int, dict[str, float | None]]]:
    """One curve of several, steps counted on; the end of a stage is step 0 of the next."""
    joined: dict[int, dict[str, float | None]] = {}
    begin = 0
    for stage in stages:
        for line in stage.lines:
            scores = {name: by[measure] for name, by in line["scores"].items() if measure in by}
            joined[begin + line["step"]] = joined.get(begin + line["step"], {}) | scores
        begin += stage.steps
    return sorted(joined.items())


def _as_json(found: Summary, undefined: str | None) -> dict[str, Any]:
    """undefined: why the value does not stand, whatever the formula gives for what is there."""
    value, n, reason = (found.value, found.n, found.reason) if undefined is None else (None, 0, undefined)
    return {"value": value, "formula": found.formula, "n": n, "reason": reason}
