"""A full disk, said in one sentence whichever library noticed it."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cpt.errors import CptError, TrainingError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_WORDS = ("No space left", "file write failed", "unexpected pos", "File too large", "Disk quota exceeded")


@contextmanager
def readable_disk_errors(folder: Path) -> Iterator[None]:
    """Turn what Python, torch and safetensors raise on a full disk into a TrainingError about `folder`."""
    try:
        yield
    except CptError:
        raise
    except Exception as error:  # torch, safetensors and tokenizers raise classes of their own, with no errno
        if getattr(error, "errno", None) not in _FULL and not any(word in str(error) for word in _WORDS):
            raise
        raise _full(folder, str(error)) from error


def _full(folder: Path, detail: str) -> TrainingError:
    return TrainingError(
        f"{folder}: the disk (or a quota) is full: {detail}. Nothing committed is lost: free some space, then run "
        "the same command again. retention.models: last and a smaller training.save_total_limit need less."
    )


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise TrainingError before work begins when `needed` bytes are not free."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TrainingError(
            f"{folder}: {what} needs about {needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free. Free some "
            "space, or set retention.models: last; then run the same command again."
        )
