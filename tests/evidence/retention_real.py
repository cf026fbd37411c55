"""What each method keeps on a stream of real tasks, each at its own learning rate: docs/evidence/retention_real.md.

    python -m tests.evidence.retention_real --data FOLDER --model FOLDER [--seeds 3] [--workers 2] [--runs runs/real]

The stream, its data and its small model are those of `tests.evidence.classic_stream`. First every method is run at each
rate of `RATES` on four fifths of the training rows and measured on the rest; then at the rate at which it learned most
there, on all training rows, over seeds, measured on the test rows. About an hour of two cores; interrupted, the same
command goes on.
"""

import argparse
import json
import multiprocessing
import statistics
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from scipy import stats

from cpt import Stream
from tests.evidence.classic_stream import ACCURACY, GENERAL, MARGIN, figures, majority, recipe, seconds, settings
from tests.evidence.tables import half_width, line, publish, rule, spread

RATES = (3.0e-4, 1.0e-3, 3.0e-3)
PICKING_SEED = 100
REPLAYED = 500
STORIES = {"file": "text/tinystories.train.jsonl", "limit": REPLAYED}
GERE = {"type": "gere", "ratio": 0.125, "general": STORIES}  # two of 16 rows
HFT = {"type": "hft"}  # as published: embeddings are trained
METHODS: dict[str, list[dict[str, Any]]] = {
    "sequential": [],
    "replay 2 %": [{"type": "replay", "ratio": 0.125, "earlier": "all", "rows_per_stage": 0.02}],
    "gere, labels": [GERE | {"keep": "labels"}],
    "gere, margin": [GERE | {"keep": "margin"}],
    "hft": [HFT],
    "hft, frozen embeddings": [HFT | {"embeddings": "frozen"}],
    "hft + gere, margin": [HFT, GERE | {"keep": "margin"}],
    "sft + kl": [{"type": "distill", "weight": 0.3}],
}
JOINT = "joint"


def held_out(data: Path, raw: dict[str, Any], to: Path) -> Path:
    """A data folder whose training rows are four fifths of the recipe's and whose test rows are the rest of those.

    Of stories the replayed ones stay, and those behind them are what is measured.
    """

    def divide(name: str, first: int | None, last: int) -> None:
        lines = (data / name.format(split="train")).read_text(encoding="utf-8").splitlines()[:last]
        first = first or 4 * len(lines) // 5
        for split, part in (("train", lines[:first]), ("test", lines[first:])):
            file = to / name.format(split=split)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(part) + "\n", encoding="utf-8")

    for stage in raw["stages"]:
        divide(stage["data"]["file"], None, stage["data"]["limit"])
    divide("text/tinystories.{split}.jsonl", REPLAYED, REPLAYED + 40)
    return to


def stream(
    raw: dict[str, Any], name: str, rate: float, seed: int, tasks: Iterable[str] | None = None
) -> dict[str, Any]:
    """One run: all tasks in turn with a method, or all at once, or the tasks given, each without a method."""
    stages = [stage for stage in raw["stages"] if tasks is None or stage["name"] in tasks]
    training = raw["training"] | {"learning_rate": rate}
    slug = "".join(c if c.isalnum() or c == "-" else "_" for c in f"{name}-{rate:g}-s{seed}")
    about = raw | {"name": slug, "seed": seed, "training": training}
    if name != JOINT:
        return about | {"stages": [stage | {"methods": METHODS.get(name, [])} for stage in stages]}
    data = [stage["data"] | {"weight": 1, "name": stage["name"]} for stage in stages]
    general = raw["evaluation"]["general"] | {stage["name"]: stage["test"] for stage in stages}
    joint = {"name": JOINT, "data": data, "training": {"max_steps": len(stages) * training["max_steps"]}}
    return about | {"stages": [joint], "evaluation": raw["evaluation"] | {"general": general}}


