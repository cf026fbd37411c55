"""f-divergences in their variational form, as FLAT uses them between a template's probability and a forgotten answer's.

D_f(P || Q) >= E_P[g(v)] - E_Q[f*(g(v))] for any v, where f* is the conjugate of f and the activation g maps onto its
domain (f-GAN, arXiv 1606.00709; FLAT, arXiv 2410.11143). Every activation here increases: minimising
-g(P_template) + f*(g(P_forget)) raises the one probability and lowers the other. Those that FLAT's published code has
for reverse KL, squared Hellinger and Neyman decrease, which does the contrary.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

Function = Callable[[Tensor], Tensor]


class FDivergence(NamedTuple):
    """All elementwise. f: its generator on u > 0. conjugate: f*. activation: g. composed: f*(g(v)), in closed form."""

    f: Function
    conjugate: Function
    activation: Function
    composed: Function

    def loss(self, template: Tensor, forget: Tensor) -> tuple[Tensor, Tensor]:
        """-g(P_template) and f*(g(P_forget)) of probabilities (N,) each: their sum is minimised."""
        return -self.activation(template), self.composed(forget)


def _jeffrey_conjugate(t: Tensor) -> Tensor:
    """sup_u ut - (u - 1) log u, exact: u = 1 / W(e^(1 - t)) by Lambert's W; its gradient is u."""
    with torch.no_grad():
        c = 1.0 - t.double()
        w = torch.where(c > 1.0, c - c.clamp_min(1.0).log().clamp_max(c.abs()), (c - 1.0).exp()).clamp_min(1e-12)
        for _ in range(20):  # Newton on w + log w = c
            w = (w * (1.0 + c - w.log()) / (1.0 + w)).clamp_min(1e-300)
        u = (1.0 / w).to(t.dtype)
    return t * u - (u - 1.0) * u.log()


def _identity(v: Tensor) -> Tensor:
    return v


def _half_tanh(v: Tensor) -> Tensor:
    return 0.5 * v.tanh()


def _shifted(v: Tensor) -> Tensor:
    return 1.0 - (-v).exp()


DIVERGENCES = {
    "kl": FDivergence(lambda u: u * u.log(), lambda t: (t - 1.0).exp(), _identity, lambda v: (v - 1.0).exp()),
    "jensen_shannon": FDivergence(
        lambda u: u * u.log() - (u + 1.0) * ((u + 1.0) / 2.0).log(),
        lambda t: -(2.0 - t.exp()).log(),
        lambda v: math.log(2.0) - softplus(-v),
        lambda v: softplus(v) - math.log(2.0),
    ),
    "pearson": FDivergence(
        lambda u: (u - 1.0).square(), lambda t: t.square() / 4.0 + t, _identity, lambda v: v.square() / 4.0 + v
    ),
    "total_variation": FDivergence(lambda u: 0.5 * (u - 1.0).abs(), _identity, _half_tanh, _half_tanh),
    "jeffrey": FDivergence(lambda u: (u - 1.0) * u.log(), _jeffrey_conjugate, _identity, _jeffrey_conjugate),
    # As published: the conjugate's Taylor series, 0.011 off at v = 0.9.
    "jeffrey_series": FDivergence(
        lambda u: (u - 1.0) * u.log(),
        lambda t: t + t.square() / 4.0 + t.pow(3) / 16.0,
        _identity,
        lambda v: v + v.square() / 4.0 + v.pow(3) / 16.0,
    ),
    "reverse_kl": FDivergence(
        lambda u: -u.log(), lambda t: -1.0 - (-t).log(), lambda v: -(-v).exp(), lambda v: v - 1.0
    ),
    "squared_hellinger": FDivergence(
        lambda u: (u.sqrt() - 1.0).square(), lambda t: t / (1.0 - t), _shifted, lambda v: v.exp() - 1.0
    ),
    "neyman": FDivergence(
        lambda u: (1.0 - u).square() / u,
        lambda t: 2.0 - 2.0 * (1.0 - t).sqrt(),
        _shifted,
        lambda v: 2.0 - 2.0 * (-v / 2.0).exp(),
    ),
}
