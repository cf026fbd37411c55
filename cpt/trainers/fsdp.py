"""What FSDP2 does otherwise: each tensor is a piece (a DTensor), trained ones float32 under mixed precision."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: a piece under FSDP2, else all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(trainer: Any) -> dict[str, torch.Tensor]:
    """The model's whole state dict in main memory on the first process, {} on the others. All processes must call it.

    Tensors have the precision that they were loaded in. The first process's model becomes a plain one that holds them:
    what a saved configuration says of precision is read there.
    """
    gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    weights = {name: tensor.to(trainer.loaded_dtypes.get(name, tensor.dtype)) for name, tensor in gathered.items()}
    for name, source in (getattr(trainer.model, "all_tied_weights_keys", None) or {}).items():
        if source in weights:  # gathered once per name; saving leaves one out only where both are the same memory
            weights[name] = weights[source]
    _hold(trainer.model, weights)
    return weights


def _hold(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Put whole tensors where the pieces were; loading them the usual way would cut them up again."""
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        if name in weights:
            module, _, own = name.rpartition(".")
            model.get_submodule(module).register_parameter(own, torch.nn.Parameter(weights[name], requires_grad=False))
