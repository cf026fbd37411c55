"""Rewarded stages: what GRPO learns from, what replay adds to it, what a checkpoint holds, what a reward may do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from cpt.data.added import AddedRows
from cpt.data.collator import Collator
from cpt.data.prompted import prompted
from cpt.data.sampler import GroupSampler
from cpt.data.sources import load_all
from cpt.data.spec import Source
from cpt.data.stage_data import TASK, StageData
from cpt.data.tokens import IGNORED, TokenSettings, tokenise
from cpt.errors import DataError, TrainingError
from cpt.methods.base import Method, Term
from cpt.methods.step import Step
from cpt.trainers.rft import Reference
from eval_harness.prompts import prompt_ids
from tests.contract.lab import GENERAL_ROWS, TASK_ROWS, Lab, distance, equal

pytestmark = pytest.mark.contract

REPLAY = {"type": "replay", "ratio": 0.5, "general": {"rows": GENERAL_ROWS}}


@pytest.fixture
def lab(tmp_path: Path, tiny_tokenizer: Any, tiny_llama: Any) -> Lab:
    return Lab(tmp_path, tiny_tokenizer, tiny_llama)


def rows(given: list[dict[str, str]]) -> list[Any]:
    return load_all([Source(rows=given)], None, "x").rows


# ---- what is learned from


def alike(completions: list[str], **columns: Any) -> list[float]:
    """The same for everybody."""
    return [0.5] * len(completions)


def test_equal_rewards_teach_nothing(lab: Lab) -> None:
    outcome = lab.stage(kind="rft", reward=alike, weight_decay=0.0)
    assert equal(outcome.before, outcome.after)
    assert outcome.lines[0]["frac_reward_zero_std"] == 1.0


def test_a_reward_is_learned(lab: Lab) -> None:
    shape = {"per_device_train_batch_size": 16, "num_generations": 8, "max_steps": 40, "temperature": 1.0}
    rewards = [line["reward"] for line in lab.stage(kind="rft", **shape).lines if "reward" in line]
    first, last = torch.tensor(rewards[:10]), torch.tensor(rewards[-10:])
    spread = (first.var() / 10 + last.var() / 10).sqrt()
    assert last.mean() - first.mean() > 2 * spread


@pytest.mark.parametrize("length", [4, 64])
def test_prompts_are_those_that_the_evaluation_generates_from(tiny_tokenizer: Any, length: int) -> None:
    given = rows([{"prompt": "ab " * length, "completion": "cd"}, {"prompt": "ab", "completion": "no"}])
    found = prompted(given, tiny_tokenizer, "auto", 40, "x")
    kept = given if length == 4 else given[1:]
    assert found.dataset["input_ids"] == [prompt_ids(tiny_tokenizer, row, "auto") for row in kept]
    assert found.dataset["answer"] == [row.completion for row in kept]
    assert found.counts.get("dropped_too_long", 0) == len(given) - len(kept)


def test_conversations_keep_what_was_said_before_the_answer(tiny_tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    given = rows([{"messages": [*turns, {"role": "user", "content": "no"}, {"role": "assistant", "content": "uv"}]}])
    (row,) = prompted([*given], tiny_tokenizer, "auto", None, "x").dataset
    assert [message["content"] for message in row["prompt"]] == ["ab", "cd", "no"]
    assert row["answer"] == "uv"


def test_prompts_that_leave_no_room_are_an_error(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"x: none of 24 prompts leaves room.*max_completion_length"):
        prompted(rows(TASK_ROWS), tiny_tokenizer, "auto", 1, "x")


def test_every_prompt_is_answered_by_its_group_and_an_epoch_is_no_border() -> None:
    order = list(GroupSampler(size=5, group=2, at_once=4, repeats=3, rounds=5, seed=0))
    assert len(order) == 5 * 3 * 4
    generations = [order[i : i + 4] for i in range(0, len(order), 12)]
    assert [order[i : i + 12] for i in range(0, len(order), 12)] == [block * 3 for block in generations]
    assert all(block[0] == block[1] and block[2] == block[3] for block in generations)
    assert sorted(row for block in generations for row in block[::2]) == sorted([*range(5)] * 2)


# ---- rows that a method adds


def added(tokenizer: Any, quotas: dict[str, int], accumulation: int, world: int) -> AddedRows:
    data = StageData(lambda *_: None)
    data.sources = {
        name: tokenise(rows(given), tokenizer, TokenSettings(), name)
        for name, given in ((TASK, TASK_ROWS), ("general", GENERAL_ROWS), ("earlier", TASK_ROWS))
    }
    data.quotas = quotas
    return AddedRows(data, 7, accumulation, world, Collator(tokenizer.pad_token_id))


@pytest.mark.parametrize(("accumulation", "world"), [(1, 1), (4, 1), (2, 2), (3, 4)])
def test_added_rows_are_exact_over_micro_batches_and_ranks(tiny_tokenizer: Any, accumulation: int, world: int) -> None:
    quotas = {"general": 3, "earlier": 2}
    one, many = (added(tiny_tokenizer, quotas, *shape) for shape in ((1, 1), (accumulation, world)))
    for step in range(9):
        whole = one.batch(step, 0, 0)
        assert whole is not None
        parts = [[many.batch(step, micro, rank) for rank in range(world)] for micro in range(accumulation)]
        assert all(len({part is None for part in micro}) == 1 for micro in parts)  # all ranks pass, or none
        real = [
            (int(o), int(r))
            for micro in parts
            for part in micro
            if part is not None
            for o, r, labels in zip(part["origin"], part["row"], part["labels"], strict=True)
            if (labels != IGNORED).any()
        ]
        assert sorted(real) == sorted(zip(whole["origin"].tolist(), whole["row"].tolist(), strict=True))
        assert [sum(o == number for o, _ in real) for number in (1, 2)] == [3, 2]
        counted = many.window(step)
        held = [part for micro in parts for part in micro if part is not None and (part["labels"] != IGNORED).any()]
        assert counted.pop("batches") == len(held)
        assert counted == {key: count for key, count in one.window(step).items() if key != "batches"}
        assert counted["tokens"] == (whole["labels"][:, 1:] != IGNORED).sum()


def test_replay_adds_the_token_loss_at_temperature_one(lab: Lab) -> None:
    outcome = lab.stage([REPLAY], "rft", max_steps=1, temperature=0.5)
    data = tokenise(rows(GENERAL_ROWS), lab.tokenizer, TokenSettings(), "x").dataset
    model, total, count = lab.model().requires_grad_(False), 0.0, 0
    for row in added_block(lab, rows=2):
        log_p = model(torch.tensor([data[row]["input_ids"]])).logits[0].log_softmax(-1)
        for position, label in enumerate(data[row]["labels"][1:]):
            if label != IGNORED:
                total, count = total - float(log_p[position, label]), count + 1
    assert outcome.lines[0]["added_rows_loss"] == pytest.approx(total / count, rel=1e-5)


def added_block(lab: Lab, rows: int) -> list[int]:
    """Row numbers that the lab's stage replays in its first step."""
    data = StageData(lambda *_: None)
    data.sources = {
        name: tokenise(load_all([Source(rows=given)], None, name).rows, lab.tokenizer, TokenSettings(), name)
        for name, given in ((TASK, TASK_ROWS), ("replay", GENERAL_ROWS))
    }
    data.quotas = {"replay": rows}
    batch = AddedRows(data, 11, 1, 1, Collator(lab.tokenizer.pad_token_id)).batch(0, 0, 0)
    assert batch is not None
    return batch["row"].tolist()


