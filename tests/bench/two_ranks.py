"""Rows per second of an sft stage: two ranks (gloo) on two cores against one process on one core.

A 17.3 M Llama on batches of 16 x 128 tokens, all of them on the one process, 8 a rank on two: the gradients that two
ranks exchange are 69 MB a step. Every process has one core and one thread. The bench imports no torch for this: each
side is a process of its own, `python -m tests.bench.two_ranks FOLDER` or the same under torchrun.
"""

import json
import os
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from tests.bench.commands import ROOT
from tests.bench.figures import Figure, ratio_of

BATCH, WARM, TIMED = 16, 2, 6  # rows of the effective batch; steps that are not counted, and that are
SHAPE = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
}
MOST_REPEATS = 5  # a pair starts three processes, most of whose time is import

PYTHON = [sys.executable, "-m"]
SIDES = {1: PYTHON, 2: [*PYTHON, "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]}


def two_ranks(repeats: int) -> list[Figure]:
    """One, two, one, two, ...: at most five pairs; the median step of each run. Nothing where there is one core."""
    if len(cores()) < 2:
        print(f"note: two ranks need two cores, and this process may use {len(cores())}: left out")
        return []
    speeds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(min(repeats, MOST_REPEATS)):
        for world in speeds:
            speeds[world].append(BATCH / seconds_per_step(world))
    name = "two ranks on two cores / one process on one core"
    sides = ("two ranks", "one process")
    return [ratio_of(name, speeds[2], speeds[1], sides, least=1.5, measured="rows per second")]


def cores() -> list[int]:
    """The cores that this process may use; none where the system does not tell (macOS)."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def seconds_per_step(world: int) -> float:
    """Run one side. Raises RuntimeError when it fails, or was not as many processes as asked for."""
    with TemporaryDirectory() as folder:
        child = subprocess.run(
            [*SIDES[world], "tests.bench.two_ranks", folder],
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if child.returncode:
            raise RuntimeError(f"the side of {world} processes exited {child.returncode}:\n{child.stdout[-4000:]}")
        found = json.loads((Path(folder) / "0.json").read_text(encoding="utf-8"))
    if found["processes"] != world:
        raise RuntimeError(f"asked for {world} processes, trained on {found['processes']}")
    return median(found["seconds"])


def train(folder: Path) -> None:
    """What each process does: take its core, train, and write the seconds of the timed steps to FOLDER/RANK.json."""
    rank, world = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    os.sched_setaffinity(0, {cores()[rank]})  # before torch is here: its threads stay where they are born
    from cpt.quiet import quiet
    from tests.bench import training

    ends: list[float] = []

    def step_end() -> bool:
        ends.append(time.perf_counter())
        return False

    steps = 1 + WARM + TIMED + 1  # between two ends lies a step, and the last step has none
    with quiet():
        facts = training.stage(
            folder, steps, step_end, open_model=partial(training.llama, **SHAPE), batch=BATCH, world=world
        )
    seconds = [after - before for before, after in pairwise(ends)][WARM:]
    record = {"processes": facts["processes"], "seconds": seconds}
    (folder / f"{rank}.json").write_text(json.dumps(record), encoding="utf-8")
    leave(world)


def leave(world: int) -> None:
    """End a rank: a gloo thread that is still alive when the interpreter goes may abort it, after success."""
    if world > 1:
        import torch.distributed as dist

        dist.barrier()
        dist.destroy_process_group()
        os._exit(0)


if __name__ == "__main__":
    train(Path(sys.argv[1]))
