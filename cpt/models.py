"""Models and the tokenizer: found, identified, repaired where the user says so, opened for a stage, saved after it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpt.adapters.spec import Adapter, stands_alone
from cpt.checkpoints import file_hash
from cpt.config import ModelSpec, Stream, TokenizerSpec
from cpt.errors import ConfigError, DataError
from cpt.resources import BUNDLED_MODELS, model_path
from cpt.suggest import did_you_mean
from eval_harness.lineage import (
    FILE,
    Lineage,
    read_adapter_config,
    read_lineage,
    refuse_other_weights,
    weights_hashes,
)
from eval_harness.loading import (
    As,
    LoadError,
    TokenizerError,
    check_tokenizer,
    load_lineage,
    load_tokenizer,
    made_of,
)


def base_folder(spec: ModelSpec) -> Path:
    """The base model's local folder; a hub name is downloaded (or found in the local cache) first.

    Raises ConfigError when it is neither a folder, nor bundled, nor reachable.
    """
    path = Path(model_path(spec.path)).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or spec.path.startswith((".", "~")) or spec.path.count("/") > 1:
        raise ConfigError(f"model.path = {spec.path!r}: no such folder. Give a folder, a hub name or tiny-world.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    keep = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(spec.path, revision=spec.revision, allow_patterns=keep))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise ConfigError(
            f"model.path = {spec.path!r}: neither a local folder nor bundled (tiny-world), and the Hub gave "
            f"no model of that name ({type(error).__name__}).{did_you_mean(spec.path, BUNDLED_MODELS)} "
            "Offline, give a folder: model=PATH."
        ) from error


def base_identity(stream: Stream) -> dict[str, Any]:
    """What the base is: hashes of a folder's files (or the commit of a hub snapshot), dtype, tokenizer."""
    folder = base_folder(stream.model)
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):  # the Hub's cache
        files: Any = {"repository": stream.model.path, "commit": folder.name}
    else:
        files = _hashes(folder)
    tokenizer: dict[str, Any] = stream.tokenizer.model_dump()
    if stream.tokenizer.path and Path(stream.tokenizer.path).is_dir():
        tokenizer["path"] = _hashes(Path(stream.tokenizer.path))
    if stream.tokenizer.chat_template:
        tokenizer["chat_template"] = _template(stream.tokenizer)
    attention = stream.model.attn_implementation
    start: dict[str, Any] = {}  # what is not there does not stand in the identity
    if stream.model.adapter:
        parts = [part.folder for part in _start(stream.model).adapters if part.folder]
        start["adapter"] = [_hashes(part) for part in parts]
    if stream.model.quantization:
        start["quantization"] = stream.model.quantization
    return {"files": files, "dtype": stream.model.dtype, "attention": attention, "tokenizer": tokenizer} | start


def _hashes(folder: Path) -> dict[str, str]:
    kinds = (".json", ".safetensors", ".bin", ".model", ".jinja", ".txt")
    return {file.name: file_hash(file) for file in sorted(folder.iterdir()) if file.suffix in kinds}


def base_tokenizer(stream: Stream) -> Any:
    """The stream's tokenizer, repaired as `tokenizer:` says. Raises DataError when it cannot be used."""
    spec, folder = stream.tokenizer, base_folder(stream.model)
    try:
        tokenizer = load_tokenizer(spec.path or str(folder), trust_remote_code=stream.model.trust_remote_code)
    except LoadError as error:
        raise DataError(f"tokenizer: {error}") from error
    if spec.pad_token is not None:
        if spec.pad_token not in tokenizer.get_vocab():
            raise DataError(
                f"tokenizer.pad_token = {spec.pad_token!r}: is not in the vocabulary; the end token is "
                f"{tokenizer.eos_token!r}"
            )
        tokenizer.pad_token = spec.pad_token
    if spec.chat_template is not None:
        tokenizer.chat_template = _template(spec)
    try:
        check_tokenizer(tokenizer)
    except TokenizerError as error:
        raise DataError(f"tokenizer of {stream.model.path}: {error}") from error
    return tokenizer


def _template(spec: TokenizerSpec) -> str:
    file = Path(spec.chat_template or "")
    if not file.is_file():
        raise ConfigError(f"tokenizer.chat_template = {spec.chat_template!r}: no such file")
    return file.read_text(encoding="utf-8")


def open_model(folder: Path | None, spec: ModelSpec) -> Any:
    """The model in a folder (None: the stream's start) in the stream's dtype, in eval mode, every adapter active.

    Raises DataError when something of it is missing, damaged or not what its adapters were trained on.
    """
    return _open(_made_of(folder, spec), spec)


