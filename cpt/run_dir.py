"""The run directory: which stages are finished, what they are, and how the next ones are committed.

    runs/NAME-UTC-HASH8/
      run.json  stream.yaml  matrix.json
      stages/00_base/   stage.json  eval/*.json  eval/DONE
      stages/01_NAME/   stage.json  checkpoints/  model/  metrics.jsonl  DONE  eval/*.json  eval/DONE

A stage happened when its DONE exists: it is written last, by rename, and holds the hashes of the model's files.
Its evaluation is a second commit with a DONE of its own. Nothing finished is ever deleted; what a changed stream
no longer contains is renamed to NN_NAME.superseded-K.
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cpt.checkpoints import folder_hashes, sync_tree, verify, write_json
from cpt.errors import RunDirError

LIBRARIES = ("cpt", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "numpy")


def digest(content: Any) -> str:
    """sha256 of canonical JSON, hex: what an identity is made of."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class StageDir:
    """One stage's folder inside a run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    run = property(lambda self: self.path.parents[1])
    model = property(lambda self: self.path / "model")
    eval = property(lambda self: self.path / "eval")
    checkpoints = property(lambda self: self.path / "checkpoints")

    def record(self) -> dict[str, Any] | None:
        """stage.json, or None when the stage was never begun."""
        return _read(self.path / "stage.json")

    def done(self) -> dict[str, Any] | None:
        """What DONE holds (identity, file hashes, facts), or None: then the stage did not happen."""
        return _read(self.path / "DONE")

    def eval_done(self) -> dict[str, Any] | None:
        """What eval/DONE holds (plan, sets), or None."""
        return _read(self.eval / "DONE")

    def results(self) -> dict[str, dict[str, Any]]:
        """Set -> measure -> result (as JSON) of a finished evaluation; empty when there is none."""
        done = self.eval_done() or {"sets": []}
        return {name: _read(self.eval / f"{name}.json") or {} for name in done["sets"]}

    def begin(self, record: dict[str, Any]) -> None:
        """Write the stage's record: who it is and what it will be trained on."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "stage.json", record)

    def commit(self, identity: str, facts: dict[str, Any], save_model: Any, keep_checkpoints: bool) -> None:
        """Save the model aside, flush, rename it into place, then write DONE: the stage has happened."""
        aside = self.path / "model.partial"
        for leftover in (aside, self.model):
            shutil.rmtree(leftover, ignore_errors=True)
        save_model(aside)
        sync_tree(aside)
        aside.rename(self.model)
        size = sum(file.stat().st_size for file in self.model.rglob("*") if file.is_file())
        facts = facts | {"bytes_written": facts.get("bytes_written", 0) + size}
        done = {"identity": identity, "finished": _now(), "libraries": libraries(), "facts": facts}
        done["model"] = folder_hashes(self.model)
        write_json(self.path / "DONE", done)
        if not keep_checkpoints:
            shutil.rmtree(self.checkpoints, ignore_errors=True)

    def commit_eval(self, plan: str, results: dict[str, dict[str, Any]], facts: dict[str, Any]) -> None:
        """Write every set's results, then eval/DONE; an earlier plan's files are replaced."""
        self.eval.mkdir(parents=True, exist_ok=True)
        (self.eval / "DONE").unlink(missing_ok=True)
        for name, measures in results.items():
            write_json(self.eval / f"{name}.json", measures)
        for stale in set(self.eval.glob("*.json")) - {self.eval / f"{name}.json" for name in results}:
            stale.unlink()
        write_json(self.eval / "DONE", {"plan": plan, "finished": _now(), "sets": list(results), "facts": facts})

    def verify_model(self) -> None:
        """Raise RunDirError when a model file differs from its recorded hash."""
        hashes = (self.done() or {"model": {}})["model"]
        step = f"Restore it, or delete {self.path} to train the stage again, then run the same command."
        verify(self.model, hashes, step)


