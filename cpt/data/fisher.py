"""The Fisher information of a model at its weights, on rows."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cpt.data.computed import my_rows, summed
from cpt.data.tokens import IGNORED
from cpt.losses.penalties import fisher_diagonal


def fisher(model: Any, rows: Any, *, sampled: bool, seed: int) -> dict[str, Tensor]:
    """Per trainable tensor the diagonal of the Fisher information of a token, float32.

    Args:
        model: a causal language model on its device; its modes are restored.
        rows: token rows, each with input_ids and labels.
        sampled: labels drawn from the model (the true Fisher), else the rows' own (the empirical one).

    Cost: a forward and a backward pass a row, one row at a time; processes share the rows.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    training = [module for module in model.modules() if module.training]
    model.eval()
    with torch.enable_grad():
        total, count = fisher_diagonal(trained, _sequences(model, rows, sampled, seed))
    for module in training:
        module.training = True
    tokens = torch.tensor(float(count), device=model.device)
    summed([*total.values(), tokens])
    return {name: tensor / tokens for name, tensor in total.items()}


def _sequences(model: Any, rows: Any, sampled: bool, seed: int) -> Iterator[Callable[[], tuple[Tensor, int]]]:
    for number in my_rows(len(rows)):
        yield lambda number=number: _log_likelihood(model, rows[number], sampled, seed + number)  # type: ignore[misc]


def _log_likelihood(model: Any, row: dict[str, Any], sampled: bool, seed: int) -> tuple[Tensor, int]:
    ids, labels = (torch.tensor(row[name], device=model.device) for name in ("input_ids", "labels"))
    learned = labels[1:] != IGNORED
    log_probs = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, :-1][learned].float().log_softmax(1)
    if sampled:
        draw = torch.Generator().manual_seed(seed)
        chosen = torch.multinomial(log_probs.detach().exp().cpu(), 1, generator=draw).to(log_probs.device)
    else:
        chosen = labels[1:][learned].long().unsqueeze(1)
    return log_probs.gather(1, chosen).sum(), len(chosen)
