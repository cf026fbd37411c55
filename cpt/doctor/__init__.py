"""`cpt doctor`: what this machine can do for a stream, each line tried and not read.

`checks` is the table, `software`, `devices` and `system` hold what is tried, `needs` and `room` what a stream asks
for, `worker` the child process they run in, `show` how it looks.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cpt.doctor.line import At, Check, Line
from cpt.doctor.worker import TABLE, Worker, table

if TYPE_CHECKING:
    from cpt.config import Stream

__all__ = ["Examination", "Line"]


@dataclass
class Examination:
    """Which checks are made, which are left out, and what they find; the files they write are removed at the end.

    stream: check what it needs, and of the rest only what every use needs. quick: leave slow checks out, unless the
    stream needs them. folder: where runs go; default: the stream's output_dir, or `runs`.
    """

    stream: "Stream | None" = None
    quick: bool = False
    folder: Path = Path("runs")
    source: str = TABLE
    lines: list[Line] = field(default_factory=list)

    def __post_init__(self) -> None:
        from cpt.doctor.needs import needed

        wanted = (self.stream.output_dir if self.stream else self.folder).absolute()
        folder = next(path for path in (wanted, *wanted.parents) if path.is_dir())
        self.at = At(folder, folder / f".cpt-doctor-{os.getpid()}", self.stream)
        self.needed = needed(self.stream) if self.stream else {}
        known = table(self.source, self.at)
        self.checks = [check for check in known if self._wanted(check)]
        self.left_out = [check.name for check in known if check not in self.checks]

    def _wanted(self, check: Check) -> bool:
        if check.name in self.needed or check.of_stream:
            return True
        return not (self.quick and check.slow) and (check.every_use or self.stream is None)

    def __iter__(self) -> Iterator[Line]:
        """Each check's line as it is known. Those in processes of their own begin first."""
        try:
            with ExitStack() as stack:
                shared = stack.enter_context(Worker(self.at, self.source))
                alone = {check.name: stack.enter_context(self._begun(check)) for check in self.checks if check.alone}
                for check in self.checks:
                    if check.name not in alone:
                        shared.ask(check)
                    line = alone.get(check.name, shared).answer()
                    self.lines.append(replace(line, needed_by=tuple(self.needed.get(check.name, ()))))
                    yield self.lines[-1]
        finally:
            shutil.rmtree(self.at.scratch, ignore_errors=True)

    def _begun(self, check: Check) -> Worker:
        worker = Worker(self.at, self.source, alone=True)
        worker.ask(check)
        return worker

    def reasons(self) -> list[Line]:
        """Lines because of which nothing runs here, or the stream does not; empty if all is well."""
        every_use = {check.name for check in self.checks if check.every_use or check.of_stream}
        return [
            line
            for line in self.lines
            if (line.status == "fail" and line.name in every_use)
            or (line.status in ("fail", "not here") and line.needed_by)
        ]
