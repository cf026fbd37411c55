"""One checkpoint on the sets of a suite, one after the other; a folder holds what was measured, and is gone on from.

DIR/SET.json      a set's results, written as soon as they are there, with the id of all that decided them
DIR/results.json  everything, at the end
DIR/.cache        records item by item (`eval_harness.cache`): equal rows are scored once

A folder is of one model: its weights, their dtype, how they are held.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eval_harness import lm_eval_adapter
from eval_harness.cache import Cache, digest, tokenizer_digest, versions
from eval_harness.checkpoint import Checkpoint
from eval_harness.combine import combine
from eval_harness.items import EvalSet
from eval_harness.launched import Ranks, Stop
from eval_harness.lm_eval_adapter import LmEvalSet
from eval_harness.loading import As
from eval_harness.measure import MEASURES, default_measures, draw_shots, measure, model_identity, set_definition
from eval_harness.progress import Progress
from eval_harness.results import Result, from_document, to_document, write_json
from eval_harness.suite import Suite

TASK_FILES = {".yaml", ".yml", ".py", ".json", ".jsonl", ".csv", ".parquet", ".txt"}

Results = dict[str, dict[str, Result]]


class FolderError(ValueError):
    """A folder that holds the results of another model."""


@dataclass(slots=True)
class Run:
    """A measurement of one checkpoint; every process of the launch has one and calls the same.

    about          what the documents say beside what is found here, e.g. {"suite": "general"}
    out            folder, or None to keep nothing
    dtype          "auto" is the dtype the checkpoint was saved in
    device         None is a GPU of this process's own where there are some, else "cpu"
    batch_tokens   padded tokens of a batch; None is what fits in memory
    """

    checkpoint: Checkpoint
    ranks: Ranks
    stop: Stop
    progress: Progress
    out: Path | None
    about: dict[str, Any]
    dtype: str = "auto"
    quantization: As = "trained"
    device: str | None = None
    batch_tokens: int | None = None
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # set -> what decided it, with its id
    _tokenizer: Any = None
    _model: Any = None
    _weights: str = ""

    def results(self, suite: Suite) -> Results:
        """Of all sets, then the quantities that combine them. The model is loaded when something must be scored.

        Raises:
            FolderError: `out` holds another model's results.
            LoadError, Interrupted, and what `eval_harness.measure.measure` and `eval_harness.lm_eval_adapter.run`
            raise, on all processes.
        """
        self._tokenizer = self.ranks.together(self.checkpoint.tokenizer)
        self._weights = self.ranks.on_main(self.checkpoint.fingerprint)
        self.ranks.on_main(self._claim)
        sets: list[EvalSet | LmEvalSet] = [*suite.sets, *map(self._asked, suite.lm_eval)]
        found: Results = {}
        for number, one in enumerate(sets, start=1):
            self.progress.begin(f"{one.name} ({number} of {len(sets)})")
            found |= self._known_or_measured(one)
        found |= combine(suite.combined, found)
        self.ranks.on_main(lambda: self._write("results", found, self.settings))
        self.ranks.on_main(lambda: self._name_others([one.name for one in sets]))
        return found

    def _asked(self, one: LmEvalSet) -> LmEvalSet:
        """`chat_template: auto` is a template where the tokenizer has one."""
        return replace(one, apply_chat_template=one.apply_chat_template and bool(self._tokenizer.chat_template))

    def _known_or_measured(self, one: EvalSet | LmEvalSet) -> Results:
        settings = self.ranks.on_main(partial(self._settings, one))
        found = self.ranks.on_main(partial(self._known, one.name, settings["id"]))
        if found is not None:
            self.progress.say(f"{one.name}: kept, measured before")
        else:
            found = self._measured(one)
            self.ranks.on_main(partial(self._write, one.name, found, dict.fromkeys(found, settings)))
        self.settings |= dict.fromkeys(found, settings)
        return found

    def _measured(self, one: EvalSet | LmEvalSet) -> Results:
        how: dict[str, Any] = {"batch_tokens": self.batch_tokens, "should_stop": self.stop, "progress": self.progress}
        how |= {"shard": self.ranks if self.ranks.world > 1 else None}
        if isinstance(one, LmEvalSet):
            return lm_eval_adapter.run(self._loaded(), self._tokenizer, [one], **how)
        cache = Cache(self.out / ".cache") if self.out else None
        return measure(partial(self._loaded), self._tokenizer, [one], cache=cache, identity=self._identity(), **how)

    def _loaded(self) -> Any:
        if self._model is None:
            from eval_harness.loading import load_model

            checkpoint, device = self.checkpoint, self._device()
            load = partial(load_model, checkpoint.folder, base=checkpoint.base, device=device, dtype=self.dtype)
            self.progress.say(f"loading {checkpoint.lineage.describe()} from {checkpoint.folder} on {device}")
            self._model = self.ranks.together(partial(load, quantization=self.quantization))
        return self._model

    def _device(self) -> str:
        import torch

        wanted = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return f"cuda:{self.ranks.local}" if wanted == "cuda" and self.ranks.world > 1 else wanted

    def _identity(self) -> str:
        kind = self._device().partition(":")[0]
        return model_identity(self._weights, dtype=self.dtype, quantization=self.quantization, device=kind)

    def _settings(self, one: EvalSet | LmEvalSet) -> dict[str, Any]:
        """What decided a set's prompts and continuations; `id` also its rows, the model and the versions."""
        if isinstance(one, LmEvalSet):
            said = {key: getattr(one, key) for key in ("task", "num_fewshot", "apply_chat_template", "system")}
            what = [asdict(one), tokenizer_digest(self._tokenizer), _files(one.include_path), version("lm_eval")]
        else:
            said, what = _how(one, self._tokenizer), [set_definition(one, self._tokenizer)]
        return {"id": digest(*what, self._identity(), versions()), **said}

    def _known(self, name: str, wanted: str) -> Results | None:
        """What the folder holds of a set, if it is of this id; None where it is not, or the file is damaged."""
        try:
            document = json.loads((self.out / f"{name}.json").read_text(encoding="utf-8")) if self.out else {}
            same = any(one["id"] == wanted for one in document.get("settings", {}).values())
            return from_document(document) if same else None
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return None

    def _write(self, name: str, found: Results, settings: Mapping[str, Any]) -> None:
        if self.out:
            write_json(self.out / f"{name}.json", self._document(found, settings))

    def _document(self, found: Results, settings: Mapping[str, Any]) -> dict[str, Any]:
        own = {"revision": self.checkpoint.revision, "made_of": self.checkpoint.lineage.describe()}
        return to_document(found, **self.about, **own, **self._whose(), settings=dict(settings), libraries=versions())

    def _whose(self) -> dict[str, str]:
        return {"weights": self._weights, "dtype": self.dtype, "quantization": self.quantization}

    def _claim(self) -> None:
        """Refuse a folder of another model; forget its results.json, which would pass for one of an early end."""
        own = self._whose()
        for _, document in self._documents():
            if any(document.get(key) != own[key] for key in own):
                raise FolderError(
                    f"{self.out}: holds results of {document.get('model', 'a model')} ({_model(document)}), not of "
                    f"this model ({_model(own)}): give another folder with --out, or delete {self.out}"
                )
        if self.out:
            (self.out / "results.json").unlink(missing_ok=True)

    def _name_others(self, names: list[str]) -> None:
        """Files of sets that this call was not asked for, so that nobody takes them for a part of its results."""
        others = [name for name, _ in self._documents() if name not in (*names, "results")]
        if others:
            files = ", ".join(f"{name}.json" for name in others)
            self.progress.say(f"{self.out} also holds {files}, measured earlier; results.json does not")

    def _documents(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The measurements that the folder holds, by the name of their file."""
        for file in sorted(self.out.glob("*.json")) if self.out else ():
            document = _measurement(file)
            if document is not None:
                yield file.stem, document


def _how(one: EvalSet, tokenizer: Any) -> dict[str, Any]:
    """The prompts of a set, and its continuations where a measure reads them."""
    is_text = one.rows[0].kind == "text"
    said = {"prompting": "text" if is_text else one.prompting.definition(tokenizer, draw_shots(one))}
    names = one.measures or default_measures(one.rows)
    written = any("generation" in MEASURES[name].asked_of(one) for name in names)
    return said | ({"generation": one.generation.definition()} if written else {})


def _model(said: Mapping[str, Any]) -> str:
    return f"weights {str(said.get('weights'))[:8]}, dtype {said.get('dtype')}, quantization {said.get('quantization')}"


def _measurement(file: Path) -> dict[str, Any] | None:
    """What a run wrote into a file; None where it is another one's, or damaged."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) and {"schema_version", "weights"} <= document.keys() else None


def _files(folder: str | None) -> dict[str, str]:
    """Digests of the files of an include_path: a task's code and rows decide its results, earlier results do not."""
    if folder is None:
        return {}
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix in TASK_FILES and file.is_file())
    return {str(file): _sha256(file) for file in files if file.suffix != ".json" or _measurement(file) is None}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
