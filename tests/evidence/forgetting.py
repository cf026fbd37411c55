"""What three stages take from the tiny base, by method: docs/evidence/forgetting.md and its data beside it.

    python -m tests.evidence.forgetting [--seeds 3] [--runs runs/evidence]

About fifteen minutes on one core for three seeds. Interrupted, the same command goes on.
"""

import statistics
from pathlib import Path
from typing import Any

import yaml

from cpt import Run, Stream
from cpt.report import summary
from cpt.resources import bundled
from cpt.run_dir import libraries
from tests.evidence.tables import exact_match, line, over_seeds, publish, rule, spread

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
    matrix = summary.read(done.path)
    tasks = matrix["tasks"]
    return {
        "general": [100 * value for value in matrix["summary"]["exact_match"]["general_average"]],
        "base": [exact_match(matrix, 0, task) for task in tasks],
        "learned": [exact_match(matrix, i, task) for i, task in enumerate(tasks, start=1)],
        "at the end": [exact_match(matrix, len(tasks), task) for task in tasks],
    }


def table(data: dict[str, list[dict[str, list[float]]]]) -> list[str]:
    """Markdown: one line a variant, means and intervals over seeds."""
    lines = ["| | general after 1 | after 2 | after 3 | new task when learned | the three tasks at the end |"]
    lines.append(rule(6))
    for name in VARIANTS:
        seeds = data[name]
        cells = [spread([seed["general"][i] for seed in seeds]) for i in (1, 2, 3)]
        cells += [spread([statistics.mean(seed[key]) for seed in seeds]) for key in ("learned", "at the end")]
        lines.append(line(name, *cells))
    lines += ["", "| learnability: one stage alone | base | specialist |", rule(3)]
    for name, seeds in data.items():
        if name.startswith("specialist"):
            cells = [spread([seed[key][0] for seed in seeds]) for key in ("base", "learned")]
            lines.append(line(name.removeprefix("specialist "), *cells))
    return lines


def main() -> None:
    """Run what is not finished, then write the table and its data."""
    seeds, data = over_seeds(__doc__, streams, figures)
    settings = {"seeds": seeds, "variants": VARIANTS, "libraries": libraries()}
    publish("forgetting", {"settings": settings, "data": data}, table(data))


if __name__ == "__main__":
    main()