class Echo(Method):
    """Completions' own log-likelihood as a term: what a penalty on the policy would look at."""

    type: Literal["echo"] = "echo"
    seen: list[int] = []  # noqa: RUF012  (pydantic copies it)

    def loss_terms(self, step: Step) -> dict[str, Term]:
        """Sums over the rows that the stage itself generated."""
        mine = step.rows("task")
        self.seen.append(int(mine.sum()))
        return {"own": Term((step.log_probs * mine[:, None]).sum(), "task_tokens", 0.1)}


def test_terms_see_completions_and_added_rows_apart(lab: Lab) -> None:
    shape = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
    echo = Echo()
    parts = lab.stage([REPLAY], "rft", extra=[echo], **shape)
    assert echo.seen == [2, 0] * 4
    whole = lab.stage([REPLAY], "rft", extra=[Echo()], per_device_train_batch_size=4, max_steps=2)
    assert distance(parts.after, whole.after) < 2e-5
    logged = [[line["echo/own"] for line in outcome.lines if "echo/own" in line] for outcome in (parts, whole)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)
    alone = lab.stage(kind="rft", extra=[Echo()], per_device_train_batch_size=4, max_steps=2)
    assert alone.lines[0]["echo/own"] == pytest.approx(logged[0][0], rel=1e-4)  # asked twice is not logged twice


