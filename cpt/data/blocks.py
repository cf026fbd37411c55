"""The blocks of a model: its decoder layers, told apart by what a forward pass calls, and what comes out of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cpt.data.recording import backbone, reading
from cpt.errors import DataError

PROBE = 2  # tokens of the pass that finds them


def blocks(model: Any) -> list[nn.Module]:
    """The decoder layers, first to last: the longest list of modules of which a forward pass calls every entry.

    An entry must give hidden states, (B, T, H), which the experts inside a layer do not. Costs a forward pass over two
    tokens, without gradient. Raises DataError where there is no such list.
    """
    body = backbone(model)
    lists = [list(module) for module in body.modules() if isinstance(module, nn.ModuleList) and len(module)]
    called: set[nn.Module] = set()

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if (hidden := hidden_of(output)) is not None and hidden.shape[:2] == (1, PROBE):
            called.add(module)

    hooks = [entry.register_forward_hook(note) for entry in {one for entries in lists for one in entries}]
    devices = [body.device] if body.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), reading(model):
            body(input_ids=torch.zeros(1, PROBE, dtype=torch.long, device=body.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    whole = [entries for entries in lists if called.issuperset(entries)]
    if not whole:
        raise DataError(
            f"{type(body).__name__}: has no list of decoder layers that a forward pass goes through one by one: "
            "methods that read block outputs do not work with this architecture; leave them out"
        )
    return max(whole, key=len)


@contextmanager
def keeping(layers: "dict[int, nn.Module]") -> Iterator[dict[int, Tensor]]:
    """What layers give while this lasts, by number."""
    found: dict[int, Tensor] = {}

    def keep(number: int, module: nn.Module, args: Any, output: Any) -> None:
        if (hidden := hidden_of(output)) is not None:
            found[number] = hidden

    hooks = [layer.register_forward_hook(partial(keep, number)) for number, layer in layers.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def by_number(found: dict[int, Tensor], count: int) -> "tuple[Tensor | None, ...]":
    """One entry for every block, None where nothing was kept."""
    return tuple(found.get(number) for number in range(count))


def evenly(wanted: int, count: int) -> list[int]:
    """Numbers of `wanted` of `count` blocks at even distances, the last among them; all where there are no more."""
    n = min(wanted, count)
    return [(i + 1) * count // n - 1 for i in range(n)]


def hidden_of(output: Any) -> Tensor | None:
    """(B, T, H) of what a layer returned, alone or first of several; None where it is something else."""
    first = output[0] if isinstance(output, Sequence) and len(output) else output
    return first if isinstance(first, Tensor) and first.ndim == 3 else None
