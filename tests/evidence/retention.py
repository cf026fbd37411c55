"""What each method keeps over four stages of the tiny world, at three learning rates: docs/evidence/retention.md.

    python -m tests.evidence.retention [--seeds 3] [--workers 2] [--runs runs/retention] [--scan]

About an hour of two cores; a run that is finished is kept, so interrupted, or with a method more, the same command goes
on. `--scan` tries the strengths in `SCAN` first, on a seed that is not in the table, and prints them. `METHODS` takes
of each kind the one that kept most general ability among those within five points of the most that its kind learned.
"""

import argparse
import multiprocessing
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from scipy import stats

from cpt import Run, Stream
from cpt.report import summary
from cpt.run_dir import libraries
from cpt.sweep import Planned
from cpt.sweep import done as finished
from tests.evidence.tables import exact_match, half_width, line, publish, rule, spread

TASKS = ("new_people", "reverse", "last_letter", "sums_rewarded")
GENERAL = ("facts", "facts_heldout", "sums", "copy", "sort")
RATES = (3.0e-4, 1.0e-3, 3.0e-3)
STEPS, BATCH = 80, 64
SCAN_SEED, SCAN_RATE = 100, 1.0e-3
SCORES = (60.0, 70.0)  # new-task scores at which methods are compared
ROWS = {"task": "tiny_world/general", "limit": 1000}
NEW = {"mode": "new", "lora": {"r": 16, "lora_alpha": 32}}


@dataclass(frozen=True)
class Way:
    """How a stream is trained: methods of every stage; adapter: of every stage."""

    methods: list[dict[str, Any]] = field(default_factory=list)
    adapter: dict[str, Any] | None = None


def replay(ratio: float, **of: Any) -> dict[str, Any]:
    """A replay of general rows, or of earlier stages'."""
    return {"type": "replay", "ratio": ratio, **of}


def gere(keep: str, weight: Any, **more: Any) -> dict[str, Any]:
    """A quarter of every batch from the same thousand general rows."""
    return {"type": "gere", "ratio": 0.25, "general": ROWS, "keep": keep, "weight": weight, **more}


HFT = {"type": "hft"}  # as published: embeddings are trained
METHODS: dict[str, Way] = {
    "sequential": Way(),
    "replay 25 % general": Way([replay(0.25, general=ROWS)]),
    "replay 25 % earlier": Way([replay(0.25, earlier="all")]),
    "replay 12.5 % + 12.5 %": Way([replay(0.125, general=ROWS), replay(0.125, earlier="all", name="earlier")]),
    "gere, labels": Way([gere("labels", None)]),
    "gere, margin": Way([gere("margin", 10.0)]),
    "gere, margin, dynamic": Way([gere("margin", "dynamic")]),
    "gere, kl": Way([gere("kl", 3.0)]),
    "gere, l1": Way([gere("l1", 1.0)]),
    "gere, l2": Way([gere("l2", 1.0)]),
    "gere, margin, of the start": Way([gere("margin", 10.0, of="start")]),
    "gere, margin + 12.5 % earlier": Way([gere("margin", 10.0), replay(0.125, earlier="all")]),
    "hft": Way([HFT]),
    "hft, frozen embeddings": Way([HFT | {"embeddings": "frozen"}]),
    "hft + gere, margin": Way([HFT, gere("margin", 10.0)]),
    "distill": Way([{"type": "distill", "weight": 0.3}]),
    "ewc": Way([{"type": "ewc", "strength": 100.0, "general": ROWS, "earlier": "all"}]),
    "l2_sp": Way([{"type": "l2_sp", "strength": 0.1}]),
    "a_gem": Way([{"type": "a_gem", "rows": 16, "general": ROWS, "earlier": "all"}]),
    "der": Way([{"type": "der", "ratio": 0.25}]),
    "eaft": Way([{"type": "eaft"}]),
    "block_anchor": Way([{"type": "block_anchor", "reference": "weights"}]),
    "sequential, LoRA 16": Way(adapter=NEW),
    "projection, LoRA 16": Way([{"type": "projection", "general": ROWS, "earlier": "all"}], NEW),
}
SCAN: dict[str, Way] = {
    **{f"gere, margin, {w:g}": Way([gere("margin", w)]) for w in (1.0, 10.0, 100.0)},
    **{f"gere, kl, {w:g}": Way([gere("kl", w)]) for w in (0.3, 1.0, 3.0)},
    **{f"gere, l1, {w:g}": Way([gere("l1", w)]) for w in (0.3, 1.0, 3.0)},
    **{f"gere, l2, {w:g}": Way([gere("l2", w)]) for w in (0.3, 1.0, 3.0)},
    **{f"distill, {w:g}": Way([{"type": "distill", "weight": w}]) for w in (0.3, 1.0, 3.0)},
    **{
        f"ewc, {w:g}": Way([{"type": "ewc", "strength": w, "general": ROWS, "earlier": "all"}])
        for w in (1.0, 10.0, 100.0)
    },
    **{f"l2_sp, {w:g}": Way([{"type": "l2_sp", "strength": w}]) for w in (0.1, 1.0, 10.0)},
    **{
        f"projection, {e:g}": Way([{"type": "projection", "general": ROWS, "earlier": "all", "energy": e}], NEW)
        for e in (0.8, 0.9, 0.97)
    },
}