def open_for_training(parent: Path, spec: ModelSpec, adapter: Adapter | None, name: str, seed: int) -> Any:
    """The parent's model as a stage trains it: full weights, or a PeftModel whose adapter `default` learns.

    adapter: None merges what adapters there are and trains full weights. name: the stage's folder, 02_sums.
    seed: decides a new adapter's first values; the global random state stays as it was. The model's `lineage` says
    what `save_model` will write. Raises as `open_model`, ConfigError for adapters that cannot be stacked.
    """
    made = _made_of(parent, spec)
    if adapter is None:
        model = _open(made.all_merged(), spec)
        return model.requires_grad_(True) if made.adapters else model  # PEFT froze what it merged into
    from cpt.adapters.lora import grown, put_on

    made = made if made.sha256 else replace(made, sha256=weights_hashes(Path(made.place)))
    result = grown(made, adapter, name)
    _refuse_stack(result, adapter)
    *earlier, newest = result.adapters
    names = [part.name for part in earlier if not part.merged]
    with _readable():
        refuse_other_weights(made)
        model = put_on(_open(replace(result, adapters=tuple(earlier)), spec), names, newest, adapter, seed)
    model.lineage = result
    return model


def _refuse_stack(lineage: Lineage, adapter: Adapter) -> None:
    """An adapter from elsewhere shows only here that it cannot be active beside another one."""
    active = [part for part in lineage.adapters if not part.merged]
    shapes = {part.name: read_adapter_config(part.folder) if part.folder else adapter.lora for part in active}
    alone = [f"{name} ({field})" for name, shape in shapes.items() if (field := stands_alone(shape))]
    if alone and len(active) > 1:
        raise ConfigError(f"adapter = {adapter.mode}: {alone[0]} cannot be active beside another: use merge_then_new")


def check_adapter(spec: ModelSpec, adapter: Adapter | None) -> None:
    """Try the adapter a stream starts from, and a stage's own, on the base without its weights; takes no memory.

    Raises ConfigError: no such modules, LoRA on the head or on an embedding tied to it, tensors that the base has
    no place for, an adapter that was trained on another base.
    """
    from cpt.adapters.lora import try_on_skeleton

    try_on_skeleton(_skeleton(spec), _start(spec).adapters, adapter)


def tensor_names(spec: ModelSpec) -> list[str]:
    """Names of the base's parameters; takes no memory."""
    return [name for name, _ in _skeleton(spec).named_parameters(remove_duplicate=False)]


def _skeleton(spec: ModelSpec) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = {"trust_remote_code": spec.trust_remote_code}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(_start(spec).place, **trust), **trust)


def adapter_note(spec: ModelSpec) -> str | None:
    """One line when model.adapter names another base than model.path: often only another path of the same model."""
    newest = next(iter(reversed(_start(spec).adapters)), None)
    if newest is None or newest.folder is None:
        return None
    named = read_adapter_config(newest.folder).get("base_model_name_or_path")
    return f"note: model.adapter was made on {named}, the stream's base is {spec.path}" if named != spec.path else None


def lineage(folder: Path, spec: ModelSpec | None = None) -> str:
    """What the model in a folder is made of: `base + 01_reverse (merged) + 02_sums`; plain weights go by their stage.

    spec: needed to know of an adapter that the stream starts from.
    """
    with _readable():
        if (folder / FILE).is_file():
            return read_lineage(folder).describe()
    if _is_stage(folder):
        return folder.parent.name
    return _start(spec).describe() if spec else "base"


def needs_weights_of(folder: Path) -> Path | None:
    """The model folder of the earlier stage whose weights the adapters in this folder stand on; None: no stage's."""
    if not (folder / FILE).is_file():
        return None
    with _readable():
        stage = read_lineage(folder).stage
    return folder.parent.parent / stage / folder.name if stage else None


def stands_on_base(parent: Path, spec: ModelSpec, adapter: Adapter | None) -> bool:
    """Whether a stage's model, its adapters switched off, is the stream's start: then it is its own reference."""
    if adapter is None or spec.adapter is not None:
        return False
    made = _made_of(parent, spec)
    merges = adapter.mode == "merge_then_new" and bool(made.adapters)
    return made.stage is None and not merges and not any(part.merged for part in made.adapters)


def is_start_beneath(folder: Path, spec: ModelSpec) -> bool:
    """Whether the model in a folder, its adapters switched off, is the stream's start: then it is its own base."""
    made = _made_of(folder, spec)
    plain = made.stage is None and not any(part.merged for part in made.adapters)
    return bool(made.adapters) and spec.adapter is None and plain


