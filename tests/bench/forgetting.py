"""What a step that forgets costs, against a step of supervised training over as many rows of the same length.

On the Llama of `tests.bench.training`. FLAT and DPO have two rows to forget and their two templates, NPO four rows.

python -m tests.bench.forgetting SIDE trains one side and prints its peak resident memory in MiB.
"""

import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cpt.data.forgetting import ForgetData
from cpt.data.stage_data import TASK
from cpt.data.tokens import TokenRows
from cpt.methods.base import Method, StageInfo
from cpt.methods.dpo import DPO
from cpt.methods.flat import FLAT
from cpt.methods.npo import NPO
from cpt.quiet import quiet
from cpt.trainers import unlearn
from cpt.trainers.session import Session
from tests.bench import training
from tests.bench.figures import Figure, ratio_of
from tests.bench.timing import StepEnd, interleave, pin_allocator, steps_for

SIDES: dict[str, type[Method]] = {"flat": FLAT, "npo": NPO, "dpo": DPO}
SFT = "sft"
STEPS = 4  # of a side whose memory is measured


def forgetting(repeats: int) -> list[Figure]:
    """Seconds of a step in one process, all sides in turns; peak memory of a process of each."""
    with TemporaryDirectory() as folder, quiet():
        pin_allocator()
        steps = steps_for(repeats)
        sides = {name: partial(side, name, Path(folder) / name, steps) for name in (*SIDES, SFT)}
        seconds, _ = interleave(sides, repeats)
    peaks = {name: [_peak(name) for _ in range(3)] for name in (*SIDES, SFT)}
    return [
        *(
            ratio_of(f"{name} step / sft of as many rows", seconds[name], seconds[SFT], (name, SFT), most=1.10)
            for name in SIDES
        ),
        *(
            ratio_of(f"{name}, peak memory / sft", peaks[name], peaks[SFT], (name, SFT), most=1.05, measured="MiB")
            for name in SIDES
        ),
    ]


def side(name: str, folder: Path, steps: int, step_end: StepEnd) -> dict[str, Any]:
    """Train one side for so many steps; its facts."""
    if name == SFT:
        return training.stage(folder, steps, step_end)
    method = SIDES[name]()
    whole = TokenRows(training.rows())
    beside = [whole] if "template" in method.needs else []
    batch = training.BATCH // 2 if beside else training.BATCH
    data = ForgetData(training.no_sources, {TASK: whole}, templates=beside)
    record = partial(training.recorded, folder / "memory")
    about: dict[str, Any] = {"memory": folder / "memory", "parent": "start", "record": record}
    info = StageInfo(index=1, name="bench", kind="unlearn", seed=0, batch_rows=batch, **about)
    method.prepare_data(data, info)
    settings = training.TRAINING | {"max_steps": steps, "per_device_train_batch_size": batch}
    session = Session(folder, step_end, lambda line: None)
    return unlearn.train(training.llama, training.tokenizer(), data, info, [method], settings, session).facts


def _peak(name: str) -> float:
    """Of a process that trains this side for a few steps, in MiB."""
    command = [sys.executable, "-m", "tests.bench.forgetting", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    with TemporaryDirectory() as at, quiet():
        side(sys.argv[1], Path(at), STEPS, lambda: False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
