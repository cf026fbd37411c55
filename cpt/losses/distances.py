"""How far what a model computes at a token is from what another did: activations, log-probabilities.

Sources: block outputs, EcoTTA (arXiv 2303.01904), by L1; stored logits, DER (arXiv 2004.07211), by mean square.
"""

from torch import Tensor

LEAST = 1e-8  # root mean square: an output of zeros has no scale


def relative_l1(hidden: Tensor, reference: Tensor) -> Tensor:
    """(N,) float32: mean over H of |hidden - reference|, in units of the reference's root mean square at the token.

    hidden, reference: (N, H); the gradient reaches hidden. The scale is each token's own: a mean over a batch would
    hang on what else is in it, and the first token's activations are many times larger than the others'.
    """
    other = reference.detach().float()
    scale = other.square().mean(-1).sqrt().clamp_min(LEAST)
    return (hidden.float() - other).abs().mean(-1) / scale


def mean_square(student: Tensor, teacher: Tensor) -> Tensor:
    """(N,) float32: mean over k of (student - teacher)^2; both (N, k), the gradient reaches the student."""
    return (student.float() - teacher.detach().float()).square().mean(-1)
