"""The pictures of docs/assets: the report of the quickstart in light, dark and on a phone, and the comparison.

    python -m tests.evidence.screenshots [--out docs/assets] [--runs runs/screenshots]

Runs quickstart_naive and quickstart (two minutes on one core; finished runs are kept) and needs Chromium with its
driver.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from cpt.report.page import write
from tests.browser.look import look

LARGEST = 300_000  # bytes of a picture
HEIGHTS = {"light": 1500, "dark": 1500, "phone": 1600}  # CSS pixels from the top of the page


def cpt(*arguments: str) -> None:
    """The command line, in a process of its own; raises CalledProcessError with its output shown."""
    subprocess.run([sys.executable, "-m", "cpt", *arguments], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def take(runs: Path, out: Path) -> list[Path]:
    """Train, report, compare, look; gives the pictures. Raises ValueError for one that is too large."""
    names = ("quickstart_naive", "quickstart")
    for name in names:
        cpt("run", name, f"output_dir={runs}", "evaluation.within.every=10")
    naive, replay = (str(newest(runs, name)) for name in names)
    cpt("compare", naive, replay, "--html", str(runs / "compare.html"))
    report = write(replay)
    pictures = []
    for view, height in HEIGHTS.items():
        pictures += look(report, out, [view], height, prefix="report_")
    (drawn,) = look(runs / "compare.html", out, ["light"], HEIGHTS["light"])
    pictures.append(drawn.replace(out / "compare.png"))
    for picture in pictures:
        if (size := picture.stat().st_size) > LARGEST:
            raise ValueError(f"{picture}: {size} bytes; pictures of the repository have at most {LARGEST}")
    return pictures


def newest(runs: Path, name: str) -> Path:
    """The newest run of a name: quickstart is the beginning of quickstart_naive too."""
    return max(path for path in runs.glob(f"{name}-*") if path.name.removeprefix(f"{name}-")[:1].isdigit())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("docs/assets"))
    parser.add_argument("--runs", type=Path, default=Path("runs/screenshots"))
    options = parser.parse_args()
    for picture in take(options.runs, options.out):
        print(picture, picture.stat().st_size)


if __name__ == "__main__":
    main()
