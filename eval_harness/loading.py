"""Load a checkpoint to look at it: model in eval mode and tokenizer, or one clear error.

A checkpoint is a folder of save_pretrained, a PEFT adapter with the base it names, a stage's folder of weights and
adapters (see `eval_harness.lineage`), or any of the first two on the Hub. Adapters of other kinds than LoRA are
loaded by the function that an installed package registers for their kind: docs/write_a_loader.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal, Protocol

from eval_harness.lineage import (
    ADAPTER_CONFIG,
    FILE,
    LORA,
    Lineage,
    LoadError,
    Part,
    adapter_kind,
    read_adapter,
    read_lineage,
    refuse_other_weights,
)
from eval_harness.quantization import INSTALL, is_installed

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
LOADERS = "eval_harness.loaders"  # entry-point group: peft_type of adapter_config.json -> Loader

As = Literal["trained", "none", "4bit", "8bit"]  # how weights are held; trained: as the newest adapter knew them


class TokenizerError(ValueError):
    """A tokenizer that cannot be used for training or batched scoring; names the token and the next step."""


class Loader(Protocol):
    """What a package registers for adapters of a kind of its own."""

    def __call__(self, model: Any, folder: Path, *, name: str, merged: bool) -> Any:
        """Put the adapter in `folder` on `model`, with what was put on it before; returns the model.

        model: the causal language model so far, on its device. folder: with adapter_config.json and
        adapter_model.safetensors. name: the adapter's in memory. merged: put it into the weights instead, in memory,
        exact to their rounding. Raises LoadError for what it cannot load or merge.
        """


@dataclass(slots=True)
class Loaded:
    """A model in eval mode on its device, and its tokenizer."""

    model: Any
    tokenizer: Any


def load(
    path_or_id: str | Path,
    *,
    dtype: Any = "auto",
    device: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    base: str | Path | None = None,
    quantization: As = "trained",
) -> Loaded:
    """Load a causal language model and its tokenizer.

    Args:
        path_or_id: a folder written by save_pretrained, an adapter's folder, or either one's name on the hub.
        dtype: "auto" is the dtype the checkpoint was saved in.
        device: None is "cuda" where there is one, else "cpu".
        trust_remote_code: off; runs code of the checkpoint where a user switches it on.
        base: folder or hub name of the weights beneath an adapter, when they are not where it says.
        quantization: hold the weights in 4 or 8 bits, in neither (none), or as the adapter was trained.

    Raises:
        LoadError: not a checkpoint, no weights, no tokenizer, unreadable or incomplete weights, weights that are not
            those of the adapter, no bitsandbytes.
    """
    lineage = made_of(path_or_id, base=base, revision=revision)
    about = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if not lineage.adapters:
        about["revision"] = revision
    model = load_lineage(lineage, quantization=quantization, device=device, **about)
    folder = lineage.adapters[-1].folder if lineage.adapters else None
    own = folder is None or (Path(path_or_id) / FILE).is_file() or _has_tokenizer(folder)
    place = path_or_id if own else lineage.place
    return Loaded(model, load_tokenizer(place, revision=revision if own else None, trust_remote_code=trust_remote_code))


def load_model(
    path_or_id: str | Path,
    *,
    device: Any = None,
    base: str | Path | None = None,
    quantization: As = "trained",
    **about: Any,
) -> Any:
    """The model alone, in eval mode on its device; `about` goes to from_pretrained of the weights (dtype, ...).

    Raises:
        LoadError: as `load`, but for the tokenizer.
    """
    lineage = made_of(path_or_id, base=base, revision=about.get("revision"))
    if lineage.adapters:
        about.pop("revision", None)  # the adapter's, not its base's
    return load_lineage(lineage, quantization=quantization, device=device, **about)


def made_of(path_or_id: str | Path, *, base: str | Path | None = None, revision: str | None = None) -> Lineage:
    """Which weights and adapters a folder or hub name stands for; reads no weights.

    Raises:
        LoadError: not a checkpoint; a base is given for plain weights; an adapter of a kind that nobody loads.
    """
    folder = _adapter_folder(path_or_id, revision)
    if folder is not None:
        lineage = (read_lineage if (folder / FILE).is_file() else read_adapter)(folder, base)
        for part in lineage.adapters:
            _registered(part)
        return lineage
    if base is not None:
        raise LoadError(f"{path_or_id}: is plain weights, not an adapter's folder, so a base means nothing here")
    return Lineage(str(path_or_id), path_or_id)


def load_lineage(lineage: Lineage, *, quantization: As = "trained", device: Any = None, **about: Any) -> Any:
    """The model of a lineage in eval mode: weights, then each adapter merged or active, in order.

    With active adapters it is a PeftModel whose adapters are frozen. Merging is exact to the weights' rounding and
    the same each time. `about` goes to from_pretrained of the weights.

    Raises:
        LoadError: as `load_model`; adapters to be merged into quantized weights; active ones of unlike kinds.
    """
    held = lineage.quantization if quantization == "trained" else quantization
    merged = [part for part in lineage.adapters if part.merged]
    active = [part for part in lineage.adapters if not part.merged]
    if merged and held in ("4bit", "8bit"):
        raise LoadError(f"{merged[0].name}: merging into {held} weights would round the sum: merge unquantized weights")
    others = [part for part in active if _registered(part)]
    if others and len(active) > 1:
        kind, beside = adapter_kind(_folder(others[0])), [part.name for part in active if part is not others[0]]
        raise LoadError(
            f"{others[0].folder}: {kind} cannot be active beside others ({', '.join(beside)}): merge all but one"
        )
    if lineage.adapters:
        lineage = replace(lineage, place=weights_folder(lineage))
        refuse_other_weights(lineage)
    model = _load_weights(lineage.place, held, device, about)
    for part in [*merged, *active]:  # one at a time: each was made on the sum of those before
        model = _put_on(model, part)
    if active and not others:
        from eval_harness.adapters import activate

        activate(model, [part.name for part in active])
    return model.eval()


def _put_on(model: Any, part: Part) -> Any:
    """The model with an adapter active on it, or merged into it."""
    from eval_harness.adapters import attach, merge

    registered, folder = _registered(part), _folder(part)
    if registered is not None:
        return _by(registered, model, part)
    model = attach(model, folder, part.name)
    return merge(model, str(folder)) if part.merged else model


def _folder(part: Part) -> Path:
    assert part.folder is not None, "only an adapter in training has no folder, and it is not loaded"
    return part.folder


def _registered(part: Part) -> EntryPoint | None:
    """The entry point that loads an adapter, None for a LoRA; raises LoadError where there is none, or several."""
    folder = _folder(part)
    kind = adapter_kind(folder)
    if kind == LORA:
        return None
    known = entry_points(group=LOADERS)
    found = {one.value: one for one in known if one.name == kind}
    if len(found) == 1:
        return next(iter(found.values()))
    place = f"{folder / ADAPTER_CONFIG}: peft_type is {kind!r}"
    if found:
        raise LoadError(f"{place}, for which {LOADERS} has several loaders ({', '.join(sorted(found))}): uninstall one")
    names = ", ".join(sorted({one.name for one in known})) or "none"
    raise LoadError(
        f"{place}; only LORA is read here, and kinds with a loader in the entry-point group {LOADERS} "
        f"(installed: {names}). Install the package that wrote the adapter, or see docs/write_a_loader.md"
    )


def _by(registered: EntryPoint, model: Any, part: Part) -> Any:
    """The model with an adapter put on by a registered loader, frozen."""
    from torch.nn import Module

    try:
        loader: Loader = registered.load()
    except (ImportError, AttributeError) as error:
        raise LoadError(f"{LOADERS}: {registered.name} = {registered.value}: cannot be imported: {error}") from error
    folder = _folder(part)
    made = loader(model, folder, name=part.name, merged=part.merged)
    if not isinstance(made, Module):
        raise LoadError(f"{folder}: {registered.value} returned {type(made).__name__}, and must return the model")
    return made.requires_grad_(False)


def _load_weights(place: str | Path, held: str | None, device: Any, about: dict[str, Any]) -> Any:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    _check_folder(place)
    _check_device(place, device)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    quantized = held in ("4bit", "8bit")
    extra = _quantized(place, held, device, about) if quantized else {}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True, **about, **extra)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise LoadError(f"{place}: the model cannot be loaded: {_first_line(error)}") from error
    model, info = loaded
    _check_complete(place, info)
    _check_numbers(place, model)
    if quantized:
        from eval_harness.quantization import keep_gradients_right

        return keep_gradients_right(model)
    return model.to(device)


def _quantized(place: str | Path, held: Any, device: Any, about: dict[str, Any]) -> dict[str, Any]:
    """Arguments of from_pretrained that hold the weights in few bits on one device."""
    import torch
    from transformers import AutoConfig

    from eval_harness.quantization import quantization_config

    if not is_installed():
        raise LoadError(f"{place}: {held} weights need bitsandbytes, which is not installed: {INSTALL}")
    dtype = about.get("dtype", "auto")
    if dtype == "auto":
        known = {key: about[key] for key in ("revision", "trust_remote_code") if key in about}
        dtype = AutoConfig.from_pretrained(place, **known).dtype or torch.float32
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return {"quantization_config": quantization_config(held, dtype), "device_map": {"": device}}


def _adapter_folder(path_or_id: str | Path, revision: str | None) -> Path | None:
    """The folder, downloaded first for a hub name, if it holds adapters; else None."""
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder if any((folder / name).is_file() for name in (FILE, ADAPTER_CONFIG)) else None
    if folder.exists() or _meant_as_path(path_or_id):
        return None
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:  # offline, or for plain weights, there is no such entry
        hf_hub_download(str(path_or_id), ADAPTER_CONFIG, revision=revision)
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return None
    return Path(snapshot_download(str(path_or_id), revision=revision, allow_patterns=["*.json", "*.safetensors"]))


def weights_folder(lineage: Lineage) -> Path:
    """Where the weights of a lineage are, downloaded first for a hub name; reads none.

    Raises:
        LoadError: they are not there, or the folder is no checkpoint.
    """
    folder = Path(lineage.place)
    if folder.is_dir() or not lineage.adapters:
        _check_folder(lineage.place)
    if folder.is_dir():
        return folder
    top = lineage.adapters[-1] if lineage.adapters else None
    named = top is not None and top.name != "default"  # PEFT's name for one that has none
    which = f"the weights beneath {top.name if named else top.folder}" if top else "the weights"
    step = "say where they are with base (--base on the command line)" if lineage.adapters else "give their folder"
    if _meant_as_path(lineage.place):
        raise LoadError(f"{lineage.place}: {which} are not there; {step}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(str(lineage.place), allow_patterns=["*.json", "*.safetensors", "*.bin"]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise LoadError(f"{lineage.place}: {which} are no folder and not on the Hub; {step}") from error


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER)


def load_tokenizer(path_or_id: str | Path, **about: Any) -> Any:
    """The tokenizer alone; `about` goes to from_pretrained.

    Raises:
        LoadError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    folder = Path(path_or_id)
    if folder.is_dir() and not _has_tokenizer(folder):
        raise LoadError(f"{path_or_id}: no tokenizer beside the weights; run tokenizer.save_pretrained on the folder")
    try:
        return AutoTokenizer.from_pretrained(path_or_id, **about)
    except (OSError, ValueError, KeyError) as error:
        raise LoadError(f"{path_or_id}: the tokenizer cannot be loaded: {_first_line(error)}") from error


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse a tokenizer whose padding would be missing, or would be learned and masked as the unknown token.

    Raises:
        TokenizerError: no pad token, or the pad token is the unknown token.
    """
    pad, unknown, eos = tokenizer.pad_token, tokenizer.unk_token, tokenizer.eos_token
    step = f"set tokenizer.pad_token, e.g. to the eos token {eos!r}" if eos else "set tokenizer.pad_token"
    if pad is None:
        raise TokenizerError(f"the tokenizer has no pad token: {step}")
    if pad == unknown:
        raise TokenizerError(
            f"the tokenizer's pad token {pad!r} is its unknown token, so every unknown piece of text would "
            f"be masked like padding: {step}"
        )


def _check_folder(path_or_id: str | Path) -> None:
    folder = Path(path_or_id)
    if not folder.exists():
        if _meant_as_path(path_or_id):
            raise LoadError(f"{path_or_id}: no such folder")
        return
    if not folder.is_dir():
        raise LoadError(f"{path_or_id}: is a file; a checkpoint is the folder that holds config.json")
    if not (folder / "config.json").is_file():
        names = sorted(entry.name for entry in folder.iterdir())[:8]
        raise LoadError(f"{path_or_id}: not a checkpoint: no config.json (found {', '.join(names) or 'nothing'})")
    if not any(True for pattern in WEIGHTS for _ in folder.glob(pattern)):
        raise LoadError(f"{path_or_id}: no weights (none of {', '.join(WEIGHTS)}); was it saved to the end?")


def _meant_as_path(path_or_id: str | Path) -> bool:
    """A name with at most one slash may be a hub name; anything else was meant as a path."""
    text = str(path_or_id)
    return isinstance(path_or_id, Path) or text.count("/") > 1 or text.startswith((".", "~"))


def _check_complete(path_or_id: str | Path, info: dict[str, Any]) -> None:
    # transformers fills what a checkpoint lacks with random numbers and only warns.
    lacking = sorted(map(str, [*info.get("missing_keys", ()), *info.get("mismatched_keys", ())]))
    if lacking:
        shown = ", ".join(lacking[:4]) + (", ..." if len(lacking) > 4 else "")
        raise LoadError(
            f"{path_or_id}: {len(lacking)} tensors are missing or of another shape than config.json: {shown}"
        )


def _check_numbers(place: str | Path, model: Any) -> None:
    """Short prompts can hide a NaN: a kernel's soft-max may swallow it, and wrong scores look like scores."""
    broken = [name for name, tensor in model.named_parameters() if tensor.is_floating_point() and tensor.isnan().any()]
    if broken:
        shown = ", ".join(broken[:4]) + (", ..." if len(broken) > 4 else "")
        raise LoadError(f"{place}: the weights hold NaN in {len(broken)} tensors: {shown}; the checkpoint is broken")


def _check_device(place: str | Path, device: Any) -> None:
    import torch

    try:
        wanted = torch.device(device or "cpu")
        there = wanted.type != "cuda" or torch.cuda.device_count() > (wanted.index or 0)
    except RuntimeError as error:
        raise LoadError(f"{place}: device {str(device)!r} is none that torch knows: cpu, cuda, cuda:1, ...") from error
    if not there:
        raise LoadError(f"{place}: device {str(device)!r} is not here: torch sees {torch.cuda.device_count()} GPUs")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"
