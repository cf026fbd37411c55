"""EAFT: the entropy of likely tokens by hand and against full logits; what the model is sure of is learned less."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cpt.config import Stage
from cpt.losses.divergences import Head
from cpt.losses.entropy import top_k_entropy
from tests.contract.lab import GENERAL_ROWS, TASK_ROWS, Lab, distance, equal


@pytest.fixture
def lab(tmp_path: Path, tiny_tokenizer: Any, tiny_llama: Any) -> Lab:
    return Lab(tmp_path, tiny_tokenizer, tiny_llama)


def test_by_hand() -> None:
    """Logits (log 3, 0, 0, far below): of the two likely ones 3/4 and 1/4, of three 3/5, 1/5, 1/5."""
    head, hidden = Head(torch.tensor([[math.log(3.0)], [0.0], [0.0], [-50.0]])), torch.ones(1, 1)
    two = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    three = -(0.6 * math.log(0.6) + 0.4 * math.log(0.2)) / math.log(3)
    assert float(top_k_entropy(head, hidden, 2)) == pytest.approx(two)
    assert float(top_k_entropy(head, hidden, 3)) == pytest.approx(three)


def test_even_is_one_sure_is_none_and_k_is_at_most_the_vocabulary() -> None:
    head = Head(torch.eye(6))
    even, sure = torch.zeros(1, 6), 100.0 * torch.eye(6)[:1]
    assert float(top_k_entropy(head, even, 20)) == pytest.approx(1.0)
    assert float(top_k_entropy(head, sure, 20)) == pytest.approx(0.0, abs=1e-6)
    assert top_k_entropy(head, even[:0], 20).shape == (0,)


@pytest.mark.parametrize("shape", [{}, {"scale": 0.5}, {"softcap": 3.0}])
def test_in_parts_as_on_full_logits(shape: dict[str, float]) -> None:
    make = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(50, 8, generator=make), torch.randn(2500, 8, generator=make)
    logits = hidden @ weight.T * shape.get("scale", 1.0)
    logits = shape["softcap"] * torch.tanh(logits / shape["softcap"]) if shape.get("softcap") else logits
    p = logits.sort(descending=True).values[:, :7].softmax(1)
    wanted = -(p * p.log()).sum(1) / math.log(7)
    torch.testing.assert_close(top_k_entropy(Head(weight, **shape), hidden, 7), wanted, atol=1e-5, rtol=1e-5)


def test_a_larger_power_learns_less(lab: Lab) -> None:
    plain = {"max_steps": 8, "optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0}
    ends = [
        lab.stage([{"type": "eaft", "alpha": alpha}], **plain) for alpha in (1e-30, 1.0, 1e5)
    ]  # new weights are unsure everywhere
    far = [distance(end.before, end.after) for end in ends]
    assert far[0] > 2 * far[2]
    assert all(0 < line["eaft/factor"] <= 1 for line in ends[1].lines if "eaft/factor" in line)
    assert ends[0].lines[0]["eaft/factor"] == pytest.approx(1.0)


def test_the_loss_and_its_gradient_are_those_of_the_formula(lab: Lab) -> None:
    """One SGD step against the formula on full logits, weights without gradient."""
    one = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0, "learning_rate": 0.5}
    found = lab.stage([{"type": "eaft", "alpha": 1.5, "top_k": 4}], **one)
    plain = lab.stage([], **one)
    assert not equal(found.after, plain.after)
    seen: list[dict[str, Any]] = []

    from cpt.methods.base import Method

    class Look(Method):
        """Keeps the batch."""

        type: str = "look"

        def loss_terms(self, step: Any) -> dict[str, Any]:
            """No term."""
            seen.append(step.inputs)
            return {}

    lab.stage([], extra=[Look()], **one)
    model, batch = lab.model(), seen[0]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    where = labels != -100
    log_probs = logits[where].log_softmax(1)
    p = logits[where].detach().topk(4, dim=1).values.softmax(1)
    weight = (-(p * p.log()).sum(1) / math.log(4)) ** 1.5
    loss = -(weight * log_probs.gather(1, labels[where].unsqueeze(1)).squeeze(1)).sum() / where.sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found.after[name], (parameter - 0.5 * parameter.grad).detach(), atol=1e-6, rtol=1e-5)


def test_other_methods_rows_are_learned_in_full_unless_asked(lab: Lab) -> None:
    replay = {"type": "replay", "ratio": 0.5, "general": {"rows": GENERAL_ROWS}}
    task, every = (lab.stage([replay, {"type": "eaft", "on": on}], max_steps=2) for on in ("task", "all"))
    assert not equal(task.after, every.after)


def test_a_reward_is_not_weighed(lab: Lab) -> None:
    rft = {"name": "s", "kind": "rft", "data": {"rows": TASK_ROWS}, "rewards": ["exact_match"], "methods": ["eaft"]}
    with pytest.raises(ValueError, match="does not work in an rft stage"):
        Stage.model_validate(rft)
