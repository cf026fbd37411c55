"""A rewarded step against the formula, and the plugged trainer without methods against TRL's own.

loss of a step = - sum over completions i, tokens t of A_i log p(t) / tokens of all completions
                 + weight x mean of -log p over the answer tokens of the added rows,

A_i = (r_i - mean of its group) / (standard deviation of its group + 1e-4), log p of completions at the sampling
temperature: DAPO's loss at the point where the policy still is the one that sampled. One row at a time, full
logits, plain gradient descent.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from cpt.data.prompted import prompted
from cpt.data.sampler import GroupSampler
from cpt.data.sources import load_all
from cpt.data.spec import Source
from cpt.data.tokens import IGNORED, TokenSettings, tokenise
from cpt.trainers.rft import Reference, grpo_config
from tests.contract.lab import GENERAL_ROWS, TASK_ROWS, TRAINING, WRITING, Lab, distance, equal, vowels
from tests.contract.test_rft import added_block

pytestmark = pytest.mark.parity

PLAIN = {"optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0, "max_steps": 1, "learning_rate": 0.1}


def test_a_step_computes_the_formula(tmp_path: Path, tiny_tokenizer: Any, tiny_llama: Any) -> None:
    lab = Lab(tmp_path, tiny_tokenizer, tiny_llama)
    seen: list[dict[str, Any]] = []

    def noted(**given: Any) -> list[float]:
        found = vowels(given["completions"])
        for i, reward in enumerate(found):
            seen.append({"prompt": given["prompts"][i], "ids": given["completion_ids"][i], "reward": reward})
        return found

    replay = {"type": "replay", "ratio": 0.5, "general": {"rows": GENERAL_ROWS}, "weight": 0.3}
    outcome = lab.stage([replay], "rft", reward=noted, gradient_accumulation_steps=2, **PLAIN, num_generations=4)
    model = lab.model().train()
    loss = policy_loss(model, by_text(tiny_tokenizer), seen, group=4)
    loss = loss + 0.3 * replay_loss(model, tiny_tokenizer, added_block(lab, rows=4))
    loss.backward()
    for name, parameter in model.named_parameters():
        expected = outcome.before[name] - 0.1 * parameter.grad
        torch.testing.assert_close(outcome.after[name], expected, atol=2e-6, rtol=1e-4)
    assert distance(outcome.before, outcome.after) > 1e-3


def test_kl_computes_the_formula(tmp_path: Path, tiny_tokenizer: Any, tiny_llama: Any) -> None:
    """Equal rewards leave weight x mean over tokens of k3 = exp(q - p) - (q - p) - 1, p the policy's log-probability
    of its own token, q the reference's, times exp(p - p) whose gradient stands for having sampled from p."""
    lab = Lab(tmp_path, tiny_tokenizer, tiny_llama)
    seen: list[dict[str, Any]] = []

    def noted(**given: Any) -> list[float]:
        seen.extend(
            {"prompt": prompt, "ids": ids}
            for prompt, ids in zip(given["prompts"], given["completion_ids"], strict=True)
        )
        return [1.0] * len(given["completions"])

    reference = lab.llama(seed=4).requires_grad_(False)
    with torch.no_grad():
        reference.lm_head.weight.mul_(8)
    outcome = lab.stage(kind="rft", reward=noted, reference=Reference(0.7, lambda: copy.deepcopy(reference)), **PLAIN)
    model, prompts = lab.model().train(), by_text(tiny_tokenizer)
    terms = []
    for one in seen:
        ids = torch.tensor([prompts[one["prompt"]] + one["ids"]])
        p, q = (chosen(one_model, ids, len(one["ids"])) for one_model in (model, reference))
        terms.append((torch.exp(q - p) - (q - p) - 1) * torch.exp(p - p.detach()))
    kl = torch.cat(terms).mean()
    (0.7 * kl).backward()
    assert outcome.lines[0]["kl"] == pytest.approx(kl.item(), rel=1e-4)
    assert kl.item() > 0.1
    for name, parameter in model.named_parameters():
        expected = outcome.before[name] - 0.1 * parameter.grad
        torch.testing.assert_close(outcome.after[name], expected, atol=2e-6, rtol=1e-4)
    assert distance(outcome.before, outcome.after) > 1e-3


def by_text(tokenizer: Any) -> dict[str, list[int]]:
    """Prompt -> its ids."""
    rows = load_all([Source(rows=TASK_ROWS)], None, "x").rows
    return {row["prompt"]: row["input_ids"] for row in prompted(rows, tokenizer, "auto", None, "x").dataset}


def chosen(model: Any, ids: torch.Tensor, last: int) -> torch.Tensor:
    """Log-probabilities of the last tokens at the sampling temperature."""
    log_p = (model(ids, use_cache=False).logits[0, :-1] / WRITING["temperature"]).log_softmax(-1)
    return log_p.gather(-1, ids[0, 1:, None])[-last:, 0]


def policy_loss(model: Any, prompts: dict[str, list[int]], seen: list[Any], group: int) -> Any:
    rewards = torch.tensor([one["reward"] for one in seen]).view(-1, group)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    total, tokens = torch.zeros(()), 0
    for one, advantage in zip(seen, advantages, strict=True):
        ids = torch.tensor([prompts[one["prompt"]] + one["ids"]])
        total = total - advantage * chosen(model, ids, len(one["ids"])).sum()
        tokens += len(one["ids"])
    return total / tokens


def replay_loss(model: Any, tokenizer: Any, drawn: list[int]) -> Any:
    data = tokenise(load_all([Source(rows=GENERAL_ROWS)], None, "x").rows, tokenizer, TokenSettings(), "x").dataset
    losses = []
    for row in (data[number] for number in drawn):
        log_p = model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0].log_softmax(-1)
        losses += [-log_p[i, label] for i, label in enumerate(row["labels"][1:]) if label != IGNORED]
    return torch.stack(losses).mean()


def test_without_methods_the_bits_are_trls(tmp_path: Path, tiny_tokenizer: Any, tiny_llama: Any) -> None:
    lab = Lab(tmp_path, tiny_tokenizer, tiny_llama)
    training = TRAINING | WRITING | {"gradient_accumulation_steps": 2, "steps_per_generation": 4}
    ours = lab.stage(kind="rft", gradient_accumulation_steps=2, steps_per_generation=4)
    rows = load_all([Source(rows=TASK_ROWS)], None, "x").rows
    prompts = prompted(rows, tiny_tokenizer, "auto", None, "x").dataset
    texts = {tuple(row["input_ids"]): row["prompt"] for row in prompts}
    args = grpo_config(training | {"save_steps": 100}, tmp_path / "bare", 11, [1.0])

    class Bare(GRPOTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return GroupSampler(len(prompts), 2, args.generation_batch_size, 4, 2, 11)

        def _tokenize_prompts(self, given: list[str]) -> Any:
            by_text = {text: list(ids) for ids, text in texts.items()}
            return [by_text[text] for text in given], None, {}

    torch.manual_seed(11)
    bare = Bare(
        model=lab.model(), args=args, reward_funcs=[vowels], train_dataset=prompts, processing_class=tiny_tokenizer
    )
    bare.train()
    assert equal(ours.after, dict(bare.model.named_parameters()))
    assert distance(ours.before, ours.after) > 1e-3
