"""What a reward teaches the tiny base about sums it gets wrong: docs/evidence/rewarded.md and its data beside it.

    python -m tests.evidence.rewarded [--seeds 3] [--runs runs/evidence]

About five minutes on one core for three seeds. Interrupted, the same command goes on.
"""

import statistics
from functools import partial
from pathlib import Path
from typing import Any

from cpt import Run, Stream
from cpt.report import summary
from cpt.run_dir import libraries
from cpt.trainers.session import read_metrics
from tests.evidence.tables import exact_match, line, over_seeds, publish, rule, spread

REPLAY = {"type": "replay", "ratio": 0.25, "general": {"task": "tiny_world/general"}}
VARIANTS: dict[str, dict[str, Any]] = {
    "reward alone": {},
    "replay 25 %": {"methods": [REPLAY]},
    "kl to the base": {"kl": {"to": "base", "weight": 0.1}},
    "kl to the base + replay 25 %": {"kl": {"to": "base", "weight": 0.1}, "methods": [REPLAY]},
    "LoRA r 8": {"adapter": "new", "training": {"learning_rate": 3e-3}},
    "hft": {"methods": [{"type": "hft", "embeddings": "frozen"}]},
}
SHOWN = ("before", "after", "first quarter", "last quarter", "known_sums after")
SETTINGS: dict[str, Any] = {
    "learning_rate": 3e-4,
    "per_device_train_batch_size": 64,
    "num_generations": 8,
    "max_completion_length": 4,
    "max_steps": 100,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_steps": 50,
}


def streams(seed: int, runs: Path) -> dict[str, Stream]:
    """One rewarded stage on the base, by variant."""
    found = {}
    for number, (name, changes) in enumerate(VARIANTS.items()):
        stage = {
            "name": "sums",
            "kind": "rft",
            "data": {"task": "tiny_world/sums_rewarded"},
            "test": {"task": "tiny_world/sums_rewarded"},
            "rewards": ["exact_match"],
            **{key: value for key, value in changes.items() if key != "training"},
            "training": changes.get("training", {}),
        }
        general = {name: {"task": f"tiny_world/{name}"} for name in ("facts", "copy", "sort")}
        found[name] = Stream.parse(
            {
                "name": f"rewarded{number}-seed{seed}",
                "model": "tiny-world",
                "seed": seed,
                "output_dir": str(runs),
                "training": SETTINGS,
                "stages": [stage],
                "evaluation": {"general": general | {"known_sums": {"task": "tiny_world/sums"}}},
            }
        )
    return found


def figures(done: Run) -> dict[str, float]:
    """Shares in per cent before and after the stage, the mean reward of its first and last quarter, its seconds."""
    score = partial(exact_match, summary.read(done.path))
    folder = done.find("sums")
    rewards = [step["reward"] for step in read_metrics(folder.path / "metrics.jsonl") if "reward" in step]
    quarter = len(rewards) // 4
    found = {"before": score(0, "sums"), "after": score(1, "sums")}
    found |= {f"{name} after": score(1, name) for name in ("known_sums", "facts", "copy", "sort")}
    found |= {"first quarter": 100 * statistics.mean(rewards[:quarter])}
    found |= {"last quarter": 100 * statistics.mean(rewards[-quarter:])}
    return found | {"seconds": (folder.done() or {})["facts"]["train_seconds"]}


def table(data: dict[str, list[dict[str, float]]]) -> list[str]:
    """Markdown: one line a variant, means and intervals over seeds."""
    lines = ["| | asked sums before | after | rise | reward, first quarter | last quarter | known sums | general |"]
    lines.append(rule(8))
    for name, seeds in data.items():
        general = [statistics.mean(seed[f"{key} after"] for key in ("facts", "copy", "sort")) for seed in seeds]
        rise = [seed["after"] - seed["before"] for seed in seeds]
        before, after, *others = ([seed[key] for seed in seeds] for key in SHOWN)
        lines.append(line(name, *map(spread, (before, after, rise, *others, general))))
    return lines


def main() -> None:
    """Run what is not finished, then write the page and its data."""
    seeds, data = over_seeds(__doc__, streams, figures)
    about = {"seeds": seeds, "settings": SETTINGS, "variants": VARIANTS, "libraries": libraries()}
    lines = table(data)
    page = PAGE.format(seeds=seeds, table="\n".join(lines))
    publish("rewarded", about | {"figures": data}, lines, page)


PAGE = """# What a reward teaches: sums that the tiny base gets wrong

Made by `python -m tests.evidence.rewarded`, {seeds} seeds; exact match and mean reward in per cent, mean and 95 %
t-interval over seeds; settings and all figures in [rewarded.json](rewarded.json).

One rft stage of 100 steps (about ten seconds) on the pairs withheld from the base's training, each posed in two of its
three phrasings, eight completions a prompt, reward 1 for the right sum. *Asked sums* are the third phrasing of the same
35 pairs: never rewarded, 54 % right before. *Known sums* are those the base was trained on, *general* is the mean of
facts, copy and sort: what the stage should not cost.

{table}

The first row is the learnability row: the rise stands above zero by more than its interval. What is learned are these
pairs: posing two thirds of the pairs leaves the other third where it was (tried at two learning rates, see the log).

What it costs are the sums the base knew: a sixth of them, with reward alone. Replay keeps them and costs the reward
nothing. KL to the base at 0.1 does not: it holds the policy on the prompts that are asked, and forgetting happens on
the others. hft halves the loss, within its interval. LoRA at this rank and rate learns less evenly over seeds.
"""


if __name__ == "__main__":
    main()