def perform(name: str, raw: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """One run, finished or gone on with, in a process of one thread."""
    import torch

    from cpt import run

    torch.set_num_threads(1)
    done = run(Stream.parse(raw), say=lambda line: None)
    return name, {"rows": figures(done), "seconds": seconds(done)}


def collect(jobs: dict[str, dict[str, Any]], workers: int) -> dict[str, dict[str, Any]]:
    """Perform them, several at a time."""
    found = {}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for number, future in enumerate(as_completed([pool.submit(perform, *job) for job in jobs.items()]), start=1):
            name, record = future.result()
            found[name] = record
            print(f"{number} of {len(jobs)}: {name}, {record['seconds']}", flush=True)
    return {name: found[name] for name in jobs}


class Scores:
    """Of one run: accuracy in per cent right after each task was learned and at the end, stories in bits per byte."""

    def __init__(self, record: dict[str, Any], tasks: list[str]) -> None:
        rows = record["rows"]
        stages = len(rows) - 1
        after = range(1, stages + 1) if stages == len(tasks) else [stages] * len(tasks)
        self.learned = [100 * rows[row][task][ACCURACY] for row, task in zip(after, tasks, strict=True)]
        self.end = [100 * rows[-1][task][ACCURACY] for task in tasks]
        self.text = rows[-1][GENERAL]["bits_per_byte"]
        self.new, self.kept = statistics.mean(self.learned), statistics.mean(self.end)


def best_rates(picking: dict[str, dict[str, Any]], tasks: list[str]) -> dict[str, float]:
    """The rate at which each learned most of its new tasks, on rows that are not the test's."""
    return {
        name: max(RATES, key=lambda rate: Scores(picking[f"{name} {rate:g}"], tasks).new) for name in (*METHODS, JOINT)
    }


def table(
    runs: dict[str, list[dict[str, Any]]],
    picking: dict[str, dict[str, Any]],
    rates: dict[str, float],
    most: dict[str, float],
) -> list[str]:
    """Markdown: every method at its rate, what the rates gave, learnability, what could be seen."""
    tasks = list(most)
    head = ["", "rate", "new tasks, right after", "all tasks, at the end", *tasks, f"{GENERAL}, bits per byte"]
    lines = [line(*head), rule(len(head))]
    spreads: dict[str, list[float]] = {"accuracy": [], "text": []}
    base = runs["sequential"][0]["rows"][0]
    cells = [f"{100 * base[task][ACCURACY]:.1f}" for task in tasks]
    lines.append(line("base", "", "", "", *cells, f"{base[GENERAL]['bits_per_byte']:.2f}"))
    for name in (JOINT, *METHODS):
        scores = [Scores(record, tasks) for record in runs[name]]
        ends = [spread(score.end[i] for score in scores) for i in range(len(tasks))]
        new, kept = spread(score.new for score in scores), spread(score.kept for score in scores)
        lines.append(line(name, f"{rates[name]:g}", new, kept, *ends, spread([score.text for score in scores], 2)))
        if len(scores) > 1:
            spreads["accuracy"].append(statistics.stdev(score.kept for score in scores))
            spreads["text"].append(statistics.stdev(score.text for score in scores))
    return [*lines, "", *_seen(spreads, len(runs[JOINT])), "", *_picked(picking, tasks), "", *_learnable(runs, most)]


def _seen(spreads: dict[str, list[float]], seeds: int) -> list[str]:
    if seeds < 2:
        return []
    pooled = {what: (sum(s * s for s in found) / len(found)) ** 0.5 for what, found in spreads.items()}
    least = {what: float(stats.t.ppf(0.975, 2 * seeds - 2)) * sd * (2 / seeds) ** 0.5 for what, sd in pooled.items()}
    return [
        f"Pooled over rows the standard deviation over seeds is {pooled['accuracy']:.1f} points of all tasks at the "
        f"end and {pooled['text']:.2f} bits per byte; two rows must differ by {least['accuracy']:.1f} points, or by "
        f"{least['text']:.2f} bits, for {seeds} seeds each to tell (95 %, two-sided t)."
    ]


def _picked(picking: dict[str, dict[str, Any]], tasks: list[str]) -> list[str]:
    head = ["held-out rows: new tasks / at the end / bits per byte", *(f"{rate:g}" for rate in RATES)]
    lines = [line(*head), rule(len(head))]
    for name in (JOINT, *METHODS):
        scores = [Scores(picking[f"{name} {rate:g}"], tasks) for rate in RATES]
        lines.append(line(name, *(f"{one.new:.1f} / {one.kept:.1f} / {one.text:.2f}" for one in scores)))
    return lines


def _learnable(runs: dict[str, list[dict[str, Any]]], most: dict[str, float]) -> list[str]:
    head = ["learnability", "majority class", "specialist", f"above by {MARGIN} points", "interval above"]
    lines = [line(*head), rule(len(head))]
    for task, share in most.items():
        values = [100 * record["rows"][-1][task][ACCURACY] for record in runs[f"specialist {task}"]]
        above = statistics.mean(values) - share
        certain = len(values) > 1 and above > half_width(values)
        lines.append(
            line(
                task,
                f"{share:.1f}",
                spread(values),
                *("yes" if is_so else "no" for is_so in (above >= MARGIN, certain)),
            )
        )
    return lines


def main() -> None:
    """Run what is not finished, then write the table and its data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that the recipe's files are relative to")
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/real"))
    given = parser.parse_args()
    raw = recipe(given.data.resolve(), given.model.resolve(), given.runs)
    tasks = [stage["name"] for stage in raw["stages"]]
    apart = raw | {"data_root": str(held_out(given.data, raw, given.runs / "held_out").resolve())}
    apart["output_dir"] = str(given.runs / "picking")
    picking = collect(
        {
            f"{name} {rate:g}": stream(apart, name, rate, PICKING_SEED)
            for rate in sorted(RATES, key=lambda rate: abs(rate - RATES[1]))
            for name in (*METHODS, JOINT)
        },
        given.workers,
    )
    rates = best_rates(picking, tasks)
    print(json.dumps(rates), flush=True)
    jobs = {}
    for seed in range(given.seeds):
        for name in (*METHODS, JOINT):
            jobs[f"{name}#{seed}"] = stream(raw, name, rates[name], seed)
        for task in tasks[1:]:
            jobs[f"specialist {task}#{seed}"] = stream(raw, f"specialist {task}", rates["sequential"], seed, [task])
    found = collect(jobs, given.workers)
    names = dict.fromkeys(job.split("#")[0] for job in jobs)
    runs = {name: [found[f"{name}#{seed}"] for seed in range(given.seeds)] for name in names}
    runs[f"specialist {tasks[0]}"] = [record | {"rows": record["rows"][:2]} for record in runs["sequential"]]
    most = majority(raw)
    about = settings(raw, given.model, given.seeds) | {"methods": METHODS, "learning_rates": RATES, "rates": rates}
    kept = {"settings": about, "majority": most, "picking": picking, "runs": runs}
    publish("retention_real", kept, table(runs, picking, rates, most))


if __name__ == "__main__":
    main()
