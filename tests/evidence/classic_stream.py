"""What a stream of real tasks forgets, by method: docs/evidence/classic_stream.md and its data beside it.

    python -m tests.evidence.classic_stream --data FOLDER --model FOLDER [--seeds 3] [--workers 2] [--runs runs/classic]

FOLDER of the data holds what the recipe names under `file:`, FOLDER of the model a very small causal model. About three
quarters of an hour of one core. Interrupted, the same command goes on.
"""

import argparse
import hashlib
import multiprocessing
import statistics
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from cpt import Run, Stream
from cpt.data.sources import load
from cpt.report import summary
from cpt.resources import bundled
from cpt.run_dir import libraries
from tests.evidence.tables import half_width, line, publish, rule, spread

TINY: dict[str, Any] = {  # what a model of a quarter of a million parameters needs otherwise than the recipe
    "learning_rate": 1.0e-3,
    "warmup_steps": 20,
    "max_steps": 190,
    "max_length": 128,
    "truncation_mode": "keep_end",  # the answer stands there
}
FILE_FIELDS = {"svamp": {"question": "question", "answer": "subject"}}  # where a file's fields are not the Hub's
VARIANTS = {"naive": (), "replay": ("replay",), "hft": ("hft",), "hft + replay": ("hft", "replay")}
ACCURACY, LOSS, GENERAL = "accuracy", "answer_loss", "tinystories"
MARGIN = 10  # points above the majority class that make a task learnable
Figures = NDArray[np.float64]


def recipe(data: Path, model: Path, runs: Path) -> dict[str, Any]:
    """The recipe as a mapping, reading `data`, with the small model and its settings."""
    raw = yaml.safe_load((bundled("recipes") / "classic_stream.yaml").read_text(encoding="utf-8"))
    raw |= {"model": str(model), "tokenizer": {"pad_token": "</s>"}, "data_root": str(data), "output_dir": str(runs)}
    for stage in raw["stages"]:
        for source in (stage["data"], stage["test"]):
            source["fields"] = FILE_FIELDS.get(stage["name"], source["fields"])
    return raw | {"training": raw["training"] | TINY, "retention": {"models": "last"}}


def streams(raw: dict[str, Any], seed: int) -> dict[str, dict[str, Any]]:
    """Every row of the table but the majority class, as a stream of its own; one stage each for the specialists."""
    stages, tests = raw["stages"], {stage["name"]: stage["test"] for stage in raw["stages"]}
    found = {}
    for name, kept in VARIANTS.items():
        own = [stage | {"methods": [m for m in stage["methods"] if _type(m) in kept]} for stage in stages]
        found[name] = raw | {"stages": own}
    for stage in stages[1:]:  # the first one's specialist is the first stage of the naive stream
        found[f"specialist {stage['name']}"] = raw | {"stages": [stage | {"methods": []}]}
    data = [stage["data"] | {"weight": 1} for stage in stages]  # each task as often as in its own stage
    joint = {"name": "joint", "data": data, "training": {"max_steps": len(stages) * raw["training"]["max_steps"]}}
    measured = {"general": raw["evaluation"]["general"] | tests}
    found["joint"] = raw | {"stages": [joint], "evaluation": raw["evaluation"] | measured}
    slugs = {name: name.replace(" + ", "-").replace(" ", "-") for name in found}
    return {name: part | {"name": f"{slugs[name]}-seed{seed}", "seed": seed} for name, part in found.items()}


def _type(method: str | dict[str, Any]) -> str:
    return method if isinstance(method, str) else method["type"]


def figures(run: Run) -> list[dict[str, dict[str, float]]]:
    """Row by row of the run's matrix, the base first: set -> measure -> value."""
    rows = summary.read(run.path)["rows"]
    return [{name: _figures(by) for name, by in row["scores"].items()} for row in rows]


