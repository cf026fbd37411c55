"""A child process that tries checks one by one, so that a crash is a line and nothing hangs.

The child imports each library once and answers by name, a JSON line each. What libraries print goes to a file, whose
last line explains a crash. A child that died or was killed is replaced for the next check.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from cpt.doctor.line import At, Check, Line, fail
from cpt.errors import CptError

TABLE = "cpt.doctor.checks:checks"  # gives every check for an At; both sides call it
# The child has the parent's module path, or a reward would be found here and not by `cpt run`.
_START = "import sys; sys.path[:] = {path!r}; from cpt.doctor.worker import serve; serve()"
# A launcher's variables would make the child wait for other processes.
_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Worker:
    """Asks a child process for one check at a time: `ask`, then `answer`. Leaving the block ends the child.

    table: module:function that makes the checks. alone: the child sees the first device only.
    """

    def __init__(self, at: At, table: str = TABLE, alone: bool = False) -> None:
        self._setup = {"folder": str(at.folder), "scratch": str(at.scratch), "stream": None, "table": table}
        if at.stream is not None:
            self._setup["stream"] = at.stream.to_yaml()
        self._env = {key: value for key, value in os.environ.items() if key not in _LAUNCH}
        if alone:
            self._env["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115  (closed by __exit__)
        self._child: subprocess.Popen[bytes] | None = None
        self._asked: tuple[Check, float] | None = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self._end()
        self._printed.close()

    def ask(self, check: Check) -> None:
        """Have the child begin."""
        child = self._running()
        self._asked = (check, time.monotonic())
        self._printed.seek(0)
        self._printed.truncate()
        try:
            _send(child, check.name)
        except BrokenPipeError:  # it ended meanwhile: `answer` says how
            return

    def answer(self) -> Line:
        """What the child found, or how it ended. Waits until the check's time is over."""
        assert self._asked is not None, "ask first"
        assert self._child is not None
        assert self._child.stdout is not None
        check, began = self._asked
        left = max(0.0, began + check.limit_s - time.monotonic())
        ready, _, _ = select.select([self._child.stdout], [], [], left)
        text = self._child.stdout.readline() if ready else None
        if text:
            return Line(**json.loads(text))
        found = self._how_it_ended() if ready else f"no answer within {check.limit_s:g} s"
        self._end()
        return Line("fail", found, check.advice, check.name, time.monotonic() - began)

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-c", _START.format(path=sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._printed,
                env=self._env,
                bufsize=0,
                start_new_session=True,  # so that what it starts ends with it
            )
            _send(self._child, json.dumps(self._setup))
        return self._child

    def _how_it_ended(self) -> str:
        assert self._child is not None
        code = self._child.wait()
        self._printed.seek(0)
        lines = self._printed.read().decode(errors="replace").strip().splitlines()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"its process ended by {how}" + (f": {lines[-1][:200]}" if lines else "")

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        with suppress(ProcessLookupError):  # nothing of it is left
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for pipe in filter(None, (child.stdin, child.stdout)):
            pipe.close()


def _send(child: "subprocess.Popen[bytes]", line: str) -> None:
    assert child.stdin is not None
    child.stdin.write(f"{line}\n".encode())


def table(source: str, at: At) -> list[Check]:
    """The checks that module:function gives for `at`."""
    module, _, function = source.partition(":")
    return getattr(import_module(module), function)(at)


def serve() -> None:
    """The child's side: what to work on, then names of checks, on standard input; answers on standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand among answers
    setup = json.loads(sys.stdin.readline())
    at = At(Path(setup["folder"]), Path(setup["scratch"]), _stream(setup["stream"]))
    checks = {check.name: check for check in table(setup["table"], at)}
    for name in sys.stdin:
        print(json.dumps(asdict(tried(checks[name.strip()]))), file=answers, flush=True)


def tried(check: Check) -> Line:
    """The check's line, with its name and how long it took; what it raises is a line that fails."""
    began = time.monotonic()
    try:
        line = check.function()
    except CptError as error:
        line = fail("\n".join(error.problems), check.advice)
    except Exception as error:  # whatever a library raises here is what the check is for
        line = fail(_first_line(error), check.advice)
    return replace(line, name=check.name, seconds=round(time.monotonic() - began, 3))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".split("\n")[0][:300]


def _stream(text: str | None) -> Any:
    if text is None:
        return None
    import yaml

    from cpt.config import Stream

    return Stream.parse(yaml.safe_load(text), stored=True)
