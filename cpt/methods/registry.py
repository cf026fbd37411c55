"""Names in YAML to method classes, imported only when a stream names them.

A package of yours adds methods through the entry-point group `cpt.methods`:

    [project.entry-points."cpt.methods"]
    my_method = "my_package.my_method:MyMethod"
"""

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from cpt.suggest import did_you_mean

if TYPE_CHECKING:
    from cpt.methods.base import Method

OURS = {
    "a_gem": "cpt.methods.a_gem:AGEM",
    "block_anchor": "cpt.methods.block_anchor:BlockAnchor",
    "der": "cpt.methods.der:DER",
    "distill": "cpt.methods.distill:Distill",
    "dpo": "cpt.methods.dpo:DPO",
    "eaft": "cpt.methods.eaft:EAFT",
    "ewc": "cpt.methods.ewc:EWC",
    "flat": "cpt.methods.flat:FLAT",
    "gere": "cpt.methods.gere:GeRe",
    "grad_ascent": "cpt.methods.grad_ascent:GradAscent",
    "hft": "cpt.methods.hft:HFT",
    "idk": "cpt.methods.idk:IDK",
    "l2_sp": "cpt.methods.l2_sp:L2SP",
    "npo": "cpt.methods.npo:NPO",
    "projection": "cpt.methods.projection:Projection",
    "replay": "cpt.methods.replay:Replay",
    "rewrite": "cpt.methods.rewrite:Rewrite",
    "simnpo": "cpt.methods.simnpo:SimNPO",
}


class UnknownMethod(LookupError):
    """No method of that name; the message suggests the nearest and lists what there is."""


@cache
def homes() -> dict[str, str]:
    """Every method's name and the `module:Class` it lives at; our own names cannot be taken over."""
    found = {point.name: point.value for point in entry_points(group="cpt.methods")}
    return dict(sorted((found | OURS).items()))


@cache
def find(name: str) -> "type[Method]":
    """The class behind a method's name. Raises `UnknownMethod`."""
    if name not in homes():
        known = ", ".join(homes())
        raise UnknownMethod(f"no method is called {name!r}.{did_you_mean(name, homes())} Known methods: {known}.")
    module, _, attribute = homes()[name].partition(":")
    return getattr(import_module(module), attribute)
