"""Divergences in parts, from hidden states and likely tokens, against the formula on full logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cpt.losses.divergences import Head, divergence, log_probs_beside, log_probs_of, top_k_divergence

pytestmark = pytest.mark.parity

N, H, V = 1500, 12, 40  # more than one part


def setting(**more: Any) -> tuple[Head, Head, torch.Tensor, torch.Tensor]:
    """Heads of student and teacher and their hidden states, with gradients on the student's."""
    make = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make)

    student = Head(draw(V, H).requires_grad_(), draw(V).requires_grad_(), **more)
    return student, Head(draw(V, H), draw(V), **more), draw(N, H).requires_grad_(), draw(N, H)


def plain(head: Head, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
    """(N, V) log-probabilities."""
    logits = hidden @ head.weight.T + head.bias
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return (logits / temperature).log_softmax(1)


def gradients(value: torch.Tensor, *of: Any) -> list[torch.Tensor]:
    return list(torch.autograd.grad(value.sum(), [one for one in of if one is not None], retain_graph=True))


SHAPES = [{}, {"scale": 0.25}, {"softcap": 3.0}, {"scale": 2.0, "softcap": 5.0}]


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_whole_vocabulary(shape: dict[str, float], temperature: float, direction: Any) -> None:
    student, teacher, hidden, reference = setting(**shape)
    found = divergence(student, hidden, teacher, reference, direction, temperature)
    q, p = plain(student, hidden, temperature), plain(teacher, reference, temperature)
    wanted = (p.exp() * (p - q)).sum(1) if direction == "forward" else (q.exp() * (q - p)).sum(1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for mine, other in zip(
        gradients(found, hidden, student.weight, student.bias),
        gradients(wanted, hidden, student.weight, student.bias),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_log_probabilities_beside_a_known_one(shape: dict[str, float]) -> None:
    student, _, hidden, _ = setting(**shape)
    make = torch.Generator().manual_seed(4)
    tokens = torch.stack([torch.randperm(V, generator=make)[:5] for _ in range(N)])
    label = torch.randint(V, (N,), generator=make)
    whole = plain(student, hidden, 1.0)
    known = whole.gather(1, label.unsqueeze(1)).squeeze(1)
    wanted = whole.gather(1, tokens)
    over = (hidden, student.weight, student.bias)
    weights = torch.randn(N, 5, generator=make)
    for found in (log_probs_beside(student, hidden, tokens, label, known), log_probs_of(student, hidden, tokens)):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        for mine, other in zip(gradients(found * weights, *over), gradients(wanted * weights, *over), strict=True):
            torch.testing.assert_close(mine, other, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_likely_tokens_and_the_rest_are_a_coarser_distribution(direction: Any) -> None:
    student, teacher, hidden, reference = setting(scale=0.2)
    p, q = plain(teacher, reference, 1.0), plain(student, hidden, 1.0)
    whole = (p.exp() * (p - q)).sum(1) if direction == "forward" else (q.exp() * (q - p)).sum(1)
    before = torch.zeros(N)
    for k in (1, 5, 20, V - 1):
        tokens = p.topk(k).indices
        found = top_k_divergence(q.gather(1, tokens), p.gather(1, tokens), direction)
        assert (found >= before - 1e-5).all()  # merging outcomes never adds
        before = found
    torch.testing.assert_close(before, whole, atol=1e-4, rtol=1e-4)
    tokens = p.topk(5).indices
    alike = top_k_divergence(p.gather(1, tokens), p.gather(1, tokens), direction)
    assert alike.abs().max() == 0.0
