"""What the command line costs: start-up, validation, and both quickstart streams. Imports no torch.

A child's peak memory counts from its fork, so this process must stay small while it measures one.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from tests.bench.figures import Figure, median_of

ROOT = Path(__file__).resolve().parents[2]


class Cost(NamedTuple):
    """Of one process and its children."""

    seconds: float
    peak_gib: float


def start_up(repeats: int) -> list[Figure]:
    """`cpt --help`, and `cpt validate` once the field names of TRL's SFTConfig are cached."""
    bounds = {("--help",): 0.5, ("validate", "quickstart"): 3.0}
    for arguments in bounds:
        cpt(*arguments)  # writes bytecode and the cache of field names
    seconds: dict[tuple[str, ...], list[float]] = {arguments: [] for arguments in bounds}
    for _ in range(repeats):
        for arguments in bounds:
            seconds[arguments].append(cpt(*arguments).seconds)
    return [median_of(f"cpt {' '.join(a)}", seconds[a], "s", most) for a, most in bounds.items()]


def quickstart(repeats: int) -> list[Figure]:
    """Both streams, once, one behind the other as `make quickstart` runs them, into a folder that is empty."""
    with TemporaryDirectory() as folder:
        names = ("quickstart_naive", "quickstart")
        costs = [cpt("run", name, f"output_dir={folder}") for name in names]
        evaluation = sum(_seconds(file) for file in Path(folder).glob("*/stages/*/eval/DONE"))
        training = sum(_seconds(file) for file in Path(folder).glob("*/stages/*/DONE"))
    seconds, peaks = [cost.seconds for cost in costs], [cost.peak_gib for cost in costs]
    parts = {"training seconds": [training], "evaluation seconds": [evaluation]}
    return [
        Figure("quickstart, both streams", sum(seconds) / 60, "min", 6, samples={"total seconds": [sum(seconds)]}),
        Figure("quickstart, peak memory", max(peaks), "GiB", 4),
        Figure("quickstart, evaluation / total time", evaluation / sum(seconds), "x", 0.2, samples=parts),
    ]


def cpt(*arguments: str) -> Cost:
    """Run the command from this checkout. Raises RuntimeError with its output when it fails."""
    # A user's installation has its bytecode: without it every start would compile ours again.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    began = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "cpt.cli", *arguments],
        cwd=ROOT,
        env=env | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},  # one thread, as `make quickstart` has it
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert child.stdout is not None
    printed = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"cpt {' '.join(arguments)} exited {child.returncode}:\n{printed}")
    return Cost(seconds, usage.ru_maxrss / 2**20)


def _seconds(done: Path) -> float:
    return float(json.loads(done.read_text(encoding="utf-8"))["facts"]["seconds"])
