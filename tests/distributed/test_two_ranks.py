"""Two ranks give the weights of one, with every method, when rows differ in length.

In rft stages completions are scripted, for two ranks sample others than one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from tests.contract.lab import Lab, distance, scripted
from tests.distributed.stages import STAGES
from tests.plugins import require

pytestmark = [pytest.mark.contract, pytest.mark.distributed]


@pytest.fixture(scope="module")
def ranks(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks have left the weights of every stage."""
    require("two_ranks", dist.is_available() and dist.is_gloo_available(), "torch was built without gloo")
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.run(
        [*command, "-m", "tests.distributed.worker", str(folder)],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", STAGES)
def test_two_ranks_equal_one(ranks: Path, tmp_path: Path, tiny_tokenizer: Any, tiny_llama: Any, name: str) -> None:
    methods, kind, lora = STAGES[name]
    facts = json.loads((ranks / f"{name}.json").read_text())
    assert (facts["processes"], facts["distributed_type"]) == (2, "MULTI_CPU")
    lab = Lab(tmp_path, tiny_tokenizer, tiny_llama)
    with scripted():
        one = lab.stage(methods, kind=kind, lora=lora, per_device_train_batch_size=4, save_steps=100)
    two = load_file(ranks / f"{name}.safetensors")
    assert one.facts["processes"] == 1
    assert distance(one.before, one.after) > 1e-3
    assert distance(one.after, two) < 2e-5
