"""Self-distilled stages: the loss from its formula, who teaches, what is shown to whom, stops and resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cpt.data.prompted import demonstrated
from cpt.data.sampler import Turns
from cpt.errors import ConfigError, DataError
from cpt.methods.base import StageInfo
from cpt.train_stage import fresh_methods
from cpt.trainers.sdft import SDFTTrainer, sdft_config
from eval_harness.prompts import prompt_ids
from eval_harness.rows import Row, canonical
from tests.contract.cases import CASES
from tests.contract.lab import SHOWN, TASK_ROWS, TRAINING, Lab, configured, distance, equal, scripted

pytestmark = pytest.mark.contract

PLAIN = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "weight_decay": 0.0}


@pytest.fixture
def lab(tmp_path: Path, tiny_tokenizer: Any, tiny_llama: Any) -> Lab:
    return Lab(tmp_path, tiny_tokenizer, tiny_llama)


def test_the_loss_is_the_papers(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token: Jensen-Shannon of alpha between the student's distribution behind the prompt and the start's
    behind prompt and demonstration, at the sampling temperature; mean over a completion, then over completions. A low
    temperature, for random weights tell little apart."""
    seen: list[dict[str, Any]] = []
    prepare = SDFTTrainer._prepare_training_batch
    monkeypatch.setattr(
        SDFTTrainer, "_prepare_training_batch", lambda self, rows: seen.append(made := prepare(self, rows)) or made
    )
    with scripted():
        outcome = lab.stage(kind="sdft", max_steps=1, distillation_alpha=0.3, temperature=0.05)
    model, (batch,) = lab.model(), seen
    means = []
    for i in range(4):
        completion = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        n, logs = len(completion), []
        shown = batch["teacher_input_ids"][i][batch["teacher_attention_mask"][i].bool()]
        for ids in (torch.cat([batch["prompt_ids"][i][batch["prompt_mask"][i].bool()], completion]), shown):
            assert ids[-n:].equal(completion)
            logits = model(ids[None]).logits[0, -n - 1 : -1].detach() / 0.05
            logs.append(logits.double().log_softmax(-1))
        student, teacher = logs
        mixture = (0.7 * student.exp() + 0.3 * teacher.exp()).log()
        to_teacher = (teacher.exp() * (teacher - mixture)).sum(-1)
        to_student = (student.exp() * (student - mixture)).sum(-1)
        means.append(float((0.3 * to_teacher + 0.7 * to_student).mean()))
    assert len(set(map(tuple, batch["prompt_ids"].tolist()))) > 1
    assert outcome.lines[0]["loss"] == pytest.approx(sum(means) / 4, rel=1e-4)
    assert outcome.lines[0]["loss"] > 1e-4


def test_a_row_is_asked_with_and_without_its_answer(tiny_tokenizer: Any) -> None:
    row = canonical({"prompt": "ab {prompt}", "completion": "cd {privileged_context}"}, None)
    made = demonstrated([row], tiny_tokenizer, "auto", None, "{prompt} or {privileged_context}?", "data").dataset[0]
    shown = Row("completion", prompt="ab {prompt} or cd {privileged_context}?")
    assert made["prompt"] == made["input_ids"] == prompt_ids(tiny_tokenizer, row)
    assert made["privileged_context"] == prompt_ids(tiny_tokenizer, shown)


def test_of_a_conversation_the_last_question_is_shown_its_answer(tiny_tokenizer: Any) -> None:
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")]
    made = demonstrated([canonical({"messages": turns}, None)], tiny_tokenizer, "auto", None, SHOWN, "data").dataset[0]
    assert tiny_tokenizer.decode(made["privileged_context"]) == (
        "<|user|>user 0<|assistant|>assistant 0<|end|><|user|>user 1 assistant 1<|assistant|>"
    )
    odd = [turns[0], {"role": "system", "content": "now"}, turns[1]]
    with pytest.raises(DataError, match=r"data: row .*: the turn before the answer is 'system'"):
        demonstrated([canonical({"messages": odd}, None)], tiny_tokenizer, "auto", None, SHOWN, "data")


def test_rows_without_room_are_left_out_and_counted(tiny_tokenizer: Any) -> None:
    rows = [canonical(row, None) for row in TASK_ROWS]
    longest = [
        max(map(len, (row["prompt"], row["privileged_context"])))
        for row in demonstrated(rows, tiny_tokenizer, "auto", None, SHOWN, "data").dataset
    ]
    room = sorted(longest)[5]
    made = demonstrated(rows, tiny_tokenizer, "auto", room, SHOWN, "data")
    assert made.counts["dropped_too_long"] == sum(one > room for one in longest) > 0
    with pytest.raises(DataError, match="none of 24 prompts leaves room for its demonstration"):
        demonstrated(rows, tiny_tokenizer, "auto", 2, SHOWN, "data")


# ---- who teaches ------------------------------------------------------------------------------------


def test_the_teachers_are_three(lab: Lab) -> None:
    with scripted():
        ends = {kind: lab.stage(kind="sdft", teacher_model_kind=kind, **PLAIN) for kind in ("base", "live", "ema")}
    assert ends["base"].lines[0]["loss"] == ends["live"].lines[0]["loss"] == ends["ema"].lines[0]["loss"]
    assert not equal(ends["base"].after, ends["live"].after)
    assert not equal(ends["base"].after, ends["ema"].after)
    assert not equal(ends["live"].after, ends["ema"].after)


