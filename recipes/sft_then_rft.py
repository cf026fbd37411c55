"""One adapter, first by example, then by reward; what each stage made right.

python recipes/sft_then_rft.py [--config MY.yaml] [key=value ...]
accelerate launch recipes/sft_then_rft.py --config MY.yaml
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

    stream = Stream.from_yaml(given.config, given.overrides)
    finished = run(stream)
    if int(os.environ.get("RANK") or 0):
        return  # the first process speaks for all

    for folder in finished.stages():
        done = folder.done() or {"facts": {}}  # the base was not trained
        made = done["facts"].get("lineage", "the base")
        shares = {name: next(iter(by.values()))["value"] for name, by in folder.results().items()}
        print(f"{made}: " + ", ".join(f"{name} {value:.3f}" for name, value in shares.items() if value is not None))
    print(f"open {write_report(finished.path)}")


if __name__ == "__main__":
    as_command(main)