def lineage_of(folder: Path | None, spec: ModelSpec) -> Lineage:
    """What the model in a folder, or the stream's start, is made of. Raises DataError, ConfigError."""
    return _made_of(folder, spec)


def starts_as_parent(parent: Path, spec: ModelSpec, adapter: Adapter | None) -> bool:
    """Whether a stage's model, its adapters switched off, is the parent's: then it is its own reference."""
    if adapter is None or adapter.mode == "continue":
        return False
    return adapter.mode == "merge_then_new" or all(part.merged for part in _made_of(parent, spec).adapters)


def context_length(spec: ModelSpec) -> int | None:
    """Tokens that the base was made for; None where its configuration does not say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base_folder(spec), trust_remote_code=spec.trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def block_count(spec: ModelSpec) -> int | None:
    """Decoder layers of the base; None where its configuration does not say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base_folder(spec), trust_remote_code=spec.trust_remote_code)
    return getattr(config.get_text_config(), "num_hidden_layers", None)


def open_merged(folder: Path, spec: ModelSpec) -> Any:
    """The model of a stage as plain weights in the base's own dtype, its adapters merged. Raises as `open_model`."""
    return _open(_made_of(folder, spec).all_merged(), spec, "none")


def save_model(model: Any, tokenizer: Any, folder: Path, state_dict: dict[str, Any] | None = None) -> None:
    """Write a trained model: plain weights for AutoModelForCausalLM, or the adapters of a model that has a `lineage`.

    state_dict: the model's tensors where they had to be gathered (ZeRO-3); default: its own.
    """
    made = getattr(model, "lineage", None)
    if made is None:
        model.save_pretrained(folder, state_dict=state_dict)
    else:
        from cpt.adapters.lora import save_adapters

        save_adapters(model, made, folder, state_dict)
    tokenizer.save_pretrained(folder)
    for file in folder.rglob("*.*"):
        file.chmod(0o644)  # safetensors writes 0600: others could read everything but the weights


def _made_of(folder: Path | None, spec: ModelSpec) -> Lineage:
    """What the model in a stage's folder, or the stream's start, is made of."""
    if folder is None:
        return _start(spec)
    with _readable():
        if (folder / FILE).is_file():
            return read_lineage(folder, None if needs_weights_of(folder) else base_folder(spec))
    if _is_stage(folder):
        return Lineage(f"../../{folder.parent.name}/{folder.name}", folder, stage=folder.parent.name)
    return _start(spec) if folder.resolve() == base_folder(spec).resolve() else Lineage(str(folder), folder)


def _is_stage(folder: Path) -> bool:
    return (folder.parent / "stage.json").is_file()


def _start(spec: ModelSpec) -> Lineage:
    """The base, and the adapter that the stream starts from. Raises ConfigError when they are not of one model."""
    folder = base_folder(spec)
    start = Lineage(spec.path, folder, quantization=spec.quantization)
    if spec.adapter is None:
        return start
    given = Path(spec.adapter).expanduser()
    if not given.is_dir() and (
        given.is_absolute() or spec.adapter.startswith((".", "~")) or spec.adapter.count("/") > 1
    ):
        raise ConfigError(f"model.adapter = {spec.adapter!r}: no such folder. Give a PEFT folder or a stage's model.")
    try:
        found = made_of(given if given.is_dir() else spec.adapter, base=folder)
        refuse_other_weights(found)
        for part in found.adapters:  # stages train LoRAs: an adapter of another kind is refused here
            assert part.folder is not None
            read_adapter_config(part.folder)
    except LoadError as error:
        raise ConfigError(f"model.adapter = {spec.adapter!r}: {error}") from error
    names = [f"00_{'adapter' if part.name == 'default' else part.name}" for part in found.adapters]
    parts = [replace(part, name=name) for part, name in zip(found.adapters, names, strict=True)]
    return replace(start, sha256=found.sha256, adapters=tuple(parts))


def _open(made: Lineage, spec: ModelSpec, quantization: As = "trained") -> Any:
    about: dict[str, Any] = {"dtype": spec.dtype, "trust_remote_code": spec.trust_remote_code}
    if spec.attn_implementation:
        about["attn_implementation"] = spec.attn_implementation
    with _readable():
        return load_lineage(made, quantization=quantization, **about)


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except LoadError as error:
        raise DataError(f"model {error}. Restore the folder or download it again, then run again.") from error
