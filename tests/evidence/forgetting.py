"""What three stages take from the tiny base, by method: docs/evidence/forgetting.md and its data beside it.

    python -m tests.evidence.forgetting [--seeds 3] [--runs runs/evidence]

About fifteen minutes on one core for three seeds. Interrupted, the same command goes on.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import yaml

from cpt import Run, Stream, run
from cpt.resources import bundled
from cpt.run_dir import libraries
from tests.evidence.tables import replace_table, spread

OUT = Path(__file__).parents[2] / "docs" / "evidence"
GENERAL = {"task": "tiny_world/general"}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "no method": [],
    "replay 10 % general": [{"type": "replay", "ratio": 0.09375, "general": GENERAL}],
    "replay 25 % general": [{"type": "replay", "ratio": 0.25, "general": GENERAL}],
    "replay 25 % earlier stages": [{"type": "replay", "ratio": 0.25, "earlier": "all"}],
    "replay 12.5 % general + 12.5 % earlier": [
        {"type": "replay", "ratio": 0.125, "general": GENERAL},
        {"type": "replay", "ratio": 0.125, "earlier": "all", "name": "earlier"},
    ],
    "hft, embeddings frozen": [{"type": "hft", "embeddings": "frozen"}],
    "hft + replay 25 % general": [
        {"type": "hft", "embeddings": "frozen"},
        {"type": "replay", "ratio": 0.25, "general": GENERAL},
    ],
}


def streams(seed: int, runs: Path) -> dict[str, Stream]:
    """Every variant of the quickstart, and each stage alone from the base (the specialists)."""
    raw = yaml.safe_load((bundled("recipes") / "quickstart_naive.yaml").read_text(encoding="utf-8"))
    raw |= {"seed": seed, "output_dir": str(runs), "retention": {"models": "last"}}
    found = {}
    for number, (name, methods) in enumerate(VARIANTS.items()):
        stages = [stage | {"methods": methods} for stage in raw["stages"]]
        found[name] = Stream.parse(raw | {"name": f"variant{number}-seed{seed}", "stages": stages})
    for stage in raw["stages"]:
        name = f"specialist {stage['name']}"
        found[name] = Stream.parse(raw | {"name": f"{stage['name']}-seed{seed}", "stages": [stage]})
    return found


def figures(done: Run) -> dict[str, list[float]]:
    """Shares in per cent: the general average after each stage, each task right after it was learned and at the end."""
    matrix = json.loads((done.path / "matrix.json").read_text(encoding="utf-8"))
    rows, tasks = matrix["rows"], matrix["tasks"]

    def score(stage: int, task: str) -> float:
        return 100 * rows[stage]["scores"][task]["exact_match"]["value"]

    return {
        "general": [100 * value for value in matrix["summary"]["exact_match"]["general_average"]],
        "base": [score(0, task) for task in tasks],
        "learned": [score(i, task) for i, task in enumerate(tasks, start=1)],
        "at the end": [score(len(tasks), task) for task in tasks],
    }


def table(data: dict[str, list[dict[str, list[float]]]]) -> list[str]:
    """Markdown: one line a variant, means and intervals over seeds."""
    lines = ["| | general after 1 | after 2 | after 3 | new task when learned | the three tasks at the end |"]
    lines.append("|---|---|---|---|---|---|")
    for name in VARIANTS:
        seeds = data[name]
        cells = [spread([seed["general"][i] for seed in seeds]) for i in (1, 2, 3)]
        cells += [spread([statistics.mean(seed[key]) for seed in seeds]) for key in ("learned", "at the end")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| learnability: one stage alone | base | specialist |", "|---|---|---|"]
    for name, seeds in data.items():
        if name.startswith("specialist"):
            cells = [spread([seed[key][0] for seed in seeds]) for key in ("base", "learned")]
            lines.append(f"| {name.removeprefix('specialist ')} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Run what is not finished, then write the table and its data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the tiny model's matrices are too small to share
    data: dict[str, list[dict[str, list[float]]]] = {}
    for seed in range(arguments.seeds):
        for name, stream in streams(seed, arguments.runs).items():
            print(f"seed {seed}: {name}", flush=True)
            data.setdefault(name, []).append(figures(run(stream, say=lambda line: None)))
    settings = {"seeds": arguments.seeds, "variants": VARIANTS, "libraries": libraries()}
    (OUT / "forgetting.json").write_text(json.dumps({"settings": settings, "data": data}, indent=1) + "\n")
    lines = table(data)
    replace_table(OUT / "forgetting.md", lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
