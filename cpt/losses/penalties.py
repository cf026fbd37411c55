"""Quadratic penalties around an anchor, as an edit of gradients, and the diagonal of the Fisher information.

Sources: EWC, Kirkpatrick et al. 2017 (arXiv 1612.00796); L2-SP, Li et al. 2018 (arXiv 1802.01483).
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def pull(
    gradient: Tensor, weight: Tensor, anchor: Tensor, strength: float, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradient with that of strength / 2 x sum importance (weight - anchor)^2 added, and the penalty itself.

    All tensors of one shape; importance None is 1 everywhere. Elementwise, but for the penalty's sum.
    """
    away = weight.float() - anchor
    force = strength * (away if importance is None else importance * away)
    return gradient + force.to(gradient.dtype), 0.5 * (force * away).sum()


def fisher_diagonal(
    parameters: dict[str, Tensor], sequences: Iterable[Callable[[], tuple[Tensor, int]]]
) -> tuple[dict[str, Tensor], int]:
    """Sum over sequences of the squared gradient of their log-likelihood, and the number of tokens in all.

    parameters: name -> a tensor with gradient. sequences: each gives (log-likelihood of one sequence, its tokens).
    With labels drawn from the model the scores of tokens have mean zero, so the sum over all tokens, divided by
    their number, is the Fisher information of a token. float32; one backward pass a sequence.
    """
    names, tensors = list(parameters), list(parameters.values())
    total = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in parameters.items()}
    count = 0
    for sequence in sequences:
        value, tokens = sequence()
        for name, gradient in zip(names, torch.autograd.grad(value, tensors, allow_unused=True), strict=True):
            if gradient is not None:
                total[name] += gradient.float().square()
        count += tokens
    return total, count
