"""A checkpoint before its weights are loaded: its files here, what it is made of, its fingerprint, its tokenizer.

A name on the Hub is fetched once and measured as the folder that came: a branch that moves meanwhile changes nothing.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval_harness.cache import digest
from eval_harness.lineage import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Lineage, LoadError, weights_hashes
from eval_harness.loading import TOKENIZER, load_tokenizer, made_of, weights_folder

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
SMALL = ("*.json", "*.model", "*.txt", "*.jinja")
HASHED = ("config.json", "generation_config.json", "quantization_config.json")  # they decide outputs beside weights


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder of weights or adapters.

    folder     where its files are
    lineage    what it is made of
    base       where the weights beneath an adapter are, where not where it says
    revision   of a name on the Hub: the commit that was fetched
    """

    folder: Path
    lineage: Lineage
    base: str | None = None
    revision: str | None = None

    @classmethod
    def of(cls, path_or_id: str, *, base: str | None = None, revision: str | None = None) -> Checkpoint:
        """Find it, on the Hub where there is no such folder.

        Raises:
            LoadError: there is none, or it is damaged.
        """
        folder, commit = Path(path_or_id), None
        if not folder.exists():
            if not HUB_NAME.fullmatch(path_or_id) or path_or_id.startswith("."):
                raise LoadError(f"{path_or_id}: no such folder")
            folder = _fetched(path_or_id, revision)
            commit = folder.name
        elif revision is not None:
            raise LoadError(f"{path_or_id}: is here already, so a revision ({revision}) means nothing")
        lineage = made_of(folder, base=base)
        weights_folder(lineage)
        return cls(folder, lineage, base, commit)

    def fingerprint(self) -> str:
        """SHA-256 over the weights, adapters and configs that decide what it computes; reads every byte of them."""
        weights = weights_folder(self.lineage)
        configs = {name: _sha256(weights / name) for name in HASHED if (weights / name).is_file()}
        adapters = [
            [part.merged, *(_sha256(part.folder / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))]
            for part in self.lineage.adapters
            if part.folder is not None
        ]
        return digest(weights_hashes(weights), configs, adapters, self.lineage.quantization)

    def tokenizer(self) -> Any:
        """Its own; of an adapter without one that of the weights beneath it.

        Raises:
            LoadError: there is none, or it cannot be read.
        """
        is_here = any((self.folder / name).is_file() for name in TOKENIZER)
        return load_tokenizer(self.folder if is_here or not self.lineage.adapters else self.lineage.place)


def _fetched(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*SMALL, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*SMALL, "*.bin"]))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        said = str(error).strip().splitlines() or ["no message"]
        at = f" at {revision}" if revision else ""
        raise LoadError(
            f"{name}: no such folder, and not to be had from the Hub{at}: {type(error).__name__}: {said[0]}. Without "
            "network only what is in the Hub's cache on this machine can be read"
        ) from error
    return folder


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
