"""Killed at any moment and run again, a stream ends with the same bits as one that was never killed."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import sabotage
from tests.e2e.processes import cpt, output, start

pytestmark = pytest.mark.e2e

SEED = 20261122  # of the ten moments; a failure prints the moment it drew
STREAM = Path(__file__).with_name("every_kind.yaml")
COMMAND = ["run", str(STREAM)]


def bits(folder: Path) -> dict[str, str]:
    """Hash of every stage's weights and of the matrix."""
    (run,) = (folder / "runs").glob("small-*")
    files = [*sorted(run.glob("stages/*/model/**/*.safetensors")), run / "matrix.json"]
    return {file.relative_to(run).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def steps_logged(folder: Path) -> int:
    """Steps that the run in this folder has logged so far, over all stages."""
    return sum(file.read_bytes().count(b"\n") for file in (folder / "runs").glob("small-*/stages/*/metrics.jsonl"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], float]:
    """Bits of a run that was left alone, and its duration from the first step to the end, in seconds."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(COMMAND, folder)
    wait_for(lambda: steps_logged(folder) > 0, process)
    began = time.monotonic()
    process.join(300)
    assert process.exitcode == 0, output(folder)
    found = bits(folder)
    assert len(found) == 5
    return found, time.monotonic() - began


def wait_for(condition: Callable[[], bool], process: Any) -> None:
    while not condition():
        assert process.exitcode is None
        time.sleep(0.005)


@pytest.mark.parametrize("number", range(10))
def test_killed_at_a_random_moment(uninterrupted: tuple[dict[str, str], float], tmp_path: Path, number: int) -> None:
    expected, seconds = uninterrupted
    moment = random.Random(SEED + number).uniform(0.0, 1.0)
    for attempt in range(4):  # a machine that speeds up or slows down must not let the kill miss the run
        folder = tmp_path / str(attempt)
        folder.mkdir()
        process = start(COMMAND, folder)
        wait_for(lambda folder=folder: steps_logged(folder) > 0, process)
        began = time.monotonic()
        process.join(moment * seconds)
        if process.exitcode is None:
            break
        seconds = time.monotonic() - began
    assert process.exitcode is None, f"the kill at {moment:.3f} of the run came after its end"
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert steps_logged(folder) > 0, "the kill came before the first step"
    code, printed = cpt(COMMAND, folder)
    assert code == 0, printed
    assert bits(folder) == expected, f"killed at {moment:.3f} of the run"


POINTS = [
    (sabotage.inside_optimizer_step, 40),
    (sabotage.in_the_middle_of_a_checkpoint, 3),
    (sabotage.before_the_seal, 1),
    (sabotage.before_the_seal, 10),
    (sabotage.before_done, 1),
    (sabotage.before_done, 2),
    (sabotage.before_done, 4),
    (sabotage.inside_optimizer_step, 201),  # two calls a step: in the rewarded stage, between two generations
    (sabotage.inside_optimizer_step, 231),  # in the adapter's
    (sabotage.in_the_middle_of_a_checkpoint, 14),
    (sabotage.in_evaluation, 2),
    (sabotage.in_evaluation, 5),
    (sabotage.before_eval_done, 2),
]


@pytest.mark.parametrize(("point", "number"), POINTS, ids=[f"{p.__name__}-{n}" for p, n in POINTS])
def test_killed_at_a_named_point(
    uninterrupted: tuple[dict[str, str], float], tmp_path: Path, point: Callable[[int], None], number: int
) -> None:
    code, printed = cpt(COMMAND, tmp_path, (point, number))
    assert code == -signal.SIGKILL, printed
    code, printed = cpt(COMMAND, tmp_path)
    assert code == 0, printed
    assert bits(tmp_path) == uninterrupted[0]


def test_sigterm_writes_a_checkpoint_and_says_resume_me(
    uninterrupted: tuple[dict[str, str], float], tmp_path: Path
) -> None:
    process = start(COMMAND, tmp_path)
    wait_for(lambda: steps_logged(tmp_path) > 9, process)
    process.terminate()
    process.join(60)
    assert process.exitcode == 75
    assert "run the same command again" in output(tmp_path)
    (seal,) = (tmp_path / "runs").glob("small-*/stages/01_reverse/checkpoints/checkpoint-1?/SEAL.json")
    assert "optimizer.pt" in json.loads(seal.read_text())
    (run,) = (tmp_path / "runs").glob("small-*")
    code, printed = cpt(["resume", str(run)], tmp_path)
    assert code == 0, printed
    assert bits(tmp_path) == uninterrupted[0]
