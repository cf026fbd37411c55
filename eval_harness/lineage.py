"""What a model is made of: plain weights, then adapters in order, each merged into them or active on top.

A folder of save_pretrained is plain weights. A folder with an adapter_config.json is one PEFT adapter on the weights
that file names. A stage that trained an adapter writes a folder of its own kind, read here:

    model/
      lineage.json
      adapters/01_reverse/  adapter_config.json  adapter_model.safetensors
      adapters/02_sums/     ...
      tokenizer files

The weights are not copied: lineage.json says where they are, and holds the sha256 of each of their files.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

FILE = "lineage.json"
FORMAT = 1
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LORA = "LORA"  # the peft_type that is read here; of others see `eval_harness.loading.LOADERS`


class LoadError(ValueError):
    """A checkpoint that cannot be loaded; names the place and what is missing there."""


@dataclass(frozen=True)
class Part:
    """One adapter of a lineage.

    name: that of the stage folder that trained it last, its name in memory too. folder: where its two files are
    (None: it is being trained). trained_in: every stage folder that trained it, in order.
    """

    name: str
    folder: Path | None
    merged: bool = False
    trained_in: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lineage:
    """Plain weights and the adapters on them, oldest first; merged ones come before active ones.

    weights: what lineage.json calls them. stage: the stage folder they belong to, None for a base. place: the folder
    they are in now, or their name on the Hub. sha256: of each of their files, empty where nobody recorded it.
    quantization: 4bit, 8bit or None: how the weights were held while the newest adapter was trained.
    """

    weights: str
    place: Path | str
    stage: str | None = None
    sha256: tuple[tuple[str, str], ...] = ()
    adapters: tuple[Part, ...] = ()
    quantization: str | None = None

    def describe(self) -> str:
        """One line: `base + 01_reverse (merged) + 02_sums→03_more`, the arrow for an adapter that was continued."""
        words = ["→".join(part.trained_in or (part.name,)) + " (merged)" * part.merged for part in self.adapters]
        held = f" ({self.quantization})" if self.quantization else ""
        return " + ".join([(self.stage or "base") + held, *words])

    def all_merged(self) -> Lineage:
        """The same model with every adapter in its weights."""
        return replace(self, adapters=tuple(replace(part, merged=True) for part in self.adapters))

    def to_json(self) -> dict[str, Any]:
        """What lineage.json holds."""
        adapters = [{"name": p.name, "merged": p.merged, "trained_in": list(p.trained_in)} for p in self.adapters]
        return {
            "format": FORMAT,
            "description": self.describe(),
            "weights": {"path": self.weights, "stage": self.stage, "sha256": dict(self.sha256)},
            "adapters": adapters,
            "quantization": self.quantization,
        }


def read_lineage(folder: Path, base: Path | str | None = None) -> Lineage:
    """The lineage in a folder that has a lineage.json; base: where the weights are, when not where it says.

    Raises:
        LoadError: the file is damaged or of another format, or an adapter is missing.
    """
    file = folder / FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise LoadError(f"{file}: format {content['format']!r} is not known here (only {FORMAT}); update cpt")
        weights, stage = content["weights"]["path"], content["weights"]["stage"]
        hashes = tuple(sorted(content["weights"]["sha256"].items()))
        adapters = tuple(_part(folder, entry) for entry in content["adapters"])
        quantization = content["quantization"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, LoadError):
            raise
        raise LoadError(f"{file}: is damaged ({type(error).__name__}: {error}); restore the folder") from error
    place = base or (_stage_weights(folder / weights, hashes) if stage else weights)
    return Lineage(weights, place, stage, hashes, adapters, quantization)


def _stage_weights(named: Path, hashes: tuple[tuple[str, str], ...]) -> Path:
    """The folder named, or one that was renamed out of its way (STAGE.superseded-K) and holds the very weights."""
    named = named.resolve()
    renamed = named.parent.parent.glob(f"{named.parent.name}.superseded-*/{named.name}")
    there = [folder for folder in (named, *sorted(renamed)) if folder.is_dir()]
    return next((folder for folder in there if weights_hashes(folder) == hashes), named)


def _part(folder: Path, entry: dict[str, Any]) -> Part:
    here = folder / "adapters" / Path(entry["name"]).name
    lacking = [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (here / name).is_file()]
    if lacking:
        raise LoadError(f"{here}: has no {' and no '.join(lacking)}; restore the folder")
    return Part(entry["name"], here, bool(entry["merged"]), tuple(entry["trained_in"]))


def read_adapter(folder: Path, base: Path | str | None = None) -> Lineage:
    """The lineage of an adapter's folder: it is on the base it names, or on another copy of that base.

    Raises:
        LoadError: no adapter weights as safetensors, no base.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise LoadError(f"{folder}: has no {ADAPTER_WEIGHTS} (adapters saved as .bin are not read: save them again)")
    weights = base or _adapter_json(folder).get("base_model_name_or_path")
    if not weights:
        raise LoadError(f"{folder / ADAPTER_CONFIG}: names no base_model_name_or_path; say which base it is for")
    return Lineage(str(weights), weights, adapters=(Part("default", folder),))


def adapter_kind(folder: Path) -> str | None:
    """The peft_type that adapter_config.json names. Raises LoadError when it cannot be read."""
    return _adapter_json(folder).get("peft_type")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json as a mapping. Raises LoadError when it is not one, or not of a LoRA."""
    content = _adapter_json(folder)
    if content.get("peft_type") != LORA:
        kind = content.get("peft_type")
        raise LoadError(f"{folder / ADAPTER_CONFIG}: peft_type is {kind!r}; only LORA is read here")
    return content


def _adapter_json(folder: Path) -> dict[str, Any]:
    file = folder / ADAPTER_CONFIG
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{file}: cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise LoadError(f"{file}: holds a {type(content).__name__} and must hold an object; restore the folder")
    return content


def weights_hashes(folder: Path) -> tuple[tuple[str, str], ...]:
    """(name, sha256) of every weights file of a plain checkpoint, by name; hashed once per process and file."""
    files = sorted(file for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind))
    return tuple((file.name, _hash(file.resolve(), file.stat().st_size, file.stat().st_mtime_ns)) for file in files)


@cache
def _hash(file: Path, size: int, changed: int) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def refuse_other_weights(lineage: Lineage) -> None:
    """Raise LoadError unless the weights at `place` are those that the adapters were trained on."""
    if not lineage.sha256:
        return
    folder = Path(lineage.place)
    here, wanted = dict(weights_hashes(folder)), dict(lineage.sha256)
    if here == wanted:
        return
    differing = sorted(name for name in here.keys() | wanted.keys() if here.get(name) != wanted.get(name))
    raise LoadError(
        f"{folder}: is not the model that {lineage.adapters[-1].name} was trained on ({lineage.weights}): "
        f"sha256 differs for {', '.join(differing[:4])}{', ...' if len(differing) > 4 else ''}; "
        "give the folder of that model"
    )