def _figures(by: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Values by measure; `accuracy` is among the row's choices, or an exact match where rows have none."""
    values = {measure: result["value"] for measure, result in by.items()}
    found = values.get("acc", values.get("exact_match"))
    return values if found is None else values | {ACCURACY: found}


def seconds(run: Run) -> dict[str, float]:
    """Seconds of training and of measuring, as the run's stages recorded them."""
    trained = [done["facts"]["train_seconds"] for stage in run.stages() if (done := stage.done()) and done["facts"]]
    measured = [done["facts"]["seconds"] for stage in run.stages() if (done := stage.eval_done())]
    return {"training": round(sum(trained), 1), "measuring": round(sum(measured), 1)}


def perform(name: str, seed: int, raw: dict[str, Any]) -> tuple[str, int, dict[str, Any]]:
    """One run, finished or gone on with, in a process of its own thread."""
    import torch

    from cpt import run

    torch.set_num_threads(1)  # two workers share two cores
    done = run(Stream.parse(raw), say=lambda line: None)
    return name, seed, {"rows": figures(done), "seconds": seconds(done)}


def majority(raw: dict[str, Any]) -> dict[str, float]:
    """Share in per cent of the most frequent answer among each task's test rows."""
    stream, found = Stream.parse(raw), {}
    for stage in stream.stages:
        rows = load(stage.test, stream.data_root, stage.name).rows
        found[stage.name] = 100 * Counter(row.completion for row in rows).most_common(1)[0][1] / len(rows)
    return found


class Results:
    """Figures of all runs as arrays over seeds: accuracy in per cent, loss in nats a token, text in bits a byte."""

    def __init__(self, runs: dict[str, list[dict[str, Any]]], tasks: list[str]) -> None:
        self.runs, self.tasks = runs, tasks

    def at(self, name: str, row: int, task: str, measure: str) -> Figures:
        """After one row of a run (0 is the base, -1 the end)."""
        scale = 100 if measure == ACCURACY else 1
        return scale * np.array([seed["rows"][row][task][measure] for seed in self.runs[name]])

    def text(self, name: str, row: int = -1) -> Figures:
        """General ability: bits per byte."""
        return self.at(name, row, GENERAL, "bits_per_byte")

    def each(self, name: str, row: int, measure: str) -> Figures:
        """Of every task, (tasks, seeds); `specialist` stands for each task's own."""
        names = [f"specialist {task}" if name == "specialist" else name for task in self.tasks]
        return np.array([self.at(run, row, task, measure) for run, task in zip(names, self.tasks, strict=True)])

    def learned(self, name: str, measure: str) -> Figures:
        """Of every task right after its own stage, (tasks, seeds)."""
        return np.array([self.at(name, i, task, measure) for i, task in enumerate(self.tasks, start=1)])


def table(results: Results, most: dict[str, float]) -> list[str]:
    """Markdown: the end of every stream, what each stage taught and what became of it, and who learned at all."""
    tasks = results.tasks
    head = ["", *tasks, "mean accuracy", "mean answer loss", f"{GENERAL}, bits per byte"]
    lines = [line(*head), rule(len(head))]
    shares = [f"{share:.1f}" for share in (*most.values(), statistics.mean(most.values()))]
    lines.append(line("majority class", *shares, "", ""))
    text = np.mean([results.text(f"specialist {task}") for task in tasks], axis=0)
    lines.append(line("base", *_scores(results, "naive", 0), spread(results.text("naive", 0), 2)))
    lines.append(line("specialists, one a task", *_scores(results, "specialist", -1), spread(text, 2)))
    lines += [line(name, *_scores(results, name, -1), spread(results.text(name), 2)) for name in ("joint", *VARIANTS)]
    for title, measure, digits in (("accuracy", ACCURACY, 1), ("answer loss", LOSS, 2)):
        lines += ["", *_history(results, title, measure, digits)]
    return [*lines, "", *_verdicts(results, most)]


def _scores(results: Results, name: str, row: int) -> list[str]:
    accuracy, loss = (results.each(name, row, measure) for measure in (ACCURACY, LOSS))
    return [*map(spread, accuracy), spread(accuracy.mean(axis=0)), spread(loss.mean(axis=0), 2)]


def _history(results: Results, title: str, measure: str, digits: int) -> list[str]:
    """Right after a task was learned and at the end, and what that is on average over all tasks but the last."""
    head = [title, *(f"{task}, learned → end" for task in results.tasks), "forgotten"]
    lines = [line(*head), rule(len(head))]
    for name in VARIANTS:
        learned, end = results.learned(name, measure), results.each(name, -1, measure)
        lost = (learned - end)[:-1].mean(axis=0) * (1 if measure == ACCURACY else -1)
        pairs = [f"{spread(a, digits)} → {spread(b, digits)}" for a, b in zip(learned, end, strict=True)]
        lines.append(line(name, *pairs, spread(lost, digits)))
    return lines


def _verdicts(results: Results, most: dict[str, float]) -> list[str]:
    """Whether each specialist beats the majority class by the margin, and whether its interval lies above the class."""
    head = ["learnability", "majority class", "specialist", f"above by {MARGIN} points", "interval above"]
    lines = [line(*head), rule(len(head))]
    for task, values in zip(results.tasks, results.each("specialist", -1, ACCURACY), strict=True):
        above = values.mean() - most[task]
        certain = len(values) > 1 and above > half_width(values)
        words = ["yes" if found else "no" for found in (above >= MARGIN, certain)]
        lines.append(line(task, f"{most[task]:.1f}", spread(values), *words))
    return lines


def settings(raw: dict[str, Any], model: Path, seeds: int) -> dict[str, Any]:
    """What the figures depend on, without a path of this machine."""
    stream = Stream.parse(raw)
    weights = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    data = {}
    for stage in stream.stages:
        for split, source in (("train", stage.data[0]), ("test", stage.test)):
            part = load(source, stream.data_root, stage.name)
            data[f"{stage.name} {split}"] = {"rows": len(part.rows), "sha256": part.fingerprint}
    kept = {"stages": raw["stages"], "evaluation": raw["evaluation"], "training": raw["training"]}
    about = {"name": model.name, "model.safetensors": weights, "pad_token": raw["tokenizer"]["pad_token"]}
    return {"seeds": list(range(seeds)), "model": about, "data": data, **kept, "libraries": libraries()}


def main() -> None:
    """Run what is not finished, then write the table and its data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that the recipe's files are relative to")
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/classic"))
    arguments = parser.parse_args()
    raw = recipe(arguments.data.resolve(), arguments.model.resolve(), arguments.runs)
    jobs = [(name, seed, part) for seed in range(arguments.seeds) for name, part in streams(raw, seed).items()]
    runs = collect(jobs, arguments.workers, raw["stages"][0]["name"])
    most = majority(raw)
    kept = {"settings": settings(raw, arguments.model, arguments.seeds), "majority": most, "runs": runs}
    publish("classic_stream", kept, table(Results(runs, list(most)), most))


def collect(jobs: list[tuple[str, int, dict[str, Any]]], workers: int, first: str) -> dict[str, list[dict[str, Any]]]:
    """Perform the jobs, several at a time: name -> one record a seed, in order of seeds."""
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name, _, _ in jobs}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for number, future in enumerate(as_completed([pool.submit(perform, *job) for job in jobs]), start=1):
            name, seed, record = future.result()
            found[name][seed] = record
            print(f"{number} of {len(jobs)}: {name}, seed {seed}, {record['seconds']}", flush=True)
    runs = {name: [by_seed[seed] for seed in sorted(by_seed)] for name, by_seed in found.items()}
    return runs | {f"specialist {first}": [{"rows": seed["rows"][:2]} for seed in runs["naive"]]}


if __name__ == "__main__":
    main()