def stream(name: str, way: Way, rate: float, seed: int, runs: Path, tasks: Sequence[str] = TASKS) -> Stream:
    """The stream of `tasks`, each taught with `way`."""
    own = {"methods": way.methods} | ({"adapter": way.adapter} if way.adapter else {})
    stages = [
        {"name": task, "data": {"task": f"tiny_world/{task}"}, "test": {"task": f"tiny_world/{task}"}, **own}
        for task in tasks
    ]
    return Stream.parse(_about(name, rate, seed, runs) | {"stages": stages})


def joint(rate: float, seed: int, runs: Path) -> Stream:
    """All tasks in one stage, each as often as in its own, for as many steps."""
    data = [{"task": f"tiny_world/{task}", "weight": 1, "name": task} for task in TASKS]
    about = _about(f"joint-{rate:g}-s{seed}", rate, seed, runs)
    about["training"] |= {"max_steps": STEPS * len(TASKS)}
    about["evaluation"]["general"] |= {task: {"task": f"tiny_world/{task}"} for task in TASKS}
    return Stream.parse(about | {"stages": [{"name": "joint", "data": data}]})


def _about(name: str, rate: float, seed: int, runs: Path) -> dict[str, Any]:
    training = {"learning_rate": rate, "per_device_train_batch_size": BATCH, "max_steps": STEPS, "save_steps": 10**6}
    general = {name: {"task": f"tiny_world/{name}"} for name in GENERAL}
    slug = "".join(c if c.isalnum() or c == "-" else "_" for c in name)
    about = {"name": slug, "model": "tiny-world", "seed": seed, "output_dir": str(runs), "training": training}
    return about | {"evaluation": {"general": general, "within": "off"}, "retention": {"models": "last"}}


def figures(done: Run) -> dict[str, Any]:
    """In per cent: general average at the start and the end; each task right after it was learned, and at the end."""
    matrix = summary.read(done.path)
    last = len(matrix["rows"]) - 1
    average = [statistics.mean(exact_match(matrix, row, name) for name in GENERAL) for row in (0, last)]
    tasks = [task for task in TASKS if task in matrix["rows"][-1]["scores"]]
    after = {task: matrix["tasks"].index(task) + 1 if task in matrix["tasks"] else last for task in tasks}
    return {
        "general": average,
        "base": [exact_match(matrix, 0, task) for task in tasks],
        "learned": [exact_match(matrix, after[task], task) for task in tasks],
        "end": [exact_match(matrix, last, task) for task in tasks],
        "seconds": sum(d["facts"]["train_seconds"] for stage in done.stages()[1:] if (d := stage.done())),
    }


def perform(name: str, made: Stream) -> tuple[str, dict[str, Any]]:
    """One run, finished or gone on with, in a process of one thread."""
    import torch

    from cpt import run

    torch.set_num_threads(1)
    path = finished(Planned(name, name, None, made.seed, made))  # by its files: seconds less than by a run
    return name, figures(Run(path) if path else run(made, say=lambda line: None))


def collect(jobs: dict[str, Stream], workers: int) -> dict[str, dict[str, Any]]:
    """Perform them, several at a time."""
    found = {}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for number, future in enumerate(as_completed([pool.submit(perform, *job) for job in jobs.items()]), start=1):
            name, record = future.result()
            found[name] = record
            said = f"learned {statistics.mean(record['learned']):.1f}, general {record['general'][1]:.1f}"
            print(f"{number} of {len(jobs)}: {name}, {said}, {record['seconds']:.0f} s", flush=True)
    return {name: found[name] for name in jobs}


# ---- the table --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One run: means over tasks, in per cent. kept: of all tasks but the last, at the end."""

    learned: float
    general: float
    kept: float

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Point":
        return cls(
            statistics.mean(record["learned"]), record["general"][1], statistics.mean(record["end"][:-1] or [0.0])
        )


def at_score(curve: Iterable[Point], score: float) -> Point | None:
    """Between two rates, what a curve passes through at a new-task score; None where it does not reach it."""
    points = sorted(curve, key=lambda point: point.learned)
    for low, high in pairwise(points):
        if low.learned <= score <= high.learned and low.learned < high.learned:
            x = (score - low.learned) / (high.learned - low.learned)
            return Point(score, low.general + x * (high.general - low.general), low.kept + x * (high.kept - low.kept))
    return None


