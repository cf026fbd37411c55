"""A stage by reward, with a reward of your own beside the shipped one.

python recipes/rft_stream.py [--config MY.yaml] [key=value ...]
accelerate launch recipes/rft_stream.py --config MY.yaml
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from cpt import Stream, as_command, run, write_report


def near(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """1 for the right number, less the further away, 0 for what is no number: something to climb by.

    A reward is given the completions, the rows' `answer` and what else of a row its arguments name; a list as long as
    the completions comes back. What it raises scores 0 and is counted.
    """

    def score(text: str, right: str) -> float:
        return 1 / (1 + abs(int(text) - int(right))) if text.isdecimal() and right.isdecimal() else 0.0

    return [score(text.strip(), right.strip()) for text, right in zip(completions, answer, strict=True)]


def main() -> None:
    """Read the stream, give it this reward, run it, show how the reward grew."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default=str(Path(__file__).with_suffix(".yaml")), help="a stream")
    parser.add_argument("--own", action="store_true", help="add the reward of this file, half as heavy")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. training.max_steps=10")
    given = parser.parse_args()

    sys.path.insert(0, str(Path(__file__).parent))  # every process finds the function by its path
    own = ["stages.0.rewards=[exact_match, {type: 'rft_stream:near', weight: 0.5}]"] if given.own else []
    stream = Stream.from_yaml(given.config, [*own, *given.overrides])
    finished = run(stream)
    if int(os.environ.get("RANK") or 0):
        return  # the first process speaks for all

    for stage in stream.stages:
        lines = (finished.find(stage.name).path / "metrics.jsonl").read_text().splitlines()
        rewards = [one["reward"] for one in map(json.loads, lines) if "reward" in one]
        if rewards:  # none in a stage by example, or in one that ends before `logging_steps`
            print(f"{stage.name}: reward {rewards[0]:.3f} at first, {rewards[-1]:.3f} at last")
    print(f"open {write_report(finished.path)}")


if __name__ == "__main__":
    as_command(main)
