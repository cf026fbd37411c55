"""The gradient of the token loss on some rows, outside of training's own passes."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cpt.data.collator import Collator
from cpt.data.computed import summed
from cpt.data.recording import launched, learned, logits_at

TOKENS = 2048  # padded, of one pass


def gradient(model: Any, rows: Any, numbers: Sequence[int], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """d (mean loss of the learned tokens of these rows) / d parameter, the same on every process.

    Args:
        model: a causal language model; its modes are kept and no random number is drawn from the shared generators.
        rows: token rows, packed or not. numbers: which of them; the processes share them out.
        parameters: name -> a trainable tensor of the model.

    Gradients that the parameters hold stay as they are. Cost: a forward and a backward pass over the rows.
    """
    where = launched()
    mine = list(numbers)[where.get("rank", 0) :: where.get("world", 1)]
    found = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    count = torch.zeros((), device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        for batch in _batches(rows, mine):
            loss, tokens = _loss(model, {name: tensor.to(model.device) for name, tensor in batch.items()})
            for name, part in zip(
                found, torch.autograd.grad(loss, [*parameters.values()], allow_unused=True), strict=True
            ):
                if part is not None:
                    found[name] += part
            count += tokens
    summed([*found.values(), count])
    return {name: tensor / count.clamp(min=1.0) for name, tensor in found.items()}


def _batches(rows: Any, numbers: Sequence[int]) -> Iterator[dict[str, Tensor]]:
    """Rows of like length together, at most TOKENS of them with their padding, one at least."""
    collate = Collator(0, packed="seq_lengths" in rows.column_names)
    taken = sorted((rows[number] | {"origin": 0, "row": number} for number in numbers), key=_length)
    while taken:
        n = max(1, min(len(taken), TOKENS // _length(taken[-1])))
        yield collate(taken[-n:])
        taken = taken[:-n]


def _length(row: dict[str, Any]) -> int:
    return len(row["input_ids"])


def _loss(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Sum of the losses of learned tokens, and how many there are."""
    asked: dict[str, Tensor] = {
        name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch
    }
    where = learned(batch["labels"])
    labels = batch["labels"][:, 1:][where[:, :-1]]
    loss = torch.nn.functional.cross_entropy(logits_at(model, asked, where).float(), labels, reduction="sum")
    return loss, len(labels)
