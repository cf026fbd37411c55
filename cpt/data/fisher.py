"""The Fisher information of a model at its weights, on rows, in the run's memory."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cpt.data.memory import Memory, write_about
from cpt.data.recording import ABOUT, launched
from cpt.data.tokens import IGNORED
from cpt.losses.penalties import fisher_diagonal

FILE = "fisher.safetensors"


def fisher(
    model: Any,
    rows: Any,
    folder: Path,
    about: dict[str, Any],
    *,
    sampled: bool,
    seed: int,
    add: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Per trainable tensor the diagonal of the Fisher information of a token; read where it is there already.

    Args:
        model: a causal language model on its device; its modes are restored.
        rows: token rows, each with input_ids and labels.
        folder: an entry of the memory. about: what it says of itself.
        sampled: labels drawn from the model (the true Fisher), else the rows' own (the empirical one).
        add: what stands for rows that were seen before, added to what is kept here.

    Cost: a forward and a backward pass a row, one row at a time; processes share the rows.
    """
    if not (folder / ABOUT).is_file():
        where = launched()
        rank, world = where.get("rank", 0), where.get("world", 1)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        training = [module for module in model.modules() if module.training]
        model.eval()
        with torch.enable_grad():
            total, count = fisher_diagonal(
                trained, _sequences(model, rows, range(rank, len(rows), world), sampled, seed)
            )
        for module in training:
            module.training = True
        tokens = torch.tensor(float(count), device=model.device)
        if world > 1:
            for tensor in (*total.values(), tokens):
                torch.distributed.all_reduce(tensor)
        found = {name: (tensor / tokens).cpu() for name, tensor in total.items()}
        for name, tensor in (add or {}).items():
            found[name] = found[name] + tensor if name in found else tensor
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(found, folder / FILE)
            write_about(folder, about)
        where.get("meet", lambda: None)()
    return load_file(folder / FILE)


def _sequences(
    model: Any, rows: Any, numbers: range, sampled: bool, seed: int
) -> Iterator[Callable[[], tuple[Tensor, int]]]:
    for number in numbers:
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


def kept(memory: Path, name: str, stage: str, parent: str) -> dict[str, Tensor]:
    """What a stage, known by its name and by what it started from, held its weights by; empty where it held none."""
    for one in Memory(memory).entries():
        if one.folder.name.startswith(f"{name}-") and (one.about.get("stage"), one.about.get("parent")) == (
            stage,
            parent,
        ):
            return load_file(one.folder / FILE)
    return {}
