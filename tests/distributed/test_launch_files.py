"""The files of launch/ are started as they ship: two processes on a CPU give what one gives.

The first start of DeepSpeed builds its collective, a minute or two; that of offload also Adam for the CPU. Both then
lie in torch's folder of extensions.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cpt.memory_plan import training_bytes
from tests.conftest import ROOT
from tests.distributed.launcher import finished, require_deepspeed

pytestmark = pytest.mark.distributed

LAUNCH = ROOT / "launch"
FSDP = "tests.distributed.fsdp_worker"
STREAM = """
name: launched
model: tiny-world
training: {learning_rate: 1.0e-3, lr_scheduler_type: constant, logging_steps: 1, save_steps: 4}
stages:
  - name: reverse
    data: {task: tiny_world/reverse, limit: 200}
    test: {task: tiny_world/reverse, limit: 20}
    methods: [hft, {type: replay, ratio: 0.25, general: {task: tiny_world/general, limit: 60}}]
    training: {max_steps: 6}
retention: {checkpoints: true}
evaluation:
  general:
    copy: {task: tiny_world/copy, limit: 20}
"""


def arguments(folder: Path, *overrides: str) -> list[str]:
    """`run` of the stream, written into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stream.yaml").write_text(STREAM)
    return ["run", "stream.yaml", *overrides]


def start(name: str, folder: Path, processes: int = 2, *overrides: str, module: str = "cpt") -> Path:
    """The stream under an accelerate file, 16 rows over all processes, to its end."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    launcher += ["--config_file", str(LAUNCH / "accelerate" / f"{name}.yaml"), "--main_process_port", "0"]
    given = arguments(folder, f"training.per_device_train_batch_size={16 // processes}", *overrides)
    code, printed = finished(launcher, given, folder, module=module, DS_ACCELERATOR="cpu")
    assert code == 0, printed[-4000:]
    return folder


def one(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(f"runs/launched-*/{pattern}")
    return found


def facts(folder: Path) -> dict[str, Any]:
    return json.loads(one(folder, "stages/01_reverse/DONE").read_text())["facts"]


def scores(folder: Path) -> list[float]:
    rows = json.loads(one(folder, "matrix.json").read_text())["rows"]
    return [result["value"] for row in rows for by in row["scores"].values() for result in by.values()]


def distance(a: Path, b: Path) -> float:
    """The largest difference of any weight of the two trained models, which hold the same names and precisions."""
    one_of, other = (load_file(one(folder, "stages/01_reverse/model/model.safetensors")) for folder in (a, b))
    assert {k: (v.dtype, v.shape) for k, v in one_of.items()} == {k: (v.dtype, v.shape) for k, v in other.items()}
    return max((one_of[key] - other[key]).abs().max().item() for key in one_of)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stream under the file of one process."""
    folder = start("one_process", tmp_path_factory.mktemp("alone"), processes=1)
    assert facts(folder)["processes"] == 1
    return folder


def same(alone: Path, folder: Path, kind: str) -> None:
    """Two processes of that kind ran, and gave what one gives to rounding."""
    assert (facts(folder)["processes"], facts(folder)["distributed_type"]) == (2, kind)
    assert facts(folder)["trained_parameters"] == facts(alone)["trained_parameters"]
    assert scores(folder) == pytest.approx(scores(alone), abs=2e-3)
    assert distance(alone, folder) < 2e-4


def holds_what_is_planned(folder: Path, stage: int) -> None:
    """Every process's optimizer state, as its checkpoint's file has it, is what the memory plan says."""
    found = facts(folder)
    share = found["trained_parameters"] / found["parameters"]
    planned = training_bytes(found["parameters"], share, "float32", zero_stage=stage, world=2)
    files = list(one(folder, "stages/01_reverse/checkpoints/checkpoint-4").rglob("*_optim_states.pt"))
    assert [file.stat().st_size for file in files] == pytest.approx([planned["optimizer"]] * 2, rel=0.01)


def test_ddp(alone: Path, tmp_path: Path) -> None:
    same(alone, start("ddp", tmp_path), "MULTI_CPU")


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("zero2", 2),
        ("zero3", 3),
        pytest.param("zero1", 1, marks=pytest.mark.slow),
        pytest.param("zero3_offload", 3, marks=pytest.mark.slow),
    ],
)
def test_zero(alone: Path, tmp_path: Path, name: str, stage: int) -> None:
    require_deepspeed()
    folder = start(name, tmp_path)
    same(alone, folder, "DEEPSPEED")
    holds_what_is_planned(folder, stage)


