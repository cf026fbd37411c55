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
from cpt.trainers.sdft import DistillSeam, SDFTTrainer, sdft_config
from eval_harness.prompts import prompt_ids
from eval_harness.rows import Row, canonical
from tests.contract.cases import CASES
from tests.contract.lab import SHOWN, TASK_ROWS, TRAINING, Lab, configured, distance, equal, scripted, weights

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


def test_a_teacher_without_adapters_drops_nothing(lab: Lab) -> None:
    """Under attention dropout the student's own weights teach as the same weights beside it do."""
    how: dict[str, Any] = {"kind": "sdft", "lora": True, "dropout": 0.2, "max_steps": 1}
    with scripted():
        off, beside = (lab.stage(adapters_off=known, **how) for known in (frozenset({"base", "start"}), frozenset()))
        other = lab.stage(**how | {"dropout": 0.0})
    assert off.lines[0]["loss"] == pytest.approx(beside.lines[0]["loss"], rel=1e-5)
    assert other.lines[0]["loss"] != pytest.approx(off.lines[0]["loss"], rel=1e-3)


def test_an_average_of_bfloat16_weights_moves(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the formula in float64: taken in bfloat16 it would lose a third of its way."""
    ends: dict[str, Any] = {}
    fresh, after_step = Lab.model, DistillSeam.edit_weights

    def edit(self: Any) -> None:
        after_step(self)
        for name, weight in self.model.named_parameters():
            old = ends.setdefault(name, starts[name].double())
            ends[name] = old + 0.05 * (weight.detach().double() - old)
        ends["teacher"] = weights(self.teacher_model)

    monkeypatch.setattr(Lab, "model", lambda self, *given, **how: fresh(self, *given, **how).to(torch.bfloat16))
    monkeypatch.setattr(DistillSeam, "edit_weights", edit)
    starts = weights(lab.model())
    lab.stage(kind="sdft", teacher_model_kind="ema", learning_rate=1e-4, weight_decay=0.0, max_steps=40, save_steps=99)
    teacher = ends.pop("teacher")
    far = sum(float((ends[name] - starts[name].double()).abs().sum()) for name in ends)
    off = sum(float((teacher[name].double() - ends[name].to(torch.bfloat16).double()).abs().sum()) for name in ends)
    assert far > 0
    assert off < 1e-3 * far


@pytest.mark.parametrize("kind", ["topk_logits", "sampled_token"])
def test_the_other_losses_are_trls(lab: Lab, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Over the student's likely tokens, made to sum to 1, and over the words that were written."""
    seen: list[dict[str, Any]] = []
    prepare = SDFTTrainer._prepare_training_batch
    monkeypatch.setattr(
        SDFTTrainer, "_prepare_training_batch", lambda self, rows: seen.append(made := prepare(self, rows)) or made
    )
    how: dict[str, Any] = {
        "distillation_mode": kind,
        "distillation_alpha": 1.0,
        "distillation_topk": 7,
        "temperature": 0.05,
    }
    with scripted():
        outcome = lab.stage(kind="sdft", max_steps=1, **how)
    model, (batch,), means = lab.model(), seen, []
    for i in range(4):
        completion, logs = batch["completion_ids"][i][batch["completion_mask"][i].bool()], []
        shown = batch["teacher_input_ids"][i][batch["teacher_attention_mask"][i].bool()]
        for ids in (torch.cat([batch["prompt_ids"][i][batch["prompt_mask"][i].bool()], completion]), shown):
            logits = model(ids[None]).logits[0, -len(completion) - 1 : -1].detach() / 0.05
            logs.append(logits.double().log_softmax(-1))
        student, teacher = logs
        if kind == "topk_logits":
            likely = student.topk(7).indices
            student, teacher = (one.gather(-1, likely).log_softmax(-1) for one in (student, teacher))
            values = (student.exp() * (student - teacher)).sum(-1)
        else:
            student, teacher = (one.gather(-1, completion[:, None])[:, 0] for one in (student, teacher))
            values = (student - teacher) * student
        means.append(float(values.mean()))
    assert outcome.lines[0]["loss"] == pytest.approx(sum(means) / 4, rel=1e-3)
    assert abs(outcome.lines[0]["loss"]) > 1e-4


def test_more_likely_tokens_than_there_are_is_all_of_them(lab: Lab) -> None:
    shapes: list[dict[str, Any]] = [{"distillation_mode": "topk_logits", "distillation_topk": 10**6}, {}]
    with scripted():
        many, whole = (lab.stage(kind="sdft", max_steps=1, temperature=0.05, **shape) for shape in shapes)
    assert many.lines[0]["loss"] == pytest.approx(whole.lines[0]["loss"], rel=1e-4)


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
        ({"distillation_topk": 1}, r"training\.distillation_topk = 1: .* nothing to learn"),
        ({"num_loss_tokens_to_skip": 256}, r"training\.num_loss_tokens_to_skip = 256: leaves nothing to learn"),
        ({"distillation_topk": None}, r"training\.distillation_topk: must be a positive number"),
        ({"distillation_mode": "sampled_token"}, "TRL refuses these arguments: .*distillation_alpha=1.0"),
        ({"teacher_prompt_template": "{prompt}"}, "TRL refuses these arguments: teacher_prompt_template must contain"),
    ],
)
def test_arguments_that_would_fail_in_the_first_step(tmp_path: Path, training: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sdft_config(training, tmp_path, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("distillation_alpha", 1.5),
        ("distillation_alpha", -0.1),
        ("distillation_topk", -3),
        ("distillation_is_clip", 0.0),
        ("teacher_update_rate", 3.0),
        ("teacher_sync_steps", 0),
        ("num_loss_tokens_to_skip", -1),
    ],
)
def test_numbers_that_make_no_sense_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{field}\n.*must be "):
        configured([], "sdft", {field: value})


def test_an_average_of_weights_that_lie_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="'ema': FSDP leaves each process a part of every weight"):
        sdft_config({"teacher_model_kind": "ema"}, tmp_path, 0)
