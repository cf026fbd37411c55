"""Divergences between next-token distributions, from hidden states and the head: no full logits are kept.

A teacher is known by its hidden states and its own head, or by its k most likely tokens: then the rest of the
vocabulary is one more outcome, and the divergence is a lower bound that is zero exactly where it should be.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Direction = Literal["forward", "reverse"]

TOKENS = 1024  # at a time
LEAST = 1e-6  # probability of the rest: rounding leaves no less


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states: softcap x tanh(scale (W h + b) / softcap).

    weight: (V, H). bias: (V,) or None. scale: of Cohere, Granite and their like. softcap: of Gemma, None where there
    is none.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, H) -> (N, V) float32."""
        return self._shaped(torch.nn.functional.linear(hidden, self.weight.to(hidden.dtype)), self.bias)

    def logits_of(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """(N, H) and (N, k) token ids -> (N, k) float32 logits of those alone."""
        rows = self.weight[tokens].float()  # (N, k, H)
        return self._shaped(
            (rows * hidden.float().unsqueeze(1)).sum(-1), None if self.bias is None else self.bias[tokens]
        )

    def _shaped(self, logits: Tensor, bias: Tensor | None) -> Tensor:
        values = logits.float() if bias is None else logits.float() + bias.float()
        values = values * self.scale if self.scale != 1.0 else values
        return values if self.softcap is None else self.softcap * torch.tanh(values / self.softcap)


def log_probs_of(head: Head, hidden: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """(N, k) log-probabilities of tokens (N, k); a pass through the whole head, 1,024 tokens at a time."""

    def part(h: Tensor, t: Tensor) -> Tensor:
        logits = head.logits(h) / temperature
        return logits.gather(1, t) - logits.logsumexp(1, keepdim=True)

    return _in_parts(part, hidden, tokens)


def log_probs_beside(head: Head, hidden: Tensor, tokens: Tensor, label: Tensor, log_prob: Tensor) -> Tensor:
    """(N, k) log-probabilities of tokens (N, k), from that of another token which is known: no pass through the head.

    label: (N,) token ids; log_prob: (N,) theirs, with gradient, at temperature 1. log p(t) = z(t) - (z(label) -
    log p(label)).
    """

    def part(h: Tensor, t: Tensor, one: Tensor, known: Tensor) -> Tensor:
        logits = head.logits_of(h, torch.cat([one.unsqueeze(1), t], dim=1))
        return logits[:, 1:] - logits[:, :1] + known.float().unsqueeze(1)

    return _in_parts(part, hidden, tokens, label, log_prob)


def top_k_divergence(student: Tensor, teacher: Tensor, direction: Direction = "forward") -> Tensor:
    """(N,) nats: KL(teacher || student), or the reverse, over k tokens and the rest as one outcome.

    student, teacher: (N, k) log-probabilities of the same tokens; the gradient reaches the student.
    """
    p, q = _with_rest(teacher.detach()), _with_rest(student)
    return (p.exp() * (p - q)).sum(1) if direction == "forward" else (q.exp() * (q - p)).sum(1)


def divergence(
    student: Head,
    hidden: Tensor,
    teacher: Head,
    reference: Tensor,
    direction: Direction = "forward",
    temperature: float = 1.0,
) -> Tensor:
    """(N,) nats over the whole vocabulary, by TRL's kernel, in tiles of both heads.

    hidden, reference: (N, H) of student and teacher. Source of the form: Kullback and Leibler 1951; temperature
    divides the logits of both, without the factor T^2 of Hinton et al. 2015 (arXiv 1503.02531).
    """
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    found, _ = ChunkedDivergenceFunction.apply(
        *(hidden, student.weight, student.bias, reference, teacher.weight, teacher.bias),
        *(0.0 if direction == "forward" else 1.0, temperature),
        *(student.scale, student.softcap, teacher.scale, teacher.softcap),
    )
    made: Tensor = found
    return made


def _with_rest(log_probs: Tensor) -> Tensor:
    """(N, k + 1): the log-probability of everything else last."""
    rest = (1.0 - log_probs.float().exp().sum(1, keepdim=True)).clamp_min(LEAST)
    return torch.cat([log_probs.float(), rest.log()], dim=1)


def _in_parts(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """The function over 1,024 rows at a time, computed again in the backward pass."""
    parts = [part for part in zip(*(one.split(TOKENS) for one in tensors), strict=True)]
    made = [checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.cat(made)
