"""Tensors that are computed of rows before a stage and kept in the run's memory: once, the same on every process."""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from cpt.data.memory import Entry, Memory, entry, write_about
from cpt.data.recording import ABOUT, as_first, launched
from cpt.data.tokens import TokenRows

FILE = "tensors.safetensors"


def computed(
    memory: Path, name: str, about: dict[str, Any], make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What `make` gives, on the CPU; read instead where an entry of that name says the same of itself.

    about: what the entry says, and what decides its content. Every process calls it, and all of them make or none.
    """
    folder, where = entry(memory, name, about), launched()
    if as_first((folder / ABOUT).is_file()):
        os.utime(folder / ABOUT)  # the newest of a name is the one that was used last
        return load_file(folder / FILE)
    found = make()
    if where.get("rank", 0) == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.cpu().contiguous() for key, tensor in found.items()}, folder / FILE)
        write_about(folder, about)
    where.get("meet", lambda: None)()
    return load_file(folder / FILE)


def about_rows(of: str, rows: TokenRows, **settings: Any) -> dict[str, Any]:
    """What an entry says that was computed of all rows together: which they are, a hash of their tokens, settings."""
    content = hashlib.sha256()
    for row in rows.dataset:
        content.update(repr((list(row["input_ids"]), list(row["labels"]))).encode())
    return {"of": of, "aggregate": True, "rows": list(rows.ids), "tokens": content.hexdigest()[:16], **settings}


def newest(memory: Path, **about: Any) -> Entry | None:
    """The entry used last among those that say so of themselves."""
    found = [one for one in Memory(memory).entries() if about.items() <= one.about.items()]
    return max(found, key=lambda one: (one.folder / ABOUT).stat().st_mtime_ns, default=None)


def tensors_of(one: Entry) -> dict[str, Tensor]:
    """What `computed` kept in an entry."""
    return load_file(one.folder / FILE)


def my_rows(count: int) -> range:
    """Numbers of the rows that this process computes."""
    where = launched()
    return range(where.get("rank", 0), count, where.get("world", 1))


def summed(tensors: Iterable[Tensor]) -> None:
    """Add up over processes, in place; all of them must hold as many tensors of the same shapes."""
    if launched().get("world", 1) > 1:
        from torch import distributed

        for tensor in tensors:
            distributed.all_reduce(tensor)
