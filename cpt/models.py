"""The base model and its tokenizer: found, identified, repaired where the user says so, loaded."""

from pathlib import Path
from typing import Any

from cpt.checkpoints import file_hash
from cpt.config import ModelSpec, Stream, TokenizerSpec
from cpt.errors import ConfigError, DataError
from cpt.resources import BUNDLED_MODELS, model_path
from cpt.suggest import did_you_mean
from eval_harness.loading import LoadError, TokenizerError, check_tokenizer, load_model, load_tokenizer


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
    return {"files": files, "dtype": stream.model.dtype, "attention": attention, "tokenizer": tokenizer}


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


def open_model(folder: Path, spec: ModelSpec) -> Any:
    """The model in a folder, in the stream's dtype, ready to be trained or measured."""
    about: dict[str, Any] = {"dtype": spec.dtype, "trust_remote_code": spec.trust_remote_code}
    if spec.attn_implementation:
        about["attn_implementation"] = spec.attn_implementation
    try:
        return load_model(str(folder), **about)
    except LoadError as error:
        raise DataError(f"model {error}. Restore the folder or download it again, then run again.") from error


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a checkpoint that AutoModelForCausalLM and AutoTokenizer load where cpt is not installed."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes 0600: others could read everything but the weights