def _others(path: Path, most: int = 8) -> str:
    """What a user may have meant: names of the runs beside it, or in `runs` where a bare name was given."""
    home = path.parent if len(path.parts) > 1 else Path("runs")
    names = {(_read(file) or {}).get("name") for folder in {path.parent, home} for file in folder.glob("*/run.json")}
    known = sorted(name for name in names if name)
    if near := get_close_matches(path.name, known, n=1):
        return f" Did you mean {home / near[0]}?"
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return f" Runs there: {', '.join(str(home / name) for name in known[:most])}{more}." if known else ""


class Run:
    """A run directory, opened: `Run(path)`; made by `Run.create`, found by `Run.newest`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        info = _read(self.path / "run.json")
        if info is None:
            raise RunDirError(f"{self.path}: is no run directory (there is no readable run.json in it)")
        self.info: dict[str, Any] = info

    @property
    def name(self) -> str:
        """Name of the stream that made it."""
        return self.info["name"]

    @classmethod
    def create(cls, output_dir: Path, name: str, stream_digest: str) -> "Run":
        """Make runs/NAME-UTC-HASH8 with its run.json."""
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")[:-3] + "Z"
        path = output_dir / f"{name}-{stamp}-{stream_digest[:8]}"
        (path / "stages").mkdir(parents=True)
        info = {"name": name, "created": _now(), "schema": 1, "libraries": libraries(), "machine": machine()}
        write_json(path / "run.json", info)
        return cls(path)

    @classmethod
    def newest(cls, output_dir: Path, name: str) -> "Run | None":
        """The run of that stream which was made last, or None."""
        found = [path for path in output_dir.glob(f"{name}-*") if (_read(path / "run.json") or {}).get("name") == name]
        return cls(max(found, key=lambda path: path.name)) if found else None

    @classmethod
    def open(cls, where: str | os.PathLike[str]) -> "Run":
        """A run by its folder, or by `runs/NAME`: the newest run of that name. Raises RunDirError."""
        path = Path(where)
        if (path / "run.json").exists():
            return cls(path)
        found = cls.newest(path.parent, path.name)
        if found is None:
            raise RunDirError(f"{path}: no run directory, and no run of that name beside it.{_others(path)}")
        return found

    def stage(self, index: int, name: str) -> StageDir:
        """The folder of stage `index` (0 is the base)."""
        return StageDir(self.path / "stages" / f"{index:02d}_{name}")

    def stages(self) -> list[StageDir]:
        """Folders of the stream's stages in order, superseded ones left out."""
        found = [path for path in (self.path / "stages").glob("[0-9]*_*") if ".superseded-" not in path.name]
        return [StageDir(path) for path in sorted(found, key=lambda path: int(path.name.partition("_")[0]))]

    def find(self, stage: str) -> StageDir:
        """A stage by number, name or folder. Raises RunDirError naming what there is."""
        for folder in self.stages():
            number, _, name = folder.path.name.partition("_")
            if stage in (name, folder.path.name) or (stage.isdigit() and int(stage) == int(number)):
                return folder
        known = ", ".join(folder.path.name for folder in self.stages())
        raise RunDirError(f"{self.path}: has no stage {stage!r}; it has {known}")

    def supersede(self, folder: StageDir) -> Path:
        """Rename a stage's folder out of the way; nothing in it is lost."""
        earlier = folder.path.parent.glob(f"{folder.path.name}.superseded-*")
        number = 1 + max((int(path.name.rpartition("-")[2]) for path in earlier), default=0)
        target = folder.path.with_name(f"{folder.path.name}.superseded-{number}")
        folder.path.rename(target)
        return target

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run: two processes in one directory would write over each other. Raises RunDirError."""
        with open(self.path / ".lock", "w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunDirError(
                    f"{self.path}: another process is working in this run; wait for it, or use --new"
                ) from error
            yield


def _read(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunDirError(f"{file}: is damaged ({error}). Restore it, or delete the folder it is in.") from error


def libraries() -> dict[str, str]:
    """Versions of what decides a result."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """Where the run was made; host names stay out of it."""
    system = f"{platform.system()} {platform.machine()}"
    return {"python": platform.python_version(), "system": system, "cores": os.cpu_count()}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
