"""Ways to kill a process -9 at a named point, from inside it: each patches one function of the running stack."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any


def die() -> None:
    """What an out-of-memory killer or a power cut does."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(number: int, function: Callable[..., Any], before: bool) -> Callable[..., Any]:
    """The function, but the process dies right before or right after its n-th call."""
    calls = {"n": 0}

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls["n"] += 1
        if before and calls["n"] == number:
            die()
        result = function(*args, **kwargs)
        if calls["n"] == number:
            die()
        return result

    return patched


def inside_optimizer_step(number: int) -> None:
    """The weights have moved, the step is not over: nothing else of it has been recorded."""
    from torch.optim import adam  # AdamW is its subclass and steps through it

    adam.adam = at_call(number, adam.adam, before=False)


def in_the_middle_of_a_checkpoint(number: int) -> None:
    """Half of optimizer.pt is on the disk."""
    import torch

    real = torch.save
    calls = {"n": 0}

    def half(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        real(content, file, *args, **kwargs)
        if str(file).endswith("optimizer.pt"):
            calls["n"] += 1
            if calls["n"] == number:
                os.truncate(file, os.path.getsize(file) // 2)
                die()

    torch.save = half


def before_the_seal(number: int) -> None:
    """Every file of the checkpoint is there, nothing vouches for them."""
    from cpt.trainers import plug

    plug.seal = at_call(number, plug.seal, before=True)


def _before_writing(parent: Callable[[Path], bool], number: int) -> None:
    from cpt import run_dir

    real, calls = run_dir.write_json, {"n": 0}

    def patched(file: Path, content: Any) -> None:
        if file.name == "DONE" and parent(file.parent):
            calls["n"] += 1
            if calls["n"] == number:
                die()
        real(file, content)

    run_dir.write_json = patched


def before_done(number: int) -> None:
    """The stage's last file is in its place, DONE is not."""
    _before_writing(lambda folder: folder.name != "eval", number)


def before_eval_done(number: int) -> None:
    """Every set is measured and written, eval/DONE is not."""
    _before_writing(lambda folder: folder.name == "eval", number)


def in_evaluation(number: int) -> None:
    """Between two scoring batches."""
    from eval_harness import scoring

    scoring.check_stop = at_call(number, scoring.check_stop, before=True)
