"""Threshold margin: each hidden activation stays in the region, low, middle or high, where the base had it.

Source: GeRe, arXiv 2508.04676. A hidden dimension d has two thresholds, its mean less and plus one standard deviation
over all tokens recorded. Of the base's activations only the three regions are kept, in two bits an entry.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LOW, MIDDLE, HIGH = 0, 1, 2
PER_BYTE = 4  # codes of two bits


@dataclass
class Moments:
    """Count, sum and sum of squares of every dimension, (H,) in float64: the order shows in the last bits only."""

    count: int
    total: Tensor
    squares: Tensor

    @classmethod
    def of(cls, dimensions: int) -> "Moments":
        """Of no token yet."""
        return cls(0, torch.zeros(dimensions, dtype=torch.float64), torch.zeros(dimensions, dtype=torch.float64))

    def add(self, hidden: Tensor) -> None:
        """Add tokens, (N, H)."""
        values = hidden.to(device=self.total.device, dtype=torch.float64)
        self.count += len(values)
        self.total += values.sum(0)
        self.squares += values.square().sum(0)

    def thresholds(self, width: float = 1.0) -> tuple[Tensor, Tensor]:
        """(H,) float32 each: the mean less and plus `width` standard deviations (of the population)."""
        mean = self.total / self.count
        deviation = (self.squares / self.count - mean.square()).clamp_min(0).sqrt()
        return (mean - width * deviation).float(), (mean + width * deviation).float()


def regions(hidden: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(..., H) uint8: LOW at or below `low`, HIGH at or above `high`, else MIDDLE; without any spread LOW."""
    found = torch.full(hidden.shape, MIDDLE, dtype=torch.uint8, device=hidden.device)
    found[hidden >= high] = HIGH
    found[hidden <= low] = LOW
    return found


def pack(codes: Tensor) -> Tensor:
    """(..., H) codes of 0 to 3 as (..., ceil(H / 4)) uint8, the first in the lowest bits."""
    missing = -codes.shape[-1] % PER_BYTE
    padded = torch.nn.functional.pad(codes, (0, missing)).unflatten(-1, (-1, PER_BYTE))
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=codes.device)
    return (padded << shifts).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, dimensions: int) -> Tensor:
    """(..., dimensions) uint8 codes of what `pack` gave."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 3).flatten(-2)[..., :dimensions]


def margins(hidden: Tensor, codes: Tensor, low: Tensor, high: Tensor, noise: Tensor | float = 0.0) -> Tensor:
    """(..., H) float32: how far each activation lies outside of its region; gradient +1 above it, -1 below it, else 0.

    noise: (H,) or a number: nothing nearer to its region than this lies outside, and it counts from there on. What
    batch shapes alone move an activation by must not be punished.
    """
    values = hidden.float()
    infinite = torch.full((), torch.inf, device=hidden.device)
    upper = torch.where(codes == LOW, low, torch.where(codes == HIGH, infinite, high))
    lower = torch.where(codes == HIGH, high, torch.where(codes == LOW, -infinite, low))
    return torch.relu(values - upper - noise) + torch.relu(lower - values - noise)
