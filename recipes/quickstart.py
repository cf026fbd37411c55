"""Three stages twice, without and with replay, side by side: what a stream forgets and what one line changes.

python recipes/quickstart.py [--config MY.yaml] [key=value ...]
accelerate launch recipes/quickstart.py --config MY.yaml
"""

import argparse
import os
from pathlib import Path

from cpt import Stream, as_command, run, summarize, write_report

HERE = Path(__file__).parent


def main() -> None:
    """Run the stream without its methods, then as it is, and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default=str(HERE / "quickstart.yaml"), help="a stream")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. training.max_steps=10")
    given = parser.parse_args()

    stream = Stream.from_yaml(given.config, given.overrides)
    without = [f"stages.{stage.name}.methods=[]" for stage in stream.stages]
    naive = Stream.from_yaml(given.config, [*given.overrides, f"name={stream.name}_naive", *without])
    finished = [run(one) for one in (naive, stream)]
    if int(os.environ.get("RANK") or 0):
        return  # the first process speaks for all

    print(summarize([one.path for one in finished]))
    for one in finished:
        print(f"open {write_report(one.path)}")


if __name__ == "__main__":
    as_command(main)
