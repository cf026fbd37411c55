"""A gradient that works against another one, and what is left of it without that.

Source: A-GEM, Chaudhry et al. 2019 (arXiv 1812.00420), equation 11.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def against(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(min(0, g . r) / r . r, g . r / (|g| |r|)) over all tensors together, of pairs (g, r); both 0 where r is 0.

    g less the first times r no longer works against r: its product with r is g . r or 0, whichever is larger.
    """
    sums = [torch.stack([(g * r).sum(), (r * r).sum(), (g * g).sum()]) for g, r in _wide(pairs)]
    along, own, other = torch.stack(sums).sum(0).unbind()
    some = own > 0
    coefficient = torch.where(some, along.clamp(max=0.0) / own.where(some, torch.ones_like(own)), 0.0)
    lengths = (own * other).sqrt()
    return coefficient, torch.where(lengths > 0, along / lengths.where(lengths > 0, torch.ones_like(own)), 0.0)


def _wide(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterable[tuple[Tensor, Tensor]]:
    return ((g.float(), r.float()) for g, r in pairs)
