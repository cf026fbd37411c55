"""Two ranks give the weights of one, with every method, when rows differ in length.

In rft stages completions are scripted, for two ranks sample others than one does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.contract.lab import Lab, distance, scripted
from tests.distributed.launcher import two_ranks
from tests.distributed.worker import STAGES

pytestmark = [pytest.mark.contract, pytest.mark.distributed]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks have left the weights of every stage."""
    folder = tmp_path_factory.mktemp("ranks")
    code, printed = two_ranks("worker", folder=folder, timeout=400)
    assert code == 0, printed[-4000:]
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
