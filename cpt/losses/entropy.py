"""How sure a model is of the next token: entropy over its likely tokens, from hidden states and the head."""

import math

import torch
from torch import Tensor

from cpt.losses.divergences import TOKENS, Head


@torch.no_grad()
def top_k_entropy(head: Head, hidden: Tensor, k: int) -> Tensor:
    """(N,) of 0 to 1: entropy of the k most likely tokens, their probabilities made to sum to 1, over log k.

    hidden: (N, H). A pass through the head without gradient, 1,024 tokens at a time. Source: EAFT, arXiv 2601.02151.
    """
    k = min(k, len(head.weight))
    if k < 2:
        return hidden.new_zeros(len(hidden), dtype=torch.float32)
    found = []
    for part in hidden.split(TOKENS):
        log_probs = head.logits(part).topk(k, dim=1).values.log_softmax(1)
        found.append(-(log_probs.exp() * log_probs).sum(1) / math.log(k))
    return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)
