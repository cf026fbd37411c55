"""How far weights have moved from a base, module by module: L2 and relative L2, a tensor of each at a time.

Adapters count as what merging them adds, in float64 and not rounded to the weights' dtype, so that a LoRA and full
fine-tuning are of one scale. A tensor that is tied to another counts once. Two folders are read from their
safetensors files: memory is one tensor of each, and for a folder of adapters one module of the base.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval_harness.drift import DriftError, refuse_without_own_base
from eval_harness.lineage import Lineage, LoadError
from eval_harness.results import Result

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE = 2**22  # elements of a tensor in float64 at a time
UNLIKE = "give two folders of one architecture, or two models in memory"

Tensors = Mapping[str, Callable[[], "Tensor"]]  # name -> read it


@dataclass(frozen=True, slots=True)
class Distance:
    """Of one module's own tensors, or of all.

    l2         ||w - w0||
    base_norm  ||w0||
    elements   how many numbers
    """

    l2: float
    base_norm: float
    elements: int

    @property
    def relative(self) -> float | None:
        """||w - w0|| / ||w0||; None where the base is all zero."""
        return self.l2 / self.base_norm if self.base_norm else None


def weight_distance(model: Any, base: Any | None = None, *, trust_remote_code: bool = False) -> dict[str, Distance]:
    """Module name -> how far its tensors are from the base's, in the base's order.

    Args:
        model: a checkpoint (a folder of safetensors, of adapters or of a stage, or its name on the Hub), the Lineage
            of one, or a model in memory, which stays as it is.
        base: the same of the base; None is `model`, in memory, with its PEFT adapters off.
        trust_remote_code: runs code of the checkpoints to build their modules.

    Raises:
        DriftError: tensors of other names or shapes, weights held in few bits or not as safetensors, adapters other
            than those that can be merged.
        LoadError: not a checkpoint, or an adapter that is not one of the model.
    """
    if base is None:
        refuse_without_own_base(model)
    ours = _tensors(model, True, trust_remote_code)
    theirs = _tensors(model if base is None else base, base is not None, trust_remote_code)
    _refuse_other_names(ours, theirs)
    sums: dict[str, list[tuple[float, float, int]]] = {}
    for name, read in theirs.items():
        sums.setdefault(name.rpartition(".")[0], []).append(_squares(name, ours[name](), read()))
    return {module: _joined(parts) for module, parts in sums.items()}


def total(distances: Mapping[str, Distance]) -> Distance:
    """Of all modules together."""
    return _joined([(one.l2**2, one.base_norm**2, one.elements) for one in distances.values()])


def weight_results(distances: Mapping[str, Distance], base_name: str = "base") -> dict[str, Result]:
    """weight_distance and weight_distance_relative as results: the value is the whole model's, an item a module's.

    Modules whose base is all zero have no relative distance and are counted; there is no standard error.
    """
    whole, said = total(distances), f"{base_name},float64,adapters_merged,tied_once"
    l2 = {module: one.l2 for module, one in distances.items()}
    relative = {module: one.relative for module, one in distances.items() if one.relative is not None}
    zero = {"base_is_zero": len(l2) - len(relative)} if len(relative) < len(l2) else {}
    note = None if whole.relative is not None else "every weight of the base is zero"
    names = "weight_distance", "weight_distance_relative"
    return {
        names[0]: Result(whole.l2, len(l2), None, f"{names[0]}@1(l2,{said})", False, l2),
        names[1]: Result(whole.relative, len(relative), None, f"{names[1]}@1(l2,{said})", False, relative, zero, note),
    }


def _joined(parts: list[tuple[float, float, int]]) -> Distance:
    moved, norm, elements = zip(*parts, strict=True) if parts else ((), (), ())
    return Distance(math.sqrt(math.fsum(moved)), math.sqrt(math.fsum(norm)), sum(elements))


def _squares(name: str, ours: Tensor, base: Tensor) -> tuple[float, float, int]:
    """||w - w0||^2, ||w0||^2 and the number of elements, in float64."""
    if ours.shape != base.shape:
        raise DriftError(f"{name}: is {list(ours.shape)} and the base's is {list(base.shape)}; {UNLIKE}")
    if not (ours.is_floating_point() and base.is_floating_point()):
        raise DriftError(f"{name}: is {ours.dtype}, the base's {base.dtype}: {_FEW_BITS}")
    moved, norm = [], []
    for part, part0 in zip(ours.detach().flatten().split(AT_ONCE), base.detach().flatten().split(AT_ONCE), strict=True):
        w, w0 = part.double(), part0.to(part.device).double()
        moved.append((w - w0).square().sum().item())
        norm.append(w0.square().sum().item())
    return math.fsum(moved), math.fsum(norm), base.numel()


_FEW_BITS = "weights in few bits have no distance to others; give them unquantized (load with quantization='none')"


def _refuse_other_names(ours: Tensors, theirs: Tensors) -> None:
    unlike = sorted(ours.keys() ^ theirs.keys())
    if unlike:
        named = ", ".join(f"{name} (only in the {'model' if name in ours else 'base'})" for name in unlike[:3])
        more = f" and {len(unlike) - 3} more" if len(unlike) > 3 else ""
        raise DriftError(f"the two have other tensors: {named}{more}; {UNLIKE}")


def _tensors(what: Any, adapters: bool, trust_remote_code: bool) -> Tensors:
    if not isinstance(what, str | Path | Lineage):
        return dict(_of_model(what, adapters))
    from eval_harness.loading import made_of, weights_folder

    lineage = what if isinstance(what, Lineage) else made_of(what)
    folder = weights_folder(lineage)
    skeleton = _skeleton(folder, trust_remote_code)
    files = _of_folder(folder, skeleton)
    return _with_adapters(files, lineage, skeleton) if lineage.adapters else files


# ---- files -------------------------------------------------------------------------------------------


def _skeleton(folder: Path, trust_remote_code: bool) -> Any:
    """The modules of a checkpoint without their weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise LoadError(f"{folder}: config.json cannot be read: {error}") from error
    if getattr(config, "quantization_config", None):
        raise DriftError(f"{folder}: {_FEW_BITS}")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _of_folder(folder: Path, skeleton: Any) -> Tensors:
    """Every tensor of a folder's safetensors, but for those that the model ties to another one of them."""
    from safetensors import SafetensorError, safe_open

    place: dict[str, Path] = {}
    for file in _safetensors(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                place |= dict.fromkeys(opened.keys(), file)
        except (OSError, SafetensorError) as error:
            raise LoadError(f"{file}: cannot be read ({type(error).__name__}: {error})") from error
    if not place:
        raise DriftError(f"{folder}: has no *.safetensors; save the model again with save_pretrained")

    def reading(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with safe_open(place[name], framework="pt") as opened:
                return opened.get_tensor(name)

        return read

    tied = getattr(skeleton, "all_tied_weights_keys", None) or {}
    return {name: reading(name) for name in place if tied.get(name) not in place}


def _safetensors(folder: Path) -> list[Path]:
    """The files that transformers loads; beside them some folders hold the same weights under the names of others."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.is_file():
        return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    try:
        return [
            folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{index}: cannot be read ({type(error).__name__}: {error}); restore the folder") from error


def _with_adapters(files: Tensors, lineage: Lineage, skeleton: Any) -> Tensors:
    """The base's tensors, those beneath adapters merged with them as they are read."""
    from eval_harness.adapters import attach
    from eval_harness.lineage import refuse_other_weights

    refuse_other_weights(lineage)
    model, names = _of_zeros(skeleton), [part.name for part in lineage.adapters]
    for part in lineage.adapters:
        assert part.folder is not None
        model = attach(model, part.folder, part.name)
    out = dict(files)
    for path, layer in _layers(model.get_base_model()):
        own = {f"{path}.{name}": name for name, _ in layer.get_base_layer().named_parameters()}
        lacking = [name for name in own if name not in files]
        if lacking:
            raise DriftError(f"{lineage.place}: has no {lacking[0]}, which an adapter changes; give the loaded model")

        def reading(name: str, layer: Any = layer, own: dict[str, str] = own) -> Callable[[], Tensor]:
            return lambda: _merged(layer, names, {short: files[long]() for long, short in own.items()})[own[name]]

        out |= {name: reading(name) for name in own}
    return out


def _of_zeros(skeleton: Any) -> Any:
    """The modules on zeros that take no memory: what PEFT puts beside them is real, beside meta tensors it is not."""
    import torch

    for module in skeleton.modules():
        for name, parameter in module.named_parameters(recurse=False):
            zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(zeros, requires_grad=False))
    return skeleton


# ---- models in memory --------------------------------------------------------------------------------


def _of_model(model: Any, adapters: bool) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Every parameter once by its name in the plain model, with or without what its active adapters add."""
    if getattr(model, "hf_quantizer", None) is not None:
        raise DriftError(f"{type(model).__name__}: {_FEW_BITS}")
    root = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = dict(_layers(root))
    seen: set[int] = set()
    for path, layer in layers.items():
        for name, parameter in layer.get_base_layer().named_parameters():
            seen.add(id(parameter))
            yield f"{path}.{name}", _reading(layer, name, adapters)
    for name, parameter in root.named_parameters():
        inside = any(name.startswith(f"{path}.") for path in layers)
        if not inside and id(parameter) not in seen:
            yield name, partial(getattr, parameter, "data")


def _reading(layer: Any, name: str, adapters: bool) -> Callable[[], Tensor]:
    return lambda: _merged(layer, list(layer.active_adapters) if adapters else [])[name]


def _layers(root: Any) -> Iterator[tuple[str, Any]]:
    """The outermost modules that carry adapters, by their place in the plain model."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    outer = ""
    for path, module in root.named_modules():
        if outer and path.startswith(f"{outer}."):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            kind = type(module).__name__
            raise DriftError(f"{path}: {kind} of PEFT adds no delta to a weight; merge it and give the merged model")
        if isinstance(module, BaseTunerLayer):
            outer = path
            yield path, module


def _merged(layer: Any, names: list[str], weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The parameters beneath a copy of a layer in float64 after merging the adapters named, in order.

    weights: what they are, where the layer itself stands on none.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch.nn import Parameter

    layer = copy.deepcopy(layer)
    for name, tensor in (weights or {}).items():
        setattr(layer.get_base_layer(), name, Parameter(tensor, requires_grad=False))
    layer = layer.double()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already following adapters were merged")
        for one in layer.modules():  # a wrapper of one parameter may hold that of another
            if isinstance(one, BaseTunerLayer):
                if one.merged:
                    one.unmerge()
                for name in names:
                    one.merge(safe_merge=True, adapter_names=[name])
    return dict(layer.get_base_layer().named_parameters())
