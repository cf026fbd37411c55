"""Whether two mathematical results are equal in value, by math-verify (Kydlíček 2025, Apache-2.0; SymPy underneath).

SymPy can be made to compute for years (9^{9^{9^9}}, which a policy finds), and math-verify's own limits are signals,
which work in a main thread only and between two bytecodes only. So it runs in a process of its own that the kernel
ends after CPU_SECONDS of an item; it starts with the first item, about a second, and the threads of a process share it.

This file is also that process's program: it imports nothing of ours.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from functools import cache
from typing import Any

CPU_SECONDS = 3.0  # for one item: parsing both sides and comparing them
WALL_SECONDS = 60.0  # the same where the machine is too busy to give it that
MEMORY_BYTES = 4 << 30

logger = logging.getLogger(__name__)

EQUAL, UNEQUAL, NOTHING_FOUND, UNREADABLE = "equal", "unequal", "nothing found", "reference unreadable"


class Verifier:
    """A process that answers one item after the other, and is started anew when one has ended it."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, reference: str, *candidates: str) -> str | None:
        """EQUAL, UNEQUAL, NOTHING_FOUND (in the candidates) or UNREADABLE; None where the reference takes too long."""
        with self._lock:
            verdict = self._answer([reference, *candidates])
            if verdict is None:
                logger.warning("not decided within %g s: %.80r against %.80r", CPU_SECONDS, candidates, reference)
                verdict = UNEQUAL if self._answer([reference]) else None
            return verdict

    def close(self) -> None:
        """End the process, where this one started it."""
        if self._process is not None and self.pid == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None

    def _answer(self, texts: list[str]) -> str | None:
        """What the process says; None where it ended instead."""
        process = self._running()
        return self._within(process, json.dumps(texts))

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            # Without the folder of this file on its path, whose `statistics` is not the standard library's; in a
            # session of its own, so that a signal to the parent's group is not taken for a verdict.
            command = [sys.executable, "-P", __file__, str(CPU_SECONDS), str(MEMORY_BYTES)]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self._process = subprocess.Popen(command, **pipes, text=True, encoding="utf-8", start_new_session=True)
            hello = self._within(self._process)
            if hello != "ready":
                self.close()
                raise ImportError(f"math-verify does not load ({hello}): install it with pip install math-verify")
        return self._process

    def _within(self, process: subprocess.Popen[str], question: str | None = None) -> str | None:
        """One line of answer; None where the process ended or had to be."""
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(WALL_SECONDS, process.kill)
        timer.start()
        try:
            if question is not None:
                process.stdin.write(f"{question}\n")
                process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        except BaseException:  # a stop: the answer under way must not be taken for the next one
            self.close()
            raise
        finally:
            timer.cancel()
        if line:
            return str(json.loads(line))
        self.close()
        return None


def shared() -> Verifier:
    """The one of this process."""
    return _of_process(os.getpid())  # a fork must not share its parent's pipes


@cache
def _of_process(pid: int) -> Verifier:
    verifier = Verifier()
    atexit.register(verifier.close)
    return verifier


def _serve(cpu_seconds: float, memory_bytes: int) -> None:
    """The other side: a line of JSON in, [reference, candidate, ...]; a line out."""
    import resource

    say = sys.stdout
    sys.stdout = sys.stderr  # where libraries print
    try:
        from math_verify import parse, verify
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {error}"), file=say, flush=True)
        return
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes if most == resource.RLIM_INFINITY else most, most))

    def verdict(reference: str, *candidates: str) -> str:
        expected = parse(reference, parsing_timeout=None)
        if not expected:
            return UNREADABLE
        given: list[Any] = next((found for one in candidates if (found := parse(one, parsing_timeout=None))), [])
        if not given:
            return NOTHING_FOUND
        return EQUAL if verify(expected, given, timeout_seconds=None) else UNEQUAL

    print(json.dumps("ready"), file=say, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # its signal ends the process, within one bytecode too
        try:
            said = verdict(*json.loads(line))
        except Exception:  # math-verify catches what it knows; nothing it meets may end the rest
            said = UNEQUAL
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(said), file=say, flush=True)


if __name__ == "__main__":
    _serve(float(sys.argv[1]), int(sys.argv[2]))
