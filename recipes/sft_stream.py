"""Tasks by example, one after the other, and for each what it was worth when learned and at the end.

python recipes/sft_stream.py [--config MY.yaml] [key=value ...]
accelerate launch recipes/sft_stream.py --config MY.yaml
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

    stream = Stream.from_yaml(given.config, given.overrides)
    finished = run(stream)  # the same command goes on after a kill, and keeps the stages that did not change
    if int(os.environ.get("RANK") or 0):
        return  # the first process speaks for all

    rows = json.loads((finished.path / "matrix.json").read_text())["rows"]  # one a stage, the base first
    for task in [stage.name for stage in stream.stages if stage.test]:
        measure = next(iter(rows[0]["scores"][task]))
        learned = next(row for row in rows if row["stage"] == task)
        for when, row in (("base", rows[0]), ("learned", learned), ("at the end", rows[-1])):
            value = row["scores"][task][measure]["value"]  # None where it is undefined, with a reason beside it
            print(f"{task:14} {measure} {when:12} {'undefined' if value is None else f'{value:.3f}'}")
    print(f"open {write_report(finished.path)}")


if __name__ == "__main__":
    as_command(main)
