"""What a model computes at the learned tokens of fixed rows, recorded once: regions of its last hidden states.

A region (low, middle, high; `cpt.losses.threshold_margin`) takes two bits an entry: 1,000 texts of 563 tokens of an 8B
model are 0.58 GB, in float32 they would be 9.2. Two passes over the rows: moments first, for thresholds need all
tokens, then regions. A recording is cut into parts of 64 rows; a part that is written is never computed again, and
on several processes each takes its part of the parts. Files are safetensors and JSON.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cpt.losses.threshold_margin import PER_BYTE, Moments, pack, regions, unpack

ROWS = 64  # of a part
AT_ONCE = 8  # rows of a forward pass
SAMPLE = 16  # rows on which the noise of batch shapes is measured
SAFETY = 4.0  # times the noise that was seen
ROUNDING = 16 * torch.finfo(torch.float32).eps  # of a dimension's largest entry: noise that a sample may have missed


@dataclass(frozen=True)
class Recording:
    """Regions of the learned tokens of every row, in a folder that one recording alone writes.

    folder: about.json, moments-N, regions-N, thresholds.safetensors. dimensions: H of the model.
    """

    folder: Path
    dimensions: int

    @cached_property
    def _thresholds(self) -> dict[str, Tensor]:
        return load_file(self.folder / "thresholds.safetensors")

    def thresholds(self, device: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(H,) each: lower and upper threshold, and the noise below which nothing lies outside of its region."""
        low, high, noise = (self._thresholds[name].to(device) for name in ("low", "high", "noise"))
        return low, high, noise

    def regions(self, rows: Sequence[int], device: Any) -> Tensor:
        """(N, H) uint8: the regions of the learned tokens of these rows, row after row."""
        none = torch.empty(0, -(-self.dimensions // PER_BYTE), dtype=torch.uint8)
        return unpack(torch.cat([none, *(self._of(row) for row in rows)]).to(device), self.dimensions)

    def _of(self, row: int) -> Tensor:
        with safe_open(self.folder / f"regions-{row // ROWS:05d}.safetensors", "pt") as file:
            begin, end = file.get_slice("offsets")[row % ROWS : row % ROWS + 2].tolist()
            return file.get_slice("regions")[begin:end]


def record(
    model: Any,
    rows: Any,
    folder: Path,
    about: dict[str, Any],
    *,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    rank: int = 0,
    world: int = 1,
    meet: Callable[[], None] = lambda: None,
) -> Recording:
    """Record the rows' regions in the folder, or go on with what is recorded there.

    Args:
        model: a causal language model, on its device; its modes are restored.
        rows: token rows, each with input_ids and labels (-100 where nothing is learned).
        about: what the recording is of, kept in about.json.
        autocast: the precision that training computes in.
        rank, world, meet: this process, all of them, and a barrier.

    Cost: two forward passes over the rows, and one over at most 16 of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = Recording(folder, model.config.get_text_config().hidden_size)
    if (folder / "about.json").is_file():
        return made
    parts = [range(at, min(at + ROWS, len(rows))) for at in range(0, len(rows), ROWS)]
    mine = [number for number in range(len(parts)) if number % world == rank]
    with _reading(model), autocast():
        for number in mine:
            _write_once(folder / f"moments-{number:05d}.safetensors", lambda: _moments(model, rows, parts[number]))  # noqa: B023
        meet()
        if rank == 0:
            _write_once(folder / "thresholds.safetensors", lambda: _thresholds(model, rows, folder, len(parts)))
        meet()
        low, high, _ = made.thresholds(model.device)
        for number in mine:
            _write_once(
                folder / f"regions-{number:05d}.safetensors",
                lambda: _regions(model, rows, parts[number], low, high),  # noqa: B023
            )
        meet()
    if rank == 0:
        for file in folder.glob("moments-*.safetensors"):
            file.unlink()
        aside = folder / "about.json.partial"
        aside.write_text(json.dumps(about, indent=1, sort_keys=True), encoding="utf-8")
        os.replace(aside, folder / "about.json")
    meet()
    return made


def launched() -> dict[str, Any]:
    """`rank`, `world` and `meet` of the processes of this launch."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return {}
    return {"rank": distributed.get_rank(), "world": distributed.get_world_size(), "meet": distributed.barrier}


def backbone(model: Any) -> Any:
    """The part of a causal language model whose output the head reads."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal.base_model


def learned(labels: Tensor) -> Tensor:
    """(B, T) true at the positions whose hidden state predicts a learned token."""
    return torch.nn.functional.pad(labels[:, 1:].ne(-100), (0, 1))


class _reading:
    """Eval mode and no gradients; the modes are restored."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.training = [module for module in self.model.modules() if module.training]
        self.grad = torch.is_grad_enabled()
        self.model.eval()
        torch.set_grad_enabled(False)

    def __exit__(self, *error: object) -> None:
        torch.set_grad_enabled(self.grad)
        for module in self.training:
            module.training = True


def _write_once(file: Path, tensors: Callable[[], dict[str, Tensor]]) -> None:
    if not file.is_file():
        aside = file.with_suffix(".partial")
        save_file(tensors(), aside)
        os.replace(aside, file)


def _hidden(model: Any, rows: Any, part: Sequence[int], at_once: int = AT_ONCE, pad: int = 0) -> Iterator[Tensor]:
    """(N, H) of the learned tokens of each row of the part, in its order; rows of near lengths share a batch."""
    order = sorted(part, key=lambda i: -len(rows[i]["input_ids"]))
    found: dict[int, Tensor] = {}
    for at in range(0, len(order), at_once):
        batch = order[at : at + at_once]
        ids = [torch.tensor(rows[i]["input_ids"]) for i in batch]
        labels = [torch.tensor(rows[i]["labels"]) for i in batch]
        width = len(ids[0]) + pad
        padded = torch.stack([torch.nn.functional.pad(one, (0, width - len(one))) for one in ids])
        wanted = torch.stack([torch.nn.functional.pad(one, (0, width - len(one)), value=-100) for one in labels])
        mask = torch.stack([torch.arange(width) < len(one) for one in ids]).long()
        inputs = {"input_ids": padded.to(model.device), "attention_mask": mask.to(model.device)}
        hidden = backbone(model)(**inputs, use_cache=False).last_hidden_state
        for i, one, where in zip(batch, hidden, learned(wanted).to(model.device), strict=True):
            found[i] = one[where]
    yield from (found[i] for i in part)


def _moments(model: Any, rows: Any, part: Sequence[int]) -> dict[str, Tensor]:
    made: Moments | None = None
    largest = torch.zeros(())
    for hidden in _hidden(model, rows, part):
        made = made or Moments.of(hidden.shape[1])
        made.add(hidden.cpu())
        largest = torch.maximum(largest, hidden.float().abs().amax(0).cpu())
    assert made is not None
    return {"count": torch.tensor(made.count), "total": made.total, "squares": made.squares, "largest": largest}


def _thresholds(model: Any, rows: Any, folder: Path, parts: int) -> dict[str, Tensor]:
    """Thresholds from the moments of all parts, and the noise: what other batches of the same rows differ by."""
    read = [load_file(folder / f"moments-{number:05d}.safetensors") for number in range(parts)]
    count = sum(int(one["count"]) for one in read)
    total, squares = (torch.stack([one[name] for one in read]).sum(0) for name in ("total", "squares"))
    low, high = Moments(count, total, squares).thresholds()
    largest = torch.stack([one["largest"] for one in read]).amax(0)
    sample = range(min(SAMPLE, len(rows)))
    seen = torch.zeros_like(largest)
    for once, again in zip(_hidden(model, rows, sample), _hidden(model, rows, sample, at_once=3, pad=5), strict=True):
        seen = torch.maximum(seen, (once.float() - again.float()).abs().amax(0).cpu())
    return {"low": low, "high": high, "noise": SAFETY * seen + ROUNDING * largest}


def _regions(model: Any, rows: Any, part: Sequence[int], low: Tensor, high: Tensor) -> dict[str, Tensor]:
    packed = [pack(regions(hidden.float(), low, high)).cpu() for hidden in _hidden(model, rows, part)]
    offsets = torch.tensor([0, *(len(one) for one in packed)]).cumsum(0)
    return {"regions": torch.cat(packed), "offsets": offsets}
