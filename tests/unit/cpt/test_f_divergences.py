"""FLAT's f-divergences: conjugates against a supremum, the right direction everywhere, and what is published."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cpt.losses.f_divergences import DIVERGENCES

EXACT = sorted(set(DIVERGENCES) - {"jeffrey_series"})
V = torch.linspace(0.0, 1.0, 41, dtype=torch.float64)


@pytest.mark.parametrize("name", EXACT)
def test_the_conjugate_is_the_supremum(name: str) -> None:
    """f*(g(v)) = sup over u > 0 of u g(v) - f(u), by a fine grid of u; it may lie beneath by the grid's step."""
    one = DIVERGENCES[name]
    u = torch.cat([torch.logspace(-7, 4, 400_001, dtype=torch.float64), torch.ones(1, dtype=torch.float64)])
    fu = one.f(u)
    for v in V:
        t = one.activation(v)
        supremum = float((u * t - fu).max())
        assert float(one.composed(v)) == pytest.approx(supremum, abs=2e-6)
        assert float(one.conjugate(t)) == pytest.approx(supremum, abs=2e-6)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_the_template_is_raised_and_the_answer_lowered(name: str) -> None:
    """For all probabilities, 0 and 1 among them, all finite."""
    template, forget = V.clone().requires_grad_(), V.clone().requires_grad_()
    up, down = DIVERGENCES[name].loss(template, forget)
    (up + down).sum().backward()
    assert template.grad is not None
    assert forget.grad is not None
    for found in (up, down, template.grad, forget.grad):
        assert found.isfinite().all()
    assert (template.grad < 0).all()
    assert (forget.grad > 0).all()


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_gradients_are_those_of_the_values(name: str) -> None:
    inner = torch.linspace(0.05, 0.95, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: DIVERGENCES[name].activation(v), inner)
    assert torch.autograd.gradcheck(lambda v: DIVERGENCES[name].composed(v), inner)


# dL/dP of template and answer at (0.02, 0.9), of those that the published code has right.
PUBLISHED = {
    "kl": (-1.0, 0.905),
    "jensen_shannon": (-0.495, 0.711),
    "pearson": (-1.0, 1.45),
    "total_variation": (-0.5, 0.243),
    "jeffrey_series": (-1.0, 1.60),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_where_the_published_form_is_right_it_is_this_one(name: str) -> None:
    template = torch.tensor([0.02], dtype=torch.float64, requires_grad=True)
    forget = torch.tensor([0.9], dtype=torch.float64, requires_grad=True)
    up, down = DIVERGENCES[name].loss(template, forget)
    (up + down).sum().backward()
    assert (float(template.grad), float(forget.grad)) == pytest.approx(PUBLISHED[name], abs=6e-3)  # type: ignore[arg-type]


def test_the_series_is_near_the_exact_conjugate() -> None:
    exact, series = (DIVERGENCES[name].composed(torch.tensor(0.9)) for name in ("jeffrey", "jeffrey_series"))
    assert float((exact - series).abs()) == pytest.approx(0.011, abs=1e-3)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_one_step_through_a_model_moves_both_the_right_way(name: str, tiny_llama: Any) -> None:
    from cpt.losses.forgetting import mean_probability

    model = tiny_llama().double()
    prompt, template, answer = torch.arange(20, 25), torch.tensor([40, 41, 42]), torch.tensor([50, 51])

    def probability(text: torch.Tensor) -> torch.Tensor:
        logits = model(torch.cat([prompt, text])[None]).logits[0, len(prompt) - 1 : -1]
        log_probs = logits.log_softmax(-1).gather(1, text[:, None]).T
        return mean_probability(log_probs, torch.ones_like(log_probs).bool())

    before = [float(probability(text)) for text in (template, answer)]
    up, down = DIVERGENCES[name].loss(probability(template), probability(answer))
    (up + down).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.5 * (parameter.grad if parameter.grad is not None else 0.0)
    after = [float(probability(text)) for text in (template, answer)]
    assert after[0] > before[0]
    assert after[1] < before[1]
