"""Commands on several real ranks: started under a launcher, waited for, found by their rank.

torchrun picks a free port itself. Every rank has one thread and imports this checkout; what all of them print is
in the folder's output.txt.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.plugins import require

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ROOT = Path(__file__).parents[2]


def launched(
    launcher: list[str],
    arguments: list[str],
    folder: Path,
    module: str = "cpt",
    cwd: Path | None = None,
    **environ: str,
) -> subprocess.Popen[str]:
    """`python -m MODULE ARGUMENTS` under a launcher, in `folder` or in `cwd`; skips where two ranks cannot meet."""
    require("two_ranks", dist.is_available() and dist.is_gloo_available(), "torch was built without gloo")
    folder.mkdir(exist_ok=True, parents=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with open(folder / "output.txt", "w") as output:
        return subprocess.Popen(
            [*launcher, "-m", module, *arguments],
            cwd=cwd or folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environ,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )


def finished(
    launcher: list[str], arguments: list[str], folder: Path, timeout: float = 500, **where: Any
) -> tuple[int, str]:
    """Launch, as `launched` does, and wait: (exit code, what was printed)."""
    process = launched(launcher, arguments, folder, **where)
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # a launcher passes it on to its ranks
        said = (folder / "output.txt").read_text()[-4000:]
        raise AssertionError(f"not done after {timeout} s; what the ranks said last:\n{said}") from None
    return code, (folder / "output.txt").read_text()


def two_ranks(worker: str, *arguments: str, folder: Path, timeout: float, **environ: str) -> tuple[int, str]:
    """`tests.distributed.WORKER ARGUMENTS FOLDER` on two ranks that run in the checkout: (exit code, printed)."""
    module = f"tests.distributed.{worker}"
    return finished(TORCHRUN, [*arguments, str(folder)], folder, timeout, module=module, cwd=ROOT, **environ)


def require_deepspeed() -> None:
    """Go on where DeepSpeed can build its collective."""
    present = importlib.util.find_spec("deepspeed") and shutil.which("g++") and shutil.which("ninja")
    require("deepspeed", bool(present), "deepspeed, g++ or ninja is not installed")


def rank(process: subprocess.Popen[str], number: int) -> int:
    """Process id of one rank beneath a launcher."""
    wanted = f"RANK={number}".encode()
    for child in _children(process.pid):
        if wanted in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return child
    raise AssertionError(f"no rank {number} found")


def _children(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield int(child)
            yield from _children(int(child))
