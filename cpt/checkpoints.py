"""Checkpoints that can be trusted: sealed with hashes when written, verified before they are read."""

import hashlib
import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from cpt.errors import RunDirError

SEAL = "SEAL.json"
# Of a checkpoint, what is of no use to another stage.
OF_THE_STAGE = ("scheduler.pt", "rng_state*.pth", "trainer_state.json", "terms.json", "methods-*.safetensors")


def file_hash(file: Path) -> str:
    """sha256 of a file, hex."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_hashes(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file below the folder, but for the seal itself."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != SEAL)
    return {file.relative_to(folder).as_posix(): file_hash(file) for file in files}


def write_json(file: Path, content: Any) -> None:
    """Strict JSON by `write_text`."""
    write_text(file, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False))


def write_text(file: Path, text: str, mode: int = 0o666) -> None:
    """Write aside, flush to the disk, rename: a reader sees all of it or none of it. mode: rights, less the umask."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    with open(aside, "w", encoding="utf-8", opener=partial(os.open, mode=mode)) as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(file)
    _sync(file.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush a folder and everything below it to the disk, before something is written that vouches for it."""
    for file in [*folder.rglob("*"), folder]:
        _sync(file)


def seal(folder: Path) -> None:
    """Vouch for every file of a finished checkpoint."""
    sync_tree(folder)
    write_json(folder / SEAL, folder_hashes(folder))


def keep_state(checkpoint: Path, target: Path) -> None:
    """Copy what a later stage can start from out of a sealed checkpoint, all or nothing, and seal the copy.

    That is the model, its tokenizer and the optimizer's state: not what belongs to the stage alone.
    """
    aside = target.with_name(f"{target.name}.partial")
    for leftover in (aside, target):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(checkpoint, aside, ignore=shutil.ignore_patterns(SEAL, *OF_THE_STAGE))
    seal(aside)
    aside.rename(target)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def rotate(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` sealed checkpoints."""
    for path in _by_step(folder)[:-keep]:
        shutil.rmtree(path)


def _by_step(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def verify(folder: Path, hashes: dict[str, str], next_step: str) -> None:
    """Raise RunDirError when a file is missing or differs from its recorded hash."""
    problems = []
    for name, expected in hashes.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{file}: is missing. {next_step}")
        elif file_hash(file) != expected:
            problems.append(f"{file}: is damaged (its hash is not the one recorded when it was written). {next_step}")
    if problems:
        raise RunDirError(*problems)


def verify_sealed(folder: Path, next_step: str) -> None:
    """Raise RunDirError where a sealed folder is not there, or holds something else than when it was sealed."""
    try:
        hashes = json.loads((folder / SEAL).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunDirError(f"{folder / SEAL}: is missing or damaged ({error}). {next_step}") from error
    verify(folder, hashes, next_step)


def newest(folder: Path) -> Path | None:
    """The newest sealed checkpoint, verified; ones without a seal were cut off while written and are removed.

    Raises RunDirError when the newest sealed one is damaged: nothing is deleted then.
    """
    found = _by_step(folder)
    sealed = [path for path in found if (path / SEAL).exists()]
    for path in set(found) - set(sealed):
        shutil.rmtree(path)
    if not sealed:
        return None
    best = sealed[-1]
    before = f"go on from {sealed[-2].name}" if len(sealed) > 1 else "start the stage again"
    advice = f"Delete {best} to {before}, then run the same command again."
    verify_sealed(best, advice)
    return best
