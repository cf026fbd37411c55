"""SIGTERM and Ctrl-C ask for a stop at the next safe point; a second Ctrl-C stops at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from cpt.errors import Stopped, UserStopped


class StopRequest:
    """Which signal asked for a stop, if any."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        """True once a stop was asked for."""
        return self.signal is not None

    def error(self, where: str) -> Stopped:
        """What to raise at the safe point, in words that say how to go on."""
        kind = UserStopped if self.signal == signal.SIGINT else Stopped
        name = "Ctrl-C" if self.signal == signal.SIGINT else "SIGTERM"
        return kind(f"stopped by {name} {where}; run the same command again to go on from there")


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Watch for signals inside the block (in the main thread; elsewhere nothing is watched)."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and request():
            raise KeyboardInterrupt
        request.signal = number

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread
        before = {}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
