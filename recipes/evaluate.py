"""A model measured as a stream measures it, nothing trained: stage 0.

python recipes/evaluate.py [--config MY.yaml] [key=value ...]
accelerate launch recipes/evaluate.py --config MY.yaml
"""

import argparse
import os
from pathlib import Path

from cpt import Stream, as_command, run, write_report


def main() -> None:
    """Read the stream, run it, show what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default=str(Path(__file__).with_suffix(".yaml")), help="a stream")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. training.max_steps=10")
    given = parser.parse_args()

    stream = Stream.from_yaml(given.config, given.overrides)  # e.g. model=FOLDER
    finished = run(stream)
    if int(os.environ.get("RANK") or 0):
        return  # the first process speaks for all

    for name, measures in finished.find("base").results().items():
        for measure, one in measures.items():
            error = "" if one["stderr"] is None else f" +- {1.96 * one['stderr']:.3f}"
            value = "undefined" if one["value"] is None else f"{one['value']:.3f}{error}"
            print(f"{name:16} {measure:16} {value:18} n = {one['n']}")
    print(f"open {write_report(finished.path)}")


if __name__ == "__main__":
    as_command(main)