def table(runs: dict[str, dict[str, Any]], seeds: int) -> list[str]:
    """Markdown: methods at equal new-task scores, every point of their curves, learnability, what could be seen."""
    curves = {
        name: [[Point.of(runs[key(name, rate, seed)]) for rate in RATES] for seed in range(seeds)] for name in METHODS
    }
    head = ["at equal new-task score", "learned at best"]
    head += [f"{what} at {score:.0f} %" for score in SCORES for what in ("general", "earlier tasks")]
    lines = [line(*head), rule(len(head))]
    spreads: list[float] = []
    for name, curve in curves.items():
        cells = [spread([max(point.learned for point in one) for one in curve])]
        for score in SCORES:
            points = [point for one in curve if (point := at_score(one, score))]
            whole = len(points) == seeds
            cells += [spread(getattr(p, what) for p in points) if whole else "-" for what in ("general", "kept")]
            if whole and seeds > 1:
                spreads.append(statistics.stdev(point.general for point in points))
        lines.append(line(name, *cells))
    lines += ["", *_seen(spreads, seeds), "", *_every_point(curves), "", *_learnability(runs, seeds)]
    return lines


def _seen(spreads: Sequence[float], seeds: int) -> list[str]:
    """How far two methods must lie apart in general ability for so many seeds to tell."""
    if not spreads:
        return []
    pooled = (sum(s * s for s in spreads) / len(spreads)) ** 0.5
    least = float(stats.t.ppf(0.975, 2 * seeds - 2)) * pooled * (2 / seeds) ** 0.5
    return [
        f"Standard deviation over seeds of general ability at equal score, pooled over methods: {pooled:.1f} points; "
        f"two methods must differ by {least:.1f} points for {seeds} seeds each to tell (95 %, two-sided t)."
    ]


def _every_point(curves: dict[str, list[list[Point]]]) -> list[str]:
    head = ["general / learned / earlier tasks", *(f"{rate:g}" for rate in RATES)]
    lines = [line(*head), rule(len(head))]
    for name, curve in curves.items():
        cells = []
        for number in range(len(RATES)):
            points = [one[number] for one in curve]
            cells.append(
                " / ".join(spread(getattr(p, what) for p in points) for what in ("general", "learned", "kept"))
            )
        lines.append(line(name, *cells))
    return lines


def _learnability(runs: dict[str, dict[str, Any]], seeds: int) -> list[str]:
    head = ["learnability", "base", *(f"specialist, {rate:g}" for rate in RATES), "joint at its best", "interval above"]
    lines = [line(*head), rule(len(head))]
    for number, task in enumerate(TASKS):
        base = runs[key("sequential", RATES[0], 0)]["base"][number]
        alone = [[runs[key(f"specialist {task}", rate, seed)]["end"][0] for seed in range(seeds)] for rate in RATES]
        together = [[runs[f"joint-{rate:g}-s{seed}"]["end"][number] for seed in range(seeds)] for rate in RATES]
        best = max(alone, key=statistics.mean)
        above = seeds > 1 and statistics.mean(best) - half_width(best) > base
        cells = [f"{base:.1f}", *map(spread, alone), spread(max(together, key=statistics.mean))]
        lines.append(line(task, *cells, "yes" if above else "no"))
    return lines


def key(name: str, rate: float, seed: int) -> str:
    """What a run is called."""
    return f"{name}-{rate:g}-s{seed}"


def jobs(seeds: int, runs: Path) -> dict[str, Stream]:
    """Every run of the table, the cheap answers first: one seed of all before the next."""
    found = {}
    for seed in range(seeds):
        for rate in RATES:
            for name, way in METHODS.items():
                found[key(name, rate, seed)] = stream(key(name, rate, seed), way, rate, seed, runs)
            for task in TASKS:
                name = key(f"specialist {task}", rate, seed)
                found[name] = stream(name, Way(), rate, seed, runs, [task])
            found[f"joint-{rate:g}-s{seed}"] = joint(rate, seed, runs)
    return found


def main() -> None:
    """Run what is not finished, then write the table and its data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/retention"))
    parser.add_argument("--scan", action="store_true", help="try strengths instead, on a seed of their own")
    given = parser.parse_args()
    if given.scan:
        names = {f"scan {name}": way for name, way in SCAN.items()}
        collect({n: stream(n, way, SCAN_RATE, SCAN_SEED, given.runs) for n, way in names.items()}, given.workers)
        return
    runs = collect(jobs(given.seeds, given.runs), given.workers)
    settings = {
        "methods": {name: asdict(way) for name, way in METHODS.items()},
        "learning_rates": RATES,
        "steps": STEPS,
        "batch": BATCH,
        "seeds": list(range(given.seeds)),
        "libraries": libraries(),
    }
    publish("retention", {"settings": settings, "runs": runs}, table(runs, given.seeds))


if __name__ == "__main__":
    main()
