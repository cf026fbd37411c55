"""Plain text in two domains: bits per byte of each after every stage.

python recipes/pretrain_stream.py [--config MY.yaml] [key=value ...]
accelerate launch recipes/pretrain_stream.py --config MY.yaml
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
        scores = {name: by["bits_per_byte"] for name, by in folder.results().items() if "bits_per_byte" in by}
        said = ", ".join(f"{name} {one['value']:.3f}" for name, one in scores.items() if one["value"] is not None)
        print(f"{folder.path.name:14} bits per byte: {said}")
    print(f"open {write_report(finished.path)}")


if __name__ == "__main__":
    as_command(main)
