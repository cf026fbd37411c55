"""The subspace in which most of what linear layers read lies, of a model on rows.

Sources: the choice of a rank by its share of the energy, GPM, Saha et al. 2021 (arXiv 2103.09762); the sketch, Tropp et
al. 2017 (arXiv 1706.05736), Algorithm 3.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cpt.data.computed import my_rows, summed
from cpt.data.recording import reading

WIDE = 4096  # inputs from which on a sketch stands for the Gram matrix
SKETCH = 1024  # its columns, and the largest rank that it tells
EPS = 1e-6

Groups = list[tuple[str, ...]]


def input_subspaces(
    model: Any, layers: dict[str, Any], rows: Any, energy: float, most: Callable[[int], int], seed: int
) -> dict[str, Tensor]:
    """Per group of layers, their names joined by commas, (d, r) orthonormal columns that hold the share `energy`.

    Args:
        model: a causal language model on its device; its modes are restored.
        layers: modules whose first argument is (1, T, d) or (tokens, d). Those that read one tensor share a subspace.
        rows: token rows; each token counts alike, divided by its root mean square: what some models put at the first
            token of a row would be nearly all of the energy else.
        most: width d -> the largest rank.
        seed: of the sketches.

    A group that read nothing is left out. Cost: one forward pass a row, the processes share the rows; d x d numbers a
    group, above a width of 4,096 d x 1,024.
    """
    with reading(model), _inputs(layers) as read:
        groups = _groups(model, layers, rows, read)
        moments = {",".join(names): _Moments(_width(layers[names[0]]), seed, model.device) for names in groups}
        for number in my_rows(len(rows)):
            _run(model, rows[number], read)
            for names in groups:
                if names[0] in read:
                    moments[",".join(names)].add(_normalised(read[names[0]]))
    summed(tensor for one in moments.values() for tensor in (one.product, one.total))
    return {name: one.subspace(energy, most(one.width)) for name, one in moments.items() if float(one.total) > 0}


def _groups(model: Any, layers: dict[str, Any], rows: Any, read: dict[str, Tensor]) -> Groups:
    """Layers that read one tensor: told by the first row, so the same on all processes. Unread ones stand alone."""
    _run(model, rows[0], read)
    by_tensor: dict[int, list[str]] = {}
    for name in layers:
        by_tensor.setdefault(id(read[name]) if name in read else hash(name), []).append(name)
    return [tuple(names) for names in by_tensor.values()]


def _run(model: Any, row: dict[str, Any], read: dict[str, Tensor]) -> None:
    read.clear()
    model(input_ids=torch.tensor(row["input_ids"], device=model.device).unsqueeze(0), use_cache=False, logits_to_keep=1)


@contextmanager
def _inputs(layers: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    """What each layer read last, by its name, while the context lasts."""
    read: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return layers[name].register_forward_pre_hook(lambda module, args: read.__setitem__(name, args[0]))

    handles = [keep(name) for name in layers]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


def _normalised(x: Tensor) -> Tensor:
    """(N, d) tokens of root mean square 1, float32."""
    x = x.flatten(0, -2).float()
    return x / (x.square().mean(1, keepdim=True) + EPS).sqrt()


def _width(layer: Any) -> int:
    found: int = layer.in_features
    return found


class _Moments:
    """Sum of x x^T over tokens, or for wide layers of x (x^T R) with R random; and of |x|^2."""

    def __init__(self, width: int, seed: int, device: Any) -> None:
        self.width, self.total = width, torch.zeros((), device=device, dtype=torch.float64)
        self.sketch: Tensor | None = None
        if width > WIDE:
            drawn = torch.randn(width, SKETCH, generator=torch.Generator().manual_seed(seed))
            self.sketch = torch.linalg.qr(drawn)[0].to(device)
        columns = width if self.sketch is None else SKETCH
        self.product = torch.zeros(width, columns, device=device)

    def add(self, x: Tensor) -> None:
        self.product += x.T @ (x if self.sketch is None else x @ self.sketch)
        self.total += x.square().sum()

    def subspace(self, energy: float, most: int) -> Tensor:
        values, vectors = self._spectrum()
        rank = 1 + int((values.cumsum(0) < energy * self.total).sum())
        return vectors[:, : min(rank, most)].float()

    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues, the largest first, and eigenvectors; from a sketch those of its Nystrom approximation."""
        product = self.product.double()
        if self.sketch is None:
            values, vectors = torch.linalg.eigh(product)
            return values.flip(0), vectors.flip(1)
        sketch = self.sketch.double()
        shift = torch.finfo(torch.float32).eps * product.norm()
        shifted = product + shift * sketch
        core = sketch.T @ shifted
        factor = torch.linalg.cholesky((core + core.T) / 2)
        vectors, singular, _ = torch.linalg.svd(
            torch.linalg.solve_triangular(factor.T, shifted, upper=True, left=False), full_matrices=False
        )
        return (singular.square() - shift).clamp_min(0), vectors
