"""Load a checkpoint to look at it: model in eval mode and tokenizer, or one clear error."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


class LoadError(ValueError):
    """A checkpoint that cannot be loaded; names the place and what is missing there."""


class TokenizerError(ValueError):
    """A tokenizer that cannot be used for training or batched scoring; names the token and the next step."""


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
) -> Loaded:
    """Load a causal language model and its tokenizer.

    Args:
        path_or_id: a folder written by save_pretrained, or a model's name on the hub.
        dtype: "auto" is the dtype the checkpoint was saved in.
        device: None is "cuda" where there is one, else "cpu".
        trust_remote_code: off; runs code of the checkpoint where a user switches it on.

    Raises:
        LoadError: not a checkpoint, no weights, no tokenizer, unreadable or incomplete weights.
    """
    about = {"revision": revision, "trust_remote_code": trust_remote_code}
    return Loaded(load_model(path_or_id, dtype=dtype, device=device, **about), load_tokenizer(path_or_id, **about))


def load_model(path_or_id: str | Path, *, device: Any = None, **about: Any) -> Any:
    """The model alone, in eval mode on its device; `about` goes to from_pretrained (dtype, revision, ...).

    Raises:
        LoadError: not a checkpoint, no weights, unreadable or incomplete weights.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    _check_folder(path_or_id)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path_or_id, output_loading_info=True, **about)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise LoadError(f"{path_or_id}: the model cannot be loaded: {_first_line(error)}") from error
    model, info = loaded
    _check_complete(path_or_id, info)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def load_tokenizer(path_or_id: str | Path, **about: Any) -> Any:
    """The tokenizer alone; `about` goes to from_pretrained.

    Raises:
        LoadError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    folder = Path(path_or_id)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER):
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
        # A name with at most one slash may be a hub name; anything else was meant as a path.
        if isinstance(path_or_id, Path) or str(path_or_id).count("/") > 1 or str(path_or_id).startswith((".", "~")):
            raise LoadError(f"{path_or_id}: no such folder")
        return
    if not folder.is_dir():
        raise LoadError(f"{path_or_id}: is a file; a checkpoint is the folder that holds config.json")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        names = sorted(entry.name for entry in folder.iterdir())[:8]
        raise LoadError(f"{path_or_id}: not a checkpoint: no config.json (found {', '.join(names) or 'nothing'})")
    if not any(True for pattern in WEIGHTS for _ in folder.glob(pattern)):
        raise LoadError(f"{path_or_id}: no weights (none of {', '.join(WEIGHTS)}); was it saved to the end?")


def _check_complete(path_or_id: str | Path, info: dict[str, Any]) -> None:
    # transformers fills what a checkpoint lacks with random numbers and only warns.
    lacking = sorted(map(str, [*info.get("missing_keys", ()), *info.get("mismatched_keys", ())]))
    if lacking:
        shown = ", ".join(lacking[:4]) + (", ..." if len(lacking) > 4 else "")
        raise LoadError(
            f"{path_or_id}: {len(lacking)} tensors are missing or of another shape than config.json: {shown}"
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"
