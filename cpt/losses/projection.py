"""Linear maps kept clear of a subspace of their inputs, and how clear they are.

Source: GPM, Saha et al. 2021 (arXiv 2103.09762); an update W with W U = 0 leaves what it computes in span U as it was.
"""

import torch
from torch import Tensor


def cleared(weight: Tensor, subspace: Tensor) -> Tensor:
    """weight (I - U U^T): weight (out, d), U (d, r) with orthonormal columns. Float32 at least, also in autocast."""
    with torch.autocast(weight.device.type, enabled=False):
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        basis = subspace.to(wide)
        return wide - (wide @ basis) @ basis.T


def energies(down: Tensor, up: Tensor, subspace: Tensor) -> tuple[float, float]:
    """Squared Frobenius norms of (B A) U and of B A, for up = B (out, k), down = A (k, d), U (d, r); in float64."""
    a, b, u = down.detach().double(), up.detach().double(), subspace.double()
    square = b.T @ b
    inside = a @ u
    return float((square @ inside @ inside.T).trace().clamp_min(0)), float((square @ a @ a.T).trace().clamp_min(0))


def without(layer: torch.nn.Linear, x: Tensor, out: Tensor, subspace: Tensor) -> Tensor:
    """What the layer would have given, had its weight been cleared.

    The weight's share is taken away on the side of the k x d weight: a few of its own products with U, whatever the
    number of tokens. out: what the layer gave for x.
    """
    del out
    weight = cleared(layer.weight, subspace).to(layer.weight.dtype)
    return torch.nn.functional.linear(x, weight, layer.bias)
