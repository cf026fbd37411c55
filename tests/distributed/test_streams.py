"""Whole streams on two real processes: the matrix of one, under every launcher that runs here.

What a stage of sft learns is the same to rounding, so its losses and scores agree to 2e-3 (an item whose two best
tokens lie closer than that would flip; none does here). A rewarded stage draws other completions on another number
of processes, so it is held to 20 points on its 35 rows, two and a half standard errors; its replay, its counts and
its record are exact.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launcher import TORCHRUN, finished, launched, rank, require_deepspeed
from tests.e2e.processes import cpt

pytestmark = pytest.mark.distributed

STREAM = Path(__file__).with_name("stream.yaml")
HALF = "training.per_device_train_batch_size=8"


def matrix(folder: Path) -> list[dict[str, Any]]:
    (run,) = (folder / "runs").glob("shared-*")
    return json.loads((run / "matrix.json").read_text())["rows"]


def facts(folder: Path, stage: str) -> dict[str, Any]:
    (done,) = (folder / "runs").glob(f"shared-*/stages/*_{stage}/DONE")
    return json.loads(done.read_text())["facts"]


def agree(one: list[dict[str, Any]], two: list[dict[str, Any]], stages: int) -> None:
    """The rows of the base and the sft stage to 2e-3, the rewarded stage's to what sampling allows."""
    assert len(one) == len(two) == stages + 1
    for number, (a, b) in enumerate(zip(one, two, strict=True)):
        assert a["scores"].keys() == b["scores"].keys()
        for name, measures in a["scores"].items():
            for measure, result in measures.items():
                off = 2e-3 if number < 2 else {"exact_match": 0.2, "answer_loss": 0.4, "bits_per_byte": 0.05}[measure]
                assert b["scores"][name][measure]["value"] == pytest.approx(result["value"], abs=off), (number, name)
                assert b["scores"][name][measure]["n"] == result["n"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stream in one process."""
    folder = tmp_path_factory.mktemp("alone")
    code, printed = cpt(["run", str(STREAM)], folder)
    assert code == 0, printed
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stream under torchrun, half the batch in each process."""
    folder = tmp_path_factory.mktemp("together")
    code, printed = finished(TORCHRUN, ["run", str(STREAM), HALF, "processes=2"], folder)
    assert code == 0, printed
    return folder


def test_torchrun_gives_the_matrix_of_one_process(alone: Path, together: Path) -> None:
    agree(matrix(alone), matrix(together), 2)
    for stage in ("reverse", "sums"):
        assert (facts(together, stage)["processes"], facts(together, stage)["distributed_type"]) == (2, "MULTI_CPU")
        assert facts(alone, stage)["processes"] == 1
    assert facts(together, "reverse")["tokens"] == facts(alone, "reverse")["tokens"]
    printed = (together / "output.txt").read_text()
    assert printed.count("after stage") == 1  # the first process speaks for all


def test_what_was_finished_by_two_is_kept_by_one(together: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(together, tmp_path / "copy")
    code, printed = cpt(["run", str(STREAM), HALF], folder)
    assert code == 0, printed
    assert "every stage is finished" in printed


def stop_in(stage: str, folder: Path, number: int, sign: signal.Signals) -> tuple[int, str, float]:
    """Signal one of two ranks once the stage has logged nine steps: exit code, printed, seconds it took to end."""
    process = launched(TORCHRUN, ["run", str(STREAM), HALF], folder)
    deadline = time.monotonic() + 300
    while sum(file.read_bytes().count(b"\n") for file in folder.glob(f"runs/*/stages/*_{stage}/metrics.jsonl")) < 9:
        assert process.poll() is None, (folder / "output.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(rank(process, number), sign)
    began = time.monotonic()
    code = process.wait(timeout=120)
    return code, (folder / "output.txt").read_text(), time.monotonic() - began


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float, str]:
    """A run whose second process died in the rewarded stage: its folder, seconds until the end, what was printed."""
    folder = tmp_path_factory.mktemp("cut")
    code, printed, seconds = stop_in("sums", folder, 1, signal.SIGKILL)  # what an out-of-memory killer does
    assert code != 0
    return folder, seconds, printed


def test_a_dead_rank_ends_the_other_in_words(cut: tuple[Path, float, str]) -> None:
    _, seconds, printed = cut
    assert "another process of this run ended" in printed
    assert "run the same command again" in printed
    assert seconds < 60


def test_another_number_of_processes_is_refused_within_a_stage(cut: tuple[Path, float, str], tmp_path: Path) -> None:
    folder = shutil.copytree(cut[0], tmp_path / "copy")
    code, printed = cpt(["run", str(STREAM), HALF], folder)
    assert code == 3
    assert "was written by 2 processes" in printed
    assert "Start 2" in printed


def test_the_same_command_goes_on_to_the_same_matrix(cut: tuple[Path, float, str], together: Path) -> None:
    code, printed = finished(TORCHRUN, ["run", str(STREAM), HALF], cut[0])
    assert code == 0, printed
    assert facts(cut[0], "sums")["resumed_from"] == "checkpoint-6"
    assert matrix(cut[0]) == matrix(together)


def test_sigterm_writes_a_checkpoint_on_all_ranks(together: Path, tmp_path: Path) -> None:
    _, printed, _ = stop_in("reverse", tmp_path / "s", 0, signal.SIGTERM)
    assert "with a checkpoint written" in printed
    (checkpoint,) = (tmp_path / "s").glob("runs/*/stages/01_reverse/checkpoints/checkpoint-*[!6]/SEAL.json")
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= json.loads(checkpoint.read_text()).keys()


def test_a_launch_of_another_size_is_refused(tmp_path: Path) -> None:
    code, printed = cpt(["run", str(STREAM), "processes=2"], tmp_path)
    assert code == 2
    assert "processes = 2: this launch has 1" in printed


@pytest.mark.slow
def test_accelerate_launch_gives_the_matrix_of_one_process(alone: Path, tmp_path: Path, root: Path) -> None:
    config = root / "launch" / "accelerate" / "two_processes_cpu.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    code, printed = finished(launcher, ["run", str(STREAM), HALF], tmp_path / "a")
    assert code == 0, printed
    assert facts(tmp_path / "a", "sums")["processes"] == 2
    agree(matrix(alone), matrix(tmp_path / "a"), 2)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_deepspeed_gives_the_matrix_of_one_process(alone: Path, tmp_path: Path, root: Path, zero: str) -> None:
    """The first time DeepSpeed builds its collective, a minute or two; then it lies in ~/.cache/torch_extensions."""
    require_deepspeed()
    config = root / "launch" / "deepspeed" / f"{zero}.json"
    arguments = ["run", str(STREAM), HALF, f"stages.reverse.training.deepspeed={config}"]
    code, printed = finished(TORCHRUN, arguments, tmp_path / zero, DS_ACCELERATOR="cpu")
    assert code == 0, printed
    assert facts(tmp_path / zero, "reverse")["distributed_type"] == "DEEPSPEED"
    assert facts(tmp_path / zero, "reverse")["trained_parameters"] == facts(alone, "reverse")["trained_parameters"]
    agree(matrix(alone), matrix(tmp_path / zero), 2)
