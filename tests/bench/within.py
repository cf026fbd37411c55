"""What scoring a model while it trains costs, at its default: on the quickstart's tiny stages, and at 65 M parameters.

The share is that of the stage's own clock. The ratio against the same stage without is what a user waits for; it holds
the noise of two trainings.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from cpt import Stream, run
from cpt.config import Within
from cpt.data.stage_data import TASK, StageData
from cpt.data.tokens import TokenRows
from cpt.methods.base import StageInfo
from cpt.processes import Processes
from cpt.quiet import quiet
from cpt.trainers import sft
from cpt.trainers.session import Session
from cpt.within import Watch, Work
from eval_harness.items import EvalSet
from eval_harness.rows import canonical
from eval_harness.sources import read_rows
from tests.bench import training
from tests.bench.commands import ROOT
from tests.bench.figures import Figure, median_of, ratio_of

MOST_PAIRS = 2  # of quickstarts; each has three stages
STEPS = 60  # of the 65 M Llama: five evaluations of 8 rows of each set
SETS = ("facts", "sums", "copy")
MOST = 5.0  # per cent of a stage's time


def within(repeats: int) -> list[Figure]:
    """Three stages of the quickstart with and without, and one large stage by its own clock."""
    pairs = min(repeats, MOST_PAIRS)
    with TemporaryDirectory() as folder, quiet(), one_thread():
        on, off = list[dict[str, Any]](), list[dict[str, Any]]()
        for number in range(pairs):
            off += quickstart(Path(folder) / f"off{number}", "off")
            on += quickstart(Path(folder) / f"on{number}", "auto")
        large = [share(llama(Path(folder) / "large"))]
    seconds = [[facts["train_seconds"] for facts in side] for side in (on, off)]
    return [
        median_of("scoring within a stage, tiny world", [share(facts) for facts in on], "% of its time", MOST),
        ratio_of("stage scored while it trains / not, tiny world", *seconds, ("scored", "not"), most=1.05),
        median_of("scoring within a stage, 65 M Llama", large, "% of its time", MOST),
    ]


@contextmanager
def one_thread() -> Iterator[None]:
    """The tiny model's matrices are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def quickstart(folder: Path, setting: str) -> list[dict[str, Any]]:
    """Facts of the stages of one run of the quickstart."""
    changes = [f"output_dir={folder}", f"evaluation.within={setting}"]
    done = run(Stream.from_yaml(ROOT / "recipes" / "quickstart.yaml", changes), say=lambda line: None)
    return [stage.done()["facts"] for stage in done.stages()[1:]]  # type: ignore[index]


def share(facts: dict[str, Any]) -> float:
    """Per cent of the time from the trainer's start to its end."""
    return 100 * facts["within"]["seconds"] / facts["train_seconds"]


def llama(folder: Path) -> dict[str, Any]:
    """Facts of a stage of the bench's Llama that is scored on rows of the tiny world."""
    data = StageData(load=training.no_sources)
    data.sources[TASK] = TokenRows(training.rows())
    watch = Watch(
        Within(),
        [EvalSet(name, [canonical(r) for r in read_rows(task=f"tiny_world/{name}", split="test")]) for name in SETS],
        training.tokenizer(),
        Work(step=training.BATCH * training.LENGTH, batch=training.BATCH * training.LENGTH, forward=1 / 3),
        window=training.LENGTH,
        seed=0,
        file=folder / "within.jsonl",
        earlier=[],
        batch_tokens=None,
        say=print,
        processes=Processes(),
    )
    info = StageInfo(index=1, name="bench", kind="sft", seed=0, batch_rows=training.BATCH, world=1)
    session = Session(folder, lambda: False, lambda line: None, Processes(), watch)
    arguments = training.TRAINING | {"max_steps": STEPS}
    return sft.train(training.llama, training.tokenizer(), data, info, (), arguments, session).facts
