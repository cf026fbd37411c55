"""What an answer's probability is, and preference losses that forget by it. Sums are left to the caller.

log_probs: (B, T) log-probabilities of the label tokens, 0 where the mask is false; mask: (B, T) true at answer tokens.
"""

from torch import Tensor
from torch.nn.functional import logsigmoid


def mean_probability(log_probs: Tensor, mask: Tensor) -> Tensor:
    """(B,) mean probability of a row's answer tokens (FLAT): neither of all positions, nor of the batch."""
    return (log_probs.exp() * mask).sum(1) / mask.sum(1).clamp_min(1)


def geometric_probability(log_probs: Tensor, mask: Tensor) -> Tensor:
    """(B,) exp of the mean log-probability of a row's answer tokens: TOFU's P(a|q)^(1/|a|)."""
    return mean_log_probability(log_probs, mask).exp()


def mean_log_probability(log_probs: Tensor, mask: Tensor) -> Tensor:
    """(B,) mean log-probability of a row's answer tokens."""
    return (log_probs * mask).sum(1) / mask.sum(1).clamp_min(1)


def slope(log_probs: Tensor, mask: Tensor) -> Tensor:
    """(B,) mean p (1 - p) of a row's answer tokens: what a probability lets through to its own logit."""
    p = log_probs.exp()
    return (p * (1.0 - p) * mask).sum(1) / mask.sum(1).clamp_min(1)


def npo(summed: Tensor, reference: Tensor, beta: float) -> Tensor:
    """(B,) -2 / beta x log sigmoid(-beta (log p - log p_reference)), of summed log-probabilities (arXiv 2404.05868, 3).

    As beta goes to 0 its gradient is that of gradient ascent.
    """
    return -2.0 / beta * logsigmoid(-beta * (summed - reference))


def simnpo(mean: Tensor, beta: float, margin: float = 0.0) -> Tensor:
    """(B,) -2 / beta x log sigmoid(-beta x mean log p - beta x margin): length-normalised, no reference
    (arXiv 2410.07163, 4)."""
    return -2.0 / beta * logsigmoid(beta * (-mean - margin))


def dpo(chosen: Tensor, rejected: Tensor, chosen_reference: Tensor, rejected_reference: Tensor, beta: float) -> Tensor:
    """(B,) -1 / beta x log sigmoid(beta x (chosen's gain - rejected's gain)), gains of summed log-probabilities
    (arXiv 2305.18290, 7, over beta: its gradient at the start then does not hang on it)."""
    gain = (chosen - chosen_reference) - (rejected - rejected_reference)
    return -1.0 / beta * logsigmoid(beta * gain)