def test_added_rows_are_logged_once_a_step_however_they_are_spread(lab: Lab) -> None:
    """Two rows over one micro-batch, and over four of which two have none."""
    shapes = [{"per_device_train_batch_size": b, "gradient_accumulation_steps": a} for b, a in ((4, 1), (1, 4))]
    first = [lab.stage([REPLAY], "rft", max_steps=1, **shape).lines[0]["added_rows_loss"] for shape in shapes]
    assert first[0] == pytest.approx(first[1], rel=1e-5)


# ---- checkpoints


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_a_stop_waits_for_the_end_of_a_generation(lab: Lab, tmp_path: Path, kind: str) -> None:
    shape = {"steps_per_generation": 4, "max_steps": 10, "save_steps": 3, "lora": kind == "lora", "dropout": 0.2}
    whole = lab.stage([REPLAY], "rft", folder=tmp_path / "whole", **shape)
    first = lab.stage([REPLAY], "rft", folder=tmp_path / "cut", stop_after=2, **shape)
    assert first.stopped
    found = [path.name for path in (tmp_path / "cut" / "checkpoints").glob("checkpoint-*")]
    assert found == ["checkpoint-4"]
    second = lab.stage([REPLAY], "rft", folder=tmp_path / "cut", **shape)
    assert second.facts["resumed_from"] == "checkpoint-4"
    assert equal(second.after, whole.after)


def broken_sometimes(completions: list[str], **columns: Any) -> list[float]:
    """Raises on completions with an e in them."""
    if any("e" in text for text in completions):
        raise ValueError("an e")
    return [1.0] * len(completions)


def test_a_reward_that_raises_is_counted_through_a_kill(lab: Lab, tmp_path: Path) -> None:
    shape = {"max_steps": 6, "per_device_train_batch_size": 8}
    whole = lab.stage(kind="rft", reward=broken_sometimes, **shape).facts["rewards"]["broken_sometimes"]
    assert 0 < whole["raised"] < 48
    assert "ValueError: an e" in whole["first"]
    lab.stage(kind="rft", reward=broken_sometimes, folder=tmp_path / "k", stop_after=3, **shape)
    ((kept,),) = json.loads((tmp_path / "k/checkpoints/checkpoint-3/rewards.json").read_text())
    assert kept["rows"] == 24
    assert 0 < kept["raised"] < whole["raised"]
    again = lab.stage(kind="rft", reward=broken_sometimes, folder=tmp_path / "k", **shape)
    assert again.facts["rewards"]["broken_sometimes"] == whole


def too_few(completions: list[str], **columns: Any) -> list[float]:
    """One short."""
    return [1.0] * (len(completions) - 1)


def no_number(completions: list[str], **columns: Any) -> list[Any]:
    """Words."""
    return ["good"] * len(completions)


@pytest.mark.parametrize(("reward", "said"), [(too_few, "3"), (no_number, "'good'")])
def test_what_is_no_reward_stops_the_stage(lab: Lab, reward: Any, said: str) -> None:
    with pytest.raises(TrainingError, match=f"lab.*{reward.__name__}.*{said}"):
        lab.stage(kind="rft", reward=reward)


# ---- KL to a reference


def test_kl_is_zero_at_the_reference(lab: Lab) -> None:
    """What it does elsewhere is in tests/parity/test_rft_parity.py."""
    shape = {"max_steps": 6, "weight_decay": 0.0, "reward": alike}
    start = lab.stage(kind="rft", reference=Reference(1.0, lab.model), **shape)
    assert start.lines[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert distance(start.before, start.after) < 1e-3


def test_without_its_adapter_the_policy_is_its_own_reference(lab: Lab) -> None:
    shape = {"max_steps": 4, "lora": True, "weight_decay": 0.0}
    disabled = lab.stage(kind="rft", reference=Reference(0.5), **shape)
    separate = lab.stage(kind="rft", reference=Reference(0.5, lab.model), **shape)
    assert disabled.lines[-2]["kl"] > 0
    assert distance(disabled.after, separate.after) < 1e-6
    assert disabled.moved() == {name for name in disabled.after if "lora_" in name}
