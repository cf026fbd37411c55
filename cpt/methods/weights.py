"""The trained weights that a method holds on to as a reference: those that the stage starts from, or the base's."""

from typing import TYPE_CHECKING

from cpt.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cpt.methods.base import StageInfo


def copied(model: "nn.Module", stage: "StageInfo", to: str, place: str, instead: str) -> "dict[str, Tensor]":
    """Copies of the trained weights by name, on the stage's device; of the base's with `to: base`.

    Called in `prepare_model`. place, instead: of the error, DataError, where the base has no weight of a name.
    """
    trained = {name: p for name, p in model.to(stage.device).named_parameters() if p.requires_grad}
    if to != "base":
        return {name: p.detach().clone() for name, p in trained.items()}
    assert stage.open_base is not None
    base = dict(stage.open_base().named_parameters())
    if missing := sorted(trained.keys() - base.keys()):
        raise DataError(f"{place}: the base has no {missing[0]}, which this stage trains: {instead}")
    return {name: base[name].detach().to(p, copy=True) for name, p in trained.items()}
