"""SIGTERM and Ctrl-C ask for a stop at the next safe point; a second Ctrl-C stops at once."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from cpt.errors import Stopped, UserStopped


class StopRequest:
    """Which signal asked for a stop, if any.

    agree: turns this process's answer into one that all processes share; each must then ask equally often.
    """

    def __init__(self, agree: Callable[[bool], bool] = bool) -> None:
        self.signal: int | None = None
        self._agree = agree

    def here(self) -> bool:
        """True once this process was asked to stop."""
        return self.signal is not None

    def __call__(self) -> bool:
        """True once any process was asked to stop; all must ask at the same point."""
        return self._agree(self.here())

    def error(self, where: str) -> Stopped:
        """What to raise at the safe point, in words that say how to go on."""
        kind = UserStopped if self.signal == signal.SIGINT else Stopped
        name = "Ctrl-C" if self.signal == signal.SIGINT else "SIGTERM"
        error = kind(f"stopped by {name} {where}; run the same command again to go on from there")
        error.elsewhere = int(os.environ.get("RANK") or 0) > 0  # all processes stop, the first one says so
        return error


@contextmanager
def stop_requests(agree: Callable[[bool], bool] = bool) -> Iterator[StopRequest]:
    """Watch for signals inside the block (in the main thread; elsewhere nothing is watched)."""
    request = StopRequest(agree)

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and request.here():
            raise KeyboardInterrupt
        request.signal = number
        if number == signal.SIGINT and int(os.environ.get("RANK") or 0) == 0:
            os.write(2, b"\nstopping at the next safe point; Ctrl-C again stops at once\n")  # print may not re-enter

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread
        before = {}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