@pytest.mark.slow
def test_fsdp2(alone: Path, tmp_path: Path) -> None:
    same(alone, start("fsdp2", tmp_path, module=FSDP), "FSDP")


@pytest.mark.slow
def test_fsdp2_saves_what_it_loaded(tmp_path: Path) -> None:
    """Under training.bf16 accelerate makes trained weights float32; the base has 16 bits, and so has the stage."""
    folder = start("fsdp2", tmp_path, 2, "model.dtype=bfloat16", "training.bf16=true", module=FSDP)
    model = one(folder, "stages/01_reverse/model")
    assert {tensor.dtype for tensor in load_file(model / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((model / "config.json").read_text())["dtype"] == "bfloat16"


# ---- scripts: stopped as a scheduler stops them, and started again ------------------------------------------

SRUN = f"""#!{sys.executable}
# In the place of SLURM's: the command once per machine, all of them this one.
import os, signal, subprocess, sys
command = sys.argv[next(i for i, word in enumerate(sys.argv) if i and not word.startswith("--")):]
nodes = range(int(os.environ["SLURM_JOB_NUM_NODES"]))
here = [subprocess.Popen(command, env=os.environ | {{"SLURM_NODEID": str(node)}}) for node in nodes]
signal.signal(signal.SIGTERM, lambda number, frame: [one.send_signal(number) for one in here])
sys.exit(max(abs(one.wait()) for one in here))
"""
SCONTROL = """#!/usr/bin/env bash
# In the place of SLURM's: the machines' names, and a note of the job that is put back.
case $1 in
  show) echo 127.0.0.1 ;;
  requeue) echo "$2" >>requeued ;;
esac
"""


def on_path(folder: Path, **programs: str) -> str:
    """A PATH on which these stand before this environment's."""
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])


def script(name: str, folder: Path, **environ: str) -> subprocess.Popen[str]:
    """A script of launch/ on the stream, in the folder, with 120 steps."""
    given = arguments(folder, "training.per_device_train_batch_size=8", "stages.reverse.training.max_steps=120")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with open(folder / f"output{environ.get('NODE_RANK', '')}.txt", "a") as output:
        return subprocess.Popen(
            ["bash", str(LAUNCH / name), *given],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environ,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )


def stopped(folder: Path, scripts: list[subprocess.Popen[str]]) -> list[int]:
    """Their exit codes after SIGTERM in the stage's tenth step or later."""
    deadline = time.monotonic() + 200
    while sum(log.read_bytes().count(b"\n") for log in folder.glob("runs/*/stages/01_reverse/metrics.jsonl")) < 10:
        assert time.monotonic() < deadline
        assert all(one.poll() is None for one in scripts), [log.read_text() for log in folder.glob("output*.txt")]
        time.sleep(0.02)
    for one_of in scripts:
        one_of.send_signal(signal.SIGTERM)
    return [one_of.wait(100) for one_of in scripts]


def went_on(folder: Path) -> None:
    assert facts(folder)["resumed_from"].startswith("checkpoint-")
    assert facts(folder)["processes"] == 2


@pytest.mark.slow
def test_machines_without_a_scheduler_stop_and_go_on(tmp_path: Path) -> None:
    path = on_path(tmp_path / "bin")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    about = {"PATH": path, "NODES": "2", "HEAD": "127.0.0.1", "PORT": port, "PROCESSES": "1"}

    def machines() -> list[subprocess.Popen[str]]:
        return [script("torchrun/multi_node.sh", tmp_path / "run", NODE_RANK=rank, **about) for rank in "01"]

    assert stopped(tmp_path / "run", machines()) == [75, 75]
    assert [one.wait(200) for one in machines()] == [0, 0]
    went_on(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "processes"), [("one_node", "2"), ("multi_node", "1")])
def test_a_slurm_job_puts_itself_back_and_goes_on(tmp_path: Path, name: str, processes: str) -> None:
    path, run = on_path(tmp_path / "bin", srun=SRUN, scontrol=SCONTROL), tmp_path / "run"
    about = {"PATH": path, "PROCESSES": processes, "SLURM_JOB_ID": str(os.getpid())}
    about |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "two"}
    assert stopped(run, [script(f"slurm/{name}.sh", run, **about)]) == [1]
    assert (run / "requeued").read_text().split() == [str(os.getpid())]
    assert script(f"slurm/{name}.sh", run, SLURM_RESTART_COUNT="1", **about).wait(200) == 0
    went_on(run)
    assert len((run / "requeued").read_text().split()) == 1
