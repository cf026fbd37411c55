"""Real tasks one after the other: news, word problems, an encyclopedia. Needs the Hub, or --data with the files.

python recipes/classic_stream.py [--config MY.yaml] [key=value ...]
accelerate launch recipes/classic_stream.py --config MY.yaml
"""

import argparse
import json
import os
from pathlib import Path

from cpt import Stream, as_command, run, write_report


def main() -> None:
    """Read the stream, run it, show what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default=str(Path(__file__).with_suffix(".yaml")), help="a stream")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. training.max_steps=10")
    given = parser.parse_args()

    stream = Stream.from_yaml(given.config, given.overrides)  # e.g. data_root=DATA model=MODEL training.max_steps=190
    finished = run(stream)
    if int(os.environ.get("RANK") or 0):
        return  # the first process speaks for all

    summary = json.loads((finished.path / "matrix.json").read_text())["summary"]
    for measure, found in summary.items():
        for metric in (one for one in found.values() if isinstance(one, dict) and one["value"] is not None):
            print(f"{measure:14} {metric['value']:+.3f}  {metric['formula']}")
    print(f"open {write_report(finished.path)}")


if __name__ == "__main__":
    as_command(main)
