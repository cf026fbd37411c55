"""How far a measurement is, on stderr: one line that moves on a terminal, else a line with the time now and then.

A share, not a count: a row is asked about once for its answer, once for all of its choices, once more if something must
be written, and what an earlier measurement knows is not asked again.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any, TextIO

EVERY = 10.0  # seconds between two lines where there is no terminal


class Progress:
    """Told of one set after the other; calling it with (done, total) sequences moves it.

    Args:
        stream: stderr by default.
        clock: seconds; for tests.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.clock = clock
        self.name = ""
        self.said = -EVERY  # when the last line was written
        self.line = ""  # which
        self.bar: Any = None

    def begin(self, name: str) -> None:
        """What follows is about this set."""
        self.name = name

    def say(self, line: str) -> None:
        """A line that stays."""
        if self.bar is not None:
            self.bar.console.print(line, markup=False, highlight=False)
        else:
            print(f"{datetime.now():%H:%M:%S} {line}", file=self.stream, flush=True)

    def __call__(self, done: int, total: int) -> None:
        if self.bar is not None:
            self.bar.update(self.bar.tasks[0].id, description=self.name, completed=done, total=total)
        elif self.clock() - self.said >= EVERY or done == total:
            before, self.line = self.line, f"{self.name}: {100 * done // total if total else 100} %"
            if self.line != before:
                self.said = self.clock()
                self.say(self.line)

    def __enter__(self) -> Progress:
        if self.stream.isatty() and os.environ.get("TERM") not in (None, "", "dumb", "unknown"):
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
            times = (TimeElapsedColumn(), TimeRemainingColumn())
            self.bar = Bar(*columns, *times, console=Console(file=self.stream), transient=True)
            self.bar.add_task(self.name, total=None)
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class Silent(Progress):
    """For the processes that do not speak."""

    def say(self, line: str) -> None:
        """Nothing."""

    def __enter__(self) -> Progress:
        return self

    def __call__(self, done: int, total: int) -> None:
        """Nothing."""
