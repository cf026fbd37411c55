"""Adapters and quantized weights through whole streams, by the command line."""

from __future__ import annotations

import hashlib
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from eval_harness import quantization
from tests.e2e import sabotage
from tests.e2e.processes import cpt
from tests.plugins import require

pytestmark = pytest.mark.e2e

TRAINING = {
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 8,
    "max_steps": 6,
    "save_steps": 2,
    "logging_steps": 1,
    "lr_scheduler_type": "constant",
}


def stage(name: str, task: str, **more: Any) -> dict[str, Any]:
    source = {"task": f"tiny_world/{task}", "limit": 60}
    return {"name": name, "data": source, "test": source | {"limit": 20}, **more}


def write(folder: Path, model: Any, stages: list[dict[str, Any]]) -> list[str]:
    stream = {"name": "adapted", "model": model, "training": TRAINING, "stages": stages}
    (folder / "stream.yaml").write_text(yaml.safe_dump(stream), encoding="utf-8")
    return ["run", "stream.yaml"]


def facts(folder: Path) -> dict[str, dict[str, Any]]:
    """Stage -> the facts of its DONE."""
    found = sorted((folder / "runs").glob("adapted-*/stages/*/DONE"))
    return {file.parent.name: json.loads(file.read_text())["facts"] for file in found}


def test_a_stream_adds_continues_and_merges(tmp_path: Path) -> None:
    stages = [
        stage("one", "reverse", adapter="new"),
        stage("two", "last_letter", adapter={"mode": "new", "lora": {"r": 4}}, methods=["hft"]),
        stage("three", "new_people", adapter="continue"),
        stage("four", "reverse", adapter="merge_then_new"),
        stage("five", "last_letter"),
    ]
    code, printed = cpt(write(tmp_path, "tiny-world", stages), tmp_path)
    assert code == 0, printed
    assert "[5/5] five: sft from base + 01_one (merged) + 02_two→03_three (merged) + 04_four" in printed
    made = facts(tmp_path)
    assert [made[name]["lineage"] for name in made] == [
        "base + 01_one",
        "base + 01_one + 02_two",
        "base + 01_one + 02_two→03_three",
        "base + 01_one (merged) + 02_two→03_three (merged) + 04_four",
        "05_five",
    ]
    assert made["02_two"]["trained_parameters"] < made["03_three"]["trained_parameters"]  # hft froze half of it
    assert made["05_five"]["trained_parameters"] == 541_536
    (run,) = (tmp_path / "runs").glob("adapted-*")
    assert len(json.loads((run / "matrix.json").read_text())["rows"]) == 6
    code, printed = cpt(["export", str(run), "--stage", "two", "--to", "plain"], tmp_path)
    assert code == 3
    assert "--merge" in printed
    code, printed = cpt(["export", str(run), "--stage", "two", "--to", "plain", "--merge"], tmp_path)
    assert code == 0, printed
    same_logits(run, "02_two", tmp_path / "plain")


def test_weights_beneath_kept_adapters_are_kept(tmp_path: Path) -> None:
    """Also by a second run of a finished stream, which trains nothing."""
    stages = [
        stage("one", "reverse"),
        stage("two", "last_letter", adapter="new"),
        stage("three", "new_people", adapter="continue"),
    ]
    command = write(tmp_path, "tiny-world", stages)
    for _ in range(2):
        code, printed = cpt([*command, "retention.models=last"], tmp_path)
        assert code == 0, printed
        kept = sorted(path.parent.name for path in (tmp_path / "runs").glob("adapted-*/stages/*/model"))
        assert kept == ["01_one", "03_three"]
    (run,) = (tmp_path / "runs").glob("adapted-*")
    code, printed = cpt(["ask", str(run), "Reverse these letters: a b c", "--stages", "3"], tmp_path)
    assert code == 0, printed


def same_logits(run: Path, name: str, exported: Path) -> None:
    from transformers import AutoModelForCausalLM

    from cpt.config import ModelSpec
    from cpt.models import open_model

    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        ours = open_model(run / "stages" / name / "model", ModelSpec(path="tiny-world"))(ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(exported)(ids).logits
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantized_weights_under_adapters_go_on_to_the_bit(tmp_path: Path, bits: str) -> None:
    """Measured before it trains, killed in its second stage (an optimizer calls adam once for each of two groups)."""
    require("bitsandbytes", quantization.is_installed(), "bitsandbytes is not installed")
    model = {"path": "tiny-world", "quantization": bits}
    stages = [
        stage("one", "reverse", adapter={"mode": "new", "lora": {"lora_dropout": 0.1}}),
        stage("two", "last_letter", adapter="new"),
    ]
    found = []
    for name, kill in (("whole", None), ("killed", (sabotage.inside_optimizer_step, 21))):
        folder = tmp_path / name
        folder.mkdir()
        command = write(folder, model, stages)
        if kill:
            code, printed = cpt(command, folder, kill)
            assert code == -signal.SIGKILL, printed
        code, printed = cpt(command, folder)
        assert code == 0, printed
        files = sorted((folder / "runs").glob("adapted-*/stages/02_two/model/adapters/*/*.safetensors"))
        found.append({file.parent.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files})
    assert facts(tmp_path / "killed")["02_two"]["resumed_from"] == "checkpoint-4"
    assert facts(tmp_path / "whole")["02_two"]["parameters"] == 541_536 + 2 * 58_368  # packed ones count
    assert found[0].keys() == {"01_one", "02_two"}
    assert found[0] == found[1]
