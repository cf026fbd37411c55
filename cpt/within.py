"""Scores while a stage trains: a few fixed rows of each set, every few optimizer steps; the stability gap is in them.

Source: De Lange et al. 2023 (ICLR, arXiv 2205.13452): what a task loses right after a stage begins, and has back at its
end, no score after the stage shows. Rows are scored by likelihood on the model in training: nothing is generated, and
nothing of the training changes by a bit. The scores lie in the stage's within.jsonl, a line an evaluation.
"""

import json
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cpt.checkpoints import write_text
from cpt.config import Within
from cpt.errors import DataError
from cpt.processes import Processes
from cpt.run_dir import digest
from cpt.stability_gap import read_curve
from eval_harness.errors import ScoringError
from eval_harness.items import EvalSet
from eval_harness.measure import MEASURES, Prepared, default_measures, set_definition
from eval_harness.prompts import Encoded, PromptError
from eval_harness.results import Result

SHARE = 0.02  # of a stage's work, where `every` is auto
MOST, ENOUGH, ENDS = 200, 21, 2  # evaluations: at most; for fewer than enough, auto takes fewer rows; the least
FEWEST_ROWS = 8


@dataclass(frozen=True)
class Work:
    """What a stage's training is made of.

    step      tokens of an optimizer step, over all processes; of an rft stage the prompts' alone
    batch     tokens of the largest micro-batch of one process: memory is known to hold them
    forward   what scoring a token costs, in tokens trained: 1/3, or 1/2 where the backward pass leaves weights out
    shares    whether the answers of one prompt are scored with the prompt read once
    """

    step: float
    batch: int
    forward: float
    shares: bool = True


@dataclass(frozen=True)
class Schedule:
    """When how much is scored.

    every   optimizer steps from one evaluation to the next; step 0 and the last one are evaluations too
    rows    of each set
    times   evaluations
    share   expected cost, as a share of the stage's work
    """

    every: int
    rows: int
    times: int
    share: float


