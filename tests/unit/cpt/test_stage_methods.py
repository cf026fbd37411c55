"""What a stage's methods may be asked for together, and under which names logs and records tell them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cpt import ConfigError, Stream, run
from cpt.data import recording
from tests.contract.lab import GENERAL_ROWS, TASK_ROWS, Lab, configured

GENERAL = {"rows": GENERAL_ROWS}
GERE = {"type": "gere", "ratio": 0.25, "general": GENERAL}


def problem(*methods: dict[str, Any], **stage: Any) -> str:
    """What is said of the second of two stages that has these methods."""
    stages = [{"name": name, "data": {"rows": TASK_ROWS}} for name in ("before", "now")]
    stages[1] |= {"methods": list(methods), **stage}
    with pytest.raises(ConfigError) as refused:
        Stream.parse({"name": "s", "model": "tiny-world", "stages": stages})
    return str(refused.value)


def test_two_of_a_type_are_logged_by_name(tmp_path: Path, tiny_tokenizer: Any, tiny_llama: Any) -> None:
    lab = Lab(tmp_path, tiny_tokenizer, tiny_llama)
    two = [GERE | {"name": "near"}, GERE | {"name": "far", "keep": "l2", "weight": 3.0}]
    outcome = lab.stage(two)
    logged = {key for line in outcome.lines for key in line if "/" in key}
    assert {"near/margin", "near/outside", "far/l2", "far/distance"} <= logged
    assert not any(key.startswith("gere/") for key in logged)
    assert set(outcome.facts["methods"]) == {"near", "far"}


def test_names_are_told_apart() -> None:
    said = problem({"type": "distill"}, {"type": "distill", "to": "base"})
    assert "stages.1.methods.1.name = 'distill': is listed twice" in said
    assert "give one a name of its own" in said
    assert "keep one" in problem({"type": "eaft"}, {"type": "eaft"})
    configured([{"type": "distill"}, {"type": "distill", "to": "base", "name": "to_base"}], "sft", {})


@pytest.mark.parametrize(
    ("method", "field"),
    [
        (GERE | {"keep": "labels", "weight": 2.0}, "weight"),
        (GERE | {"keep": "labels", "of": "start"}, "of"),
        (GERE | {"keep": "kl", "mean": "violators"}, "mean"),
        (GERE | {"keep": "l1", "passes": 1}, "passes"),
        (GERE | {"keep": "margin", "top_k": 8}, "top_k"),
        (GERE | {"at_most": 5.0}, "at_most"),
        (GERE | {"weight": -1.0}, "weight"),
        ({"type": "distill", "decay": 0.9}, "decay"),
        ({"type": "der", "alpha": 0.0, "beta": 0.0}, "alpha"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_do_nothing_is_refused(method: dict[str, Any], field: str) -> None:
    assert f"stages.1.methods.0.{field} = {method[field]!r}" in problem(method)


@pytest.mark.parametrize(
    ("method", "field", "kept"),
    [
        ({"type": "replay", "earlier": "all", "rows_per_stage": 1}, "rows_per_stage", 1),
        ({"type": "replay", "earlier": "all", "select": "balanced", "rows_in_all": 3}, "rows_in_all", 3),
        ({"type": "der", "rows_per_stage": 1}, "rows_per_stage", 1),
    ],
    ids=["replay", "replay_in_all", "der"],
)
def test_a_budget_below_the_share_is_refused_before_anything_trains(
    method: dict[str, Any], field: str, kept: int
) -> None:
    said = problem(method, training={"per_device_train_batch_size": 16})
    assert said.startswith(f"stages.1.methods.0.{field} = {kept}")
    assert f": keeps {kept} rows in all, fewer than the 4 of every effective batch" in said


def test_a_dynamic_weight_goes_by_the_whole_token_loss(tmp_path: Path, tiny_tokenizer: Any, tiny_llama: Any) -> None:
    """Other methods' token weights among it: what the step's loss is, less the terms."""
    lab = Lab(tmp_path, tiny_tokenizer, tiny_llama)
    replay = {"type": "replay", "ratio": 0.25, "general": GENERAL, "weight": 5.0}
    lines = [line for line in lab.stage([GERE | {"keep": "l2"}, replay]).lines if "gere/l2" in line]
    assert lines
    for line in lines:
        assert line["gere/token_loss"] == pytest.approx(line["loss"] - line["gere/l2"], rel=2e-3)


def test_re_entrant_checkpointing_is_refused_where_tensors_are_differentiated(tmp_path: Path) -> None:
    training = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    stage = {"name": "a", "data": {"rows": TASK_ROWS}, "methods": [{"type": "a_gem", "general": GENERAL}]}
    raw = {"name": "s", "model": "tiny-world", "training": training, "stages": [stage], "output_dir": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"use_reentrant = true: a_gem takes gradients of single tensors"):
        run(Stream.parse(raw), say=lambda line: None)


def test_logits_are_computed_where_they_are_read(tiny_llama: Any) -> None:
    model, ids = tiny_llama(), torch.arange(10, 22).reshape(2, 6)
    where = torch.tensor([[0, 1, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0]]).bool()
    sizes: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda _, args, out: sizes.append(out.shape[:-1].numel()))
    found = recording.logits_at(model, {"input_ids": ids}, where)
    hook.remove()
    assert sizes == [3]
    torch.testing.assert_close(found, model(ids).logits[where])
