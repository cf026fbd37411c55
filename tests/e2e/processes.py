"""Real processes that do not each pay ten seconds of imports: forked from a server that has imported once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["cpt.stream", "cpt.cli", "cpt.trainers.sft", "cpt.trainers.rft", "tests.e2e.sabotage"])


def start(arguments: list[str], folder: Path, sabotage: tuple[Callable[..., None], Any] | None = None) -> Any:
    """`cpt ARGUMENTS` in a process of its own, its output in folder/output.txt; returns the started process.

    sabotage: a function of tests.e2e.sabotage and its argument, called in the process before the command.
    """
    process = _CONTEXT.Process(target=_child, args=(arguments, str(folder), sabotage))
    process.start()
    return process


def cpt(arguments: list[str], folder: Path, sabotage: Any = None, timeout: float = 300) -> tuple[int, str]:
    """Run to the end: (exit code, what it printed). A killed process has the negative signal as its code."""
    process = start(arguments, folder, sabotage)
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"cpt {' '.join(arguments)} took more than {timeout} s:\n{output(folder)}")
    return process.exitcode, output(folder)


def output(folder: Path) -> str:
    """What the last command in this folder printed."""
    return (folder / "output.txt").read_text(encoding="utf-8")


def _child(arguments: list[str], folder: str, sabotage: Any) -> None:
    import torch

    from cpt.cli import main

    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.chdir(folder)
    file = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    if sabotage:
        sabotage[0](sabotage[1])
    sys.argv = ["cpt", *arguments]
    main()