def schedule(
    asked: Within, steps: int, tokens: Callable[[int], int], work: Work, before: int | None = None
) -> Schedule | str:
    """What `evaluation.within` means for a stage of so many steps, or why nothing is scored.

    Args:
        tokens: tokens that one evaluation of so many rows a set reads.
        before: rows that an earlier stage of the run was scored on: on other rows the worst score since then is not
            defined, so auto keeps them.

    Costs are counted in tokens, so a stream gets the same schedule on any machine. Auto halves the rows, down to 8,
    for a curve of 21 points, and takes the shortest distance at which the whole costs at most 2 %.
    """

    def cost(rows: int) -> float:
        return tokens(rows) * work.forward / (steps * work.step)

    if isinstance(asked.every, int):
        times = 1 + math.ceil(steps / asked.every)
        return Schedule(asked.every, asked.rows, times, times * cost(asked.rows))
    sizes = [asked.rows]
    while sizes[-1] // 2 >= FEWEST_ROWS:
        sizes.append(sizes[-1] // 2)
    if before is not None and before <= asked.rows:
        sizes = [before]
    rows = next((size for size in sizes if ENOUGH * cost(size) <= SHARE), sizes[-1])
    fit = min(int(SHARE / cost(rows)), MOST)
    if fit < ENDS:
        return f"scoring {rows} rows of each set twice would cost {ENDS * cost(rows):.0%} of so short a stage"
    every = math.ceil(steps / (fit - 1))
    times = 1 + math.ceil(steps / every)
    return Schedule(every, rows, times, times * cost(rows))


class Watch:
    """Scores a stage's model while it trains; every process of the launch calls it alike, the first one writes.

    window: tokens of the model's context. seed: of the draw of rows, the stream's: all stages score the same ones.
    file: the curve. earlier: the curves of the stages before.
    """

    def __init__(
        self,
        asked: Within,
        sets: Sequence[EvalSet],
        tokenizer: Any,
        work: Work,
        *,
        window: int | None,
        seed: int,
        file: Path,
        earlier: Sequence[Path],
        batch_tokens: int | None,
        say: Callable[[str], None],
        processes: Processes,
    ) -> None:
        self.asked, self.tokenizer, self.work, self.window = asked, tokenizer, work, window
        self.file, self.earlier, self.batch_tokens = file, earlier, batch_tokens
        self.say, self.processes = say, processes
        self.sets = [subset(one, asked.rows, seed) for one in sets]
        self.plan: Schedule | None = None
        self.left_out: str | None = None
        self.seconds = 0.0
        self._prepared: Prepared
        self._head: dict[str, Any] = {}
        self._known = set[int]()

    def begin(self, steps: int, reached: int, spread: str | None = None) -> None:
        """Decide for a stage of `steps` steps that goes on after `reached` of them, and say so.

        spread: what spreads each weight over the processes, if anything does: then none can score alone.
        Raises DataError for a row that the tokenizer cannot render.
        """
        began = time.perf_counter()
        found = f"{spread} leaves each process a part of every weight" if spread else self._schedule(steps)
        if isinstance(found, str):
            self.left_out = found
            self.say(f"  within the stage: nothing is scored: {found}")
            self.processes.on_main(lambda: self.file.unlink(missing_ok=True))
            return
        self.plan = found
        self.sets = [replace(one, rows=one.rows[: found.rows]) for one in self.sets]
        self._prepared = self._prepare()
        self._head = {"every": found.every, "rows": found.rows, "steps": steps}
        self._head["plan"] = digest([self._head, [set_definition(one, self.tokenizer) for one in self.sets]])
        self._known = self.processes.on_main(lambda: _cut(self.file, self._head["plan"], reached))
        self.seconds += time.perf_counter() - began
        self.say(f"  within the stage: {_said(found, self.asked, len(self.sets))}")

    def at(self, step: int, model: Any, context: AbstractContextManager[Any]) -> bool:
        """Score the model after so many steps, where the schedule says so and it was not done before.

        context: the precision that training computes in. Returns False where the logits are not numbers.
        """
        if self.plan is None or step in self._known or (step % self.plan.every and step != self._head["steps"]):
            return True
        from eval_harness.scoring import fitting_tokens

        began = time.perf_counter()
        shard = self.processes if self.processes.world > 1 else None
        problem, found = None, dict[str, dict[str, Result]]()
        try:
            with context:
                tokens = self.batch_tokens or min(self.work.batch, fitting_tokens(model, shard))
                found = self._prepared.measure(model, batch_tokens=tokens, shard=shard)
        except ScoringError as error:
            problem = str(error)
        self._known.add(step)
        if self.processes.is_main:
            self._write(step, found, problem)
        self.seconds += time.perf_counter() - began
        return problem is None

    def facts(self) -> dict[str, Any]:
        """What a stage's record says; seconds are of this process, since it started."""
        if self.plan is None:
            return {"left_out": self.left_out}
        plan = self.plan
        about = {"every": plan.every, "rows": plan.rows, "sets": len(self.sets), "evaluations": plan.times}
        return about | {"expected_share": round(plan.share, 4), "seconds": round(self.seconds, 3)}

    def _schedule(self, steps: int) -> Schedule | str:
        if not self.sets:
            return "the stream has no set that this stage could be scored on"
        counts = self._counts(self._prepare())
        before = self.processes.on_main(lambda: _rows_of(self.earlier))
        return schedule(
            self.asked, steps, lambda rows: sum(sum(part[:rows]) for part in counts.values()), self.work, before
        )

    def _prepare(self) -> Prepared:
        try:
            return Prepared(self.tokenizer, self.sets, self.window)
        except PromptError as error:
            raise DataError(f"evaluation.within: {error}") from error

    def _counts(self, prepared: Prepared) -> dict[str, list[int]]:
        """Set -> tokens that scoring reads of each row."""
        rows = {one.name: dict.fromkeys(range(len(one.rows)), 0) for one in self.sets}
        order = {(one.name, id(row)): i for one in self.sets for i, row in enumerate(one.rows)}
        for todo, parts in zip(prepared.asked, prepared.encoded, strict=True):
            name = todo.plan.eval_set.name
            rows[name][order[name, id(todo.item.row)]] += _read(parts, self.work.shares and todo.ask != "text")
        return {name: list(counts.values()) for name, counts in rows.items()}

    def _write(self, step: int, found: dict[str, dict[str, Result]], problem: str | None) -> None:
        lines = []
        if not self.file.exists() or not self.file.stat().st_size:
            lines.append(self._head | {"sets": {one.name: self._about(one, found.get(one.name)) for one in self.sets}})
        line: dict[str, Any] = {"step": step, "scores": {}}
        undefined = {} if problem is None else {"model": problem}
        for name, by in found.items():
            shown = {key: result.to_json() for key, result in by.items()}
            line["scores"][name] = {key: result["value"] for key, result in shown.items()}
            undefined |= {f"{name}.{key}": one["note"] for key, one in shown.items() if one["value"] is None}
        lines.append(line | ({"undefined": undefined} if undefined else {}))
        with open(self.file, "a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(one, allow_nan=False) + "\n" for one in lines))
            stream.flush()
            os.fsync(stream.fileno())  # before a checkpoint vouches for the step

    def _about(self, one: EvalSet, found: dict[str, Result] | None) -> dict[str, Any]:
        measures = {
            name: {
                "definition": found[name].definition if found else None,
                "higher_is_better": MEASURES[name].higher_is_better,
                "n": found[name].n if found else 0,
            }
            for name in one.measures or ()
        }
        return {"id": set_definition(one, self.tokenizer), "group": one.group, "measures": measures}


def subset(one: EvalSet, rows: int, seed: int) -> EvalSet:
    """A few rows of a set, measured by likelihood: bits of a text; right choice, greedy answer and loss of an answer.

    The draw depends on the seed and the set's name alone; fewer rows are the first of more.
    """
    order = random.Random(f"{seed}/within/{one.name}").sample(range(len(one.rows)), len(one.rows))
    drawn, whole = [one.rows[i] for i in order[:rows]], {row.id for row in one.rows}
    shots = [row for row in one.fewshot if row.id not in whole]  # the shots of the whole set
    return replace(one, rows=drawn, measures=default_measures(one.rows), exact_match="one_pass", fewshot=shots)


def _read(parts: Sequence[Encoded], shared: bool) -> int:
    """Tokens that are read to score sequences, which share what stands before the first target, or do not."""
    again = (len(parts) - 1) * min((part.start for part in parts), default=0) if shared else 0
    return sum(len(part.input_ids) for part in parts) - again


def _said(plan: Schedule, asked: Within, sets: int) -> str:
    when = f"{plan.times} evaluations, every {plan.every} steps" if plan.times > ENDS else "at its start and its end"
    fewer = f" ({asked.rows} asked for)" if plan.rows < asked.rows else ""
    return f"{when}, on {plan.rows} rows{fewer} of each of {sets} sets: about {plan.share:.1%} of its work"


# ---- the curve as a file ---------------------------------------------------------------------------------


def _rows_of(files: Sequence[Path]) -> int | None:
    heads = [head for head, _ in map(read_curve, files) if head is not None]
    return heads[-1]["rows"] if heads else None


def _cut(file: Path, plan: str, reached: int) -> set[int]:
    """Cut what lies beyond the checkpoint that training goes on from; all of it where it is of another plan."""
    head, lines = read_curve(file)
    kept = [line for line in lines if line["step"] <= reached] if head and head["plan"] == plan else []
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(json.dumps(line) + "\n" for line in ([head, *kept] if kept else [])))
    return {line["step"] for line in kept}