def test_an_average_at_its_ends_is_one_of_the_others(lab: Lab) -> None:
    """All of the new weights at each step is the student itself; none of them the weights it started from."""
    with scripted():
        live, base = (lab.stage(kind="sdft", teacher_model_kind=kind, **PLAIN).after for kind in ("live", "base"))
        whole, none = (
            lab.stage(kind="sdft", teacher_model_kind="ema", teacher_update_rate=rate, **PLAIN).after
            for rate in (1.0, 0.0)
        )
        rarely = lab.stage(kind="sdft", teacher_model_kind="ema", teacher_sync_steps=5, **PLAIN).after
    assert distance(whole, live) < 1e-7
    assert equal(none, base)
    assert equal(rarely, base)  # of four steps none is the fifth


@pytest.mark.parametrize("kind", ["base", "live", "ema"])
def test_the_teacher_survives_a_kill(lab: Lab, tmp_path: Path, kind: str) -> None:
    how: dict[str, Any] = {"kind": "sdft", "teacher_model_kind": kind, "teacher_update_rate": 0.3}
    whole = lab.stage(**how)
    assert lab.stage(folder=tmp_path / "killed", stop_after=3, **how).stopped
    assert equal(lab.stage(folder=tmp_path / "killed", **how).after, whole.after)


def test_under_an_adapter_the_start_is_the_model_without_it_or_a_second_one(lab: Lab) -> None:
    """A new adapter changes nothing yet: switched off and opened again are the same teacher."""
    how: dict[str, Any] = {"kind": "sdft", "lora": True, **PLAIN}
    with scripted():
        off, beside = (lab.stage(adapters_off=known, **how) for known in (frozenset({"base", "start"}), frozenset()))
        average = lab.stage(teacher_model_kind="ema", teacher_update_rate=0.5, **how)
    assert distance(off.after, beside.after) < 1e-7
    assert off.moved()
    assert off.moved() | average.moved() <= {name for name in off.after if "lora_" in name}
    assert not equal(average.after, off.after)


def test_a_frozen_half_stays_frozen_beside_a_teacher_without_adapters(lab: Lab) -> None:
    moved = lab.stage([CASES["hft"].settings], "sdft", lora=True).moved()
    assert moved
    assert moved < {name for name in lab.model(lora=True).state_dict() if "lora_" in name}


# ---- rows of methods --------------------------------------------------------------------------------


def test_added_rows_are_learned_beside(lab: Lab) -> None:
    """What the first step says of them is their mean token loss under the start."""
    replay = CASES["replay"].settings
    with scripted():
        outcome = lab.stage([replay], "sdft", max_steps=1)
    stage, model = configured([replay], "sdft", TRAINING), lab.model()
    data = lab.data(stage, TRAINING)
    for method in fresh_methods(stage):
        method.prepare_data(data, StageInfo(1, "lab", "sdft", seed=11, batch_rows=4, **lab.lent(stage)))
    rows = data.sources["replay"].dataset
    drawn = [rows[Turns(len(rows), 11, "replay")[i]] for i in range(2)]
    total = tokens = 0.0
    for row in drawn:
        logs = model(torch.tensor([row["input_ids"]])).logits[0].detach().log_softmax(-1)
        for at, label in enumerate(row["labels"][1:]):
            if label != -100:
                total, tokens = total - float(logs[at, label]), tokens + 1
    assert outcome.lines[0]["added_rows_loss"] == pytest.approx(total / tokens, rel=1e-4)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_stop_waits_for_the_end_of_a_generation(lab: Lab, tmp_path: Path, steps: int) -> None:
    how = {"kind": "sdft", "steps_per_generation": 2 * steps, "gradient_accumulation_steps": 1, "max_steps": 8}
    whole = lab.stage(**how)
    first = lab.stage(folder=tmp_path / "s", stop_after=2, **how)
    assert first.stopped
    second = lab.stage(folder=tmp_path / "s", **how)
    assert second.facts["resumed_from"] == f"checkpoint-{max(2, 2 * steps)}"
    assert equal(second.after, whole.after)


def test_tokens_are_counted_through_a_kill(lab: Lab, tmp_path: Path) -> None:
    with scripted():
        whole = lab.stage(kind="sdft")
        lab.stage(kind="sdft", folder=tmp_path / "s", stop_after=3)
        again = lab.stage(kind="sdft", folder=tmp_path / "s")
    assert again.facts["tokens"] == whole.facts["tokens"] > 0


# ---- what cannot be ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"teacher_model_kind": "frozen"}, r"training\.teacher_model_kind = 'frozen': must be one of base, live, ema"),
        ({"distillation_mode": "top"}, r"training\.distillation_mode = 'top': must be one of topk_logits"),
        ({"distillation_topk": None}, r"training\.distillation_topk: must be a positive number"),
        ({"distillation_mode": "sampled_token"}, "TRL refuses these arguments: .*distillation_alpha=1.0"),
        ({"teacher_prompt_template": "{prompt}"}, "TRL refuses these arguments: teacher_prompt_template must contain"),
    ],
)
def test_arguments_that_would_fail_in_the_first_step(tmp_path: Path, training: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sdft_config(training, tmp_path, 0)


def test_an_average_of_weights_that_lie_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="'ema': FSDP leaves each process a part of every weight"):
        sdft_config({"teacher_model_kind": "ema"}, tmp_path, 0)
