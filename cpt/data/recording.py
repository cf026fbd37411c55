"""What a model computes at the learned tokens of fixed rows, kept on disk: part by part, and once.

A recording is cut into parts of 64 rows. A part that is written is never computed again; on several processes each
takes its part of the parts. `about.json` is written last and says what the recording is of. Files are safetensors
and JSON, read by slices.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cpt.errors import DataError

ROWS = 64  # of a part
AT_ONCE = 8  # rows of a forward pass
ABOUT = "about.json"

T = TypeVar("T")


@dataclass(frozen=True)
class Recording:
    """Tensors of the learned tokens of every row, (N, ...) each, in a folder that one recording alone writes."""

    folder: Path

    @property
    def about(self) -> dict[str, Any]:
        """What the recording is of."""
        found: dict[str, Any] = json.loads((self.folder / ABOUT).read_text(encoding="utf-8"))
        return found

    def read(self, parts: str, name: str, rows: Sequence[int]) -> Tensor:
        """(N, ...) tensor `name` of the learned tokens of these rows, row after row; on the CPU."""
        if not rows:  # of the right width all the same
            return self._of(parts, name, 0)[:0]
        return torch.cat([self._of(parts, name, row) for row in rows])

    def _of(self, parts: str, name: str, row: int) -> Tensor:
        with safe_open(self.folder / f"{parts}-{row // ROWS:05d}.safetensors", "pt") as file:
            begin, end = file.get_slice("offsets")[row % ROWS : row % ROWS + 2].tolist()
            found: Tensor = file.get_slice(name)[begin:end]
            return found


@dataclass(frozen=True)
class Recorder:
    """One recording at work: a causal language model on its device, the rows, and which parts are this process's."""

    model: Any
    rows: Any
    folder: Path
    rank: int = 0
    world: int = 1
    meet: Callable[[], None] = lambda: None

    @property
    def parts(self) -> int:
        """How many there are."""
        return -(-len(self.rows) // ROWS)

    def each(self, name: str, make: Callable[[range], dict[str, Tensor]]) -> None:
        """Write NAME-number.safetensors of every part that is not there yet; returns when all processes have."""
        for number in range(self.rank, self.parts, self.world):
            part = range(number * ROWS, min((number + 1) * ROWS, len(self.rows)))
            write_once(self.folder / f"{name}-{number:05d}.safetensors", lambda: make(part))  # noqa: B023
        self.meet()

    def once(self, name: str, make: Callable[[], dict[str, Tensor]]) -> None:
        """Write NAME.safetensors on the first process, unless it is there; returns when it is."""
        if self.rank == 0:
            write_once(self.folder / f"{name}.safetensors", make)
        self.meet()

    def hidden(self, part: Sequence[int], at_once: int = AT_ONCE, pad: int = 0) -> Iterator[Tensor]:
        """(N, H) what the head reads at the learned tokens of each row of the part, in its order."""
        return self._reading(part, at_once, pad, lambda inputs, where: self._last(inputs)[where])

    def logits(self, part: Sequence[int]) -> Iterator[Tensor]:
        """(N, V) the model's own logits of the learned tokens, no others are computed."""
        return self._reading(part, AT_ONCE, 0, partial(logits_at, self.model))

    def _last(self, inputs: dict[str, Tensor]) -> Tensor:
        found: Tensor = backbone(self.model)(**inputs, use_cache=False).last_hidden_state
        return found

    def _reading(
        self, part: Sequence[int], at_once: int, pad: int, read: Callable[[dict[str, Tensor], Tensor], Tensor]
    ) -> Iterator[Tensor]:
        """What `read` finds at the learned tokens of each row; rows of near lengths share a batch."""
        order = sorted(part, key=lambda i: -len(self.rows[i]["input_ids"]))
        found: dict[int, Tensor] = {}
        for at in range(0, len(order), at_once):
            batch = order[at : at + at_once]
            inputs, where = _padded([self.rows[i] for i in batch], pad)
            where = where.to(self.model.device)
            values = read({name: one.to(self.model.device) for name, one in inputs.items()}, where)
            found |= dict(zip(batch, values.split(where.sum(1).tolist()), strict=True))
        yield from (found[i] for i in part)


def record(
    recorder: Recorder,
    about: dict[str, Any],
    passes: Callable[[Recorder], None],
    scratch: Sequence[str] = (),
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Make a recording, or go on with what is recorded in its folder; nothing is computed where it is finished.

    Args:
        about: what the recording is of, kept in about.json.
        passes: writes the parts; runs in eval mode without gradients, and the model's modes are restored.
        scratch: names of parts that are dropped at the end.
        autocast: the precision that training computes in.

    Raises DataError where the folder holds a recording of something else.
    """
    folder = recorder.folder
    if (folder / ABOUT).is_file():
        return _refuse_other(folder, about)
    folder.mkdir(parents=True, exist_ok=True)
    with reading(recorder.model), autocast():
        passes(recorder)
    if recorder.rank == 0:
        for name in scratch:
            for file in folder.glob(f"{name}-*.safetensors"):
                file.unlink()
        aside = folder / f"{ABOUT}.partial"
        aside.write_text(json.dumps(about, indent=1, sort_keys=True), encoding="utf-8")
        os.replace(aside, folder / ABOUT)
    recorder.meet()


def _refuse_other(folder: Path, about: dict[str, Any]) -> None:
    found = Recording(folder).about
    wanted = json.loads(json.dumps(about))
    if other := sorted(name for name in wanted | found if wanted.get(name) != found.get(name)):
        said = ", ".join(f"{name} {_short(found.get(name))} instead of {_short(wanted.get(name))}" for name in other)
        raise DataError(f"{folder}: was recorded of something else ({said}): remove the folder, it is recorded again")


def _short(value: Any) -> str:
    return f"{len(value)} ids" if isinstance(value, list) else repr(value)


def offsets(values: Sequence[Tensor]) -> Tensor:
    """(rows + 1,) where each row's tokens begin among those of the part."""
    return torch.tensor([0, *(len(one) for one in values)]).cumsum(0)


def launched() -> dict[str, Any]:
    """`rank`, `world` and `meet` of the processes of this launch."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return {}
    return {"rank": distributed.get_rank(), "world": distributed.get_world_size(), "meet": distributed.barrier}


def as_first(seen: T) -> T:
    """What the first process passes (picklable), on all: in a folder others may see what it has written meanwhile."""
    if launched().get("world", 1) == 1:
        return seen
    from torch import distributed

    holder = [seen]
    distributed.broadcast_object_list(holder, src=0)
    return holder[0]


def logits_at(model: Any, inputs: dict[str, Tensor], where: Tensor) -> Tensor:
    """(N, V) a model's own logits where the mask (B, T) is true; no others are computed.

    Through its own forward, for some models scale or cap what their head returns.
    """
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][where][None], *args[1:]))
    try:
        found: Tensor = model(**inputs, use_cache=False).logits[0]
        return found
    finally:
        hook.remove()


def backbone(model: Any) -> Any:
    """The part of a causal language model whose output the head reads."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal.base_model


def learned(labels: Tensor) -> Tensor:
    """(B, T) true at the positions whose hidden state predicts a learned token."""
    return torch.nn.functional.pad(labels[:, 1:].ne(-100), (0, 1))


class reading:
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


def write_once(file: Path, tensors: Callable[[], dict[str, Tensor]]) -> None:
    """Write a safetensors file by rename, unless it is there."""
    if not file.is_file():
        aside = file.with_suffix(".partial")
        save_file(tensors(), aside)
        os.replace(aside, file)


def _padded(rows: Sequence[Any], pad: int) -> tuple[dict[str, Tensor], Tensor]:
    """input_ids and attention_mask, (B, T), of rows padded on the right, and (B, T) where learned tokens are read."""
    ids, labels = ([torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels"))
    width = max(len(one) for one in ids) + pad
    padded = torch.stack([torch.nn.functional.pad(one, (0, width - len(one))) for one in ids])
    wanted = torch.stack([torch.nn.functional.pad(one, (0, width - len(one)), value=-100) for one in labels])
    mask = torch.stack([torch.arange(width) < len(one) for one in ids]).long()
    return {"input_ids": padded, "attention_mask": mask}, learned(wanted)
