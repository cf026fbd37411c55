"""Two trainings of one process in turns, so that whatever slows the machine slows both.

Each runs its own loop in a thread of its own; one works, the other sleeps. A few steps of A, a few of B, ...
"""

import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

StepEnd = Callable[[], bool]
Training = Callable[[StepEnd], Any]

WARM, TIMED = 2, 2  # steps of a block: the first ones find the other side's data in the processor's caches


def steps_for(blocks: int) -> int:
    """Steps that a training must take: a block that is not counted (first calls allocate and load), those that
    are, and one step more, for not every loop reports its last one.
    """
    return (blocks + 1) * (WARM + TIMED) + 1


def interleave(sides: Mapping[str, Training], blocks: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Run the trainings block by block in turns; seconds per step of each block, and what each returned.

    A training takes `step_end`, calls it at the end of every optimizer step (it returns False: do not stop) and
    takes steps_for(blocks) steps. An exception in one ends the others and is raised here.
    """
    if not pin_allocator():
        print("note: the allocator cannot be pinned here; a ratio may be off by several percent")
    turns = Turns(sides)
    clocks = {side: _Clock(side, turns) for side in sides}
    with ThreadPoolExecutor(len(sides)) as pool:
        try:
            running = {side: pool.submit(clocks[side].run, train) for side, train in sides.items()}
            results = {side: future.result() for side, future in running.items()}
        except BaseException as error:
            turns.abort(error)
            raise turns.failure or error from None  # the side that failed, not the one that was woken up for it
    return {side: clock.blocks()[1 : blocks + 1] for side, clock in clocks.items()}, results


def pin_allocator() -> bool:
    """Keep freed memory in one arena of this process; False where the C library has no mallopt (not glibc).

    By default each thread gets arenas of its own and large temporaries go back to the system, depending on what
    was freed before. The two sides of a pair then differed by a factor of two in page faults, and by 3 to 8 % of a
    step, at the same operators and shapes. Children are not affected.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # M_ARENA_MAX, M_MMAP_THRESHOLD (32 MiB is the most that glibc takes), M_TRIM_THRESHOLD, of malloc.h
    wanted = {-8: 1, -3: 32 * 2**20, -1: 2**31 - 1}
    return mallopt is not None and all(mallopt(option, value) == 1 for option, value in wanted.items())


class Turns:
    """Whose turn it is: the first in line works, the rest wait."""

    def __init__(self, sides: Iterable[str]) -> None:
        self._line, self._changed = deque(sides), threading.Condition()
        self.failure: BaseException | None = None

    def wait(self, side: str) -> None:
        """Sleep until it is this side's turn. Raises RuntimeError when another side failed."""
        with self._changed:
            self._changed.wait_for(lambda: self.failure or self._line[0] == side)
            if self.failure:
                raise RuntimeError(f"{side}: ended, because the other side of the pair failed")

    def pass_on(self) -> None:
        """Go to the end of the line."""
        with self._changed:
            self._line.rotate(-1)
            self._changed.notify_all()

    def leave(self, side: str) -> None:
        """Out of the line for good."""
        with self._changed:
            self._line.remove(side)
            self._changed.notify_all()

    def abort(self, error: BaseException) -> None:
        """Wake everyone up to fail; the first error is kept."""
        with self._changed:
            self.failure = self.failure or error
            self._changed.notify_all()


class _Clock:
    """Seconds of every step of one side; hands the turn on after each block."""

    def __init__(self, side: str, turns: Turns) -> None:
        self.side, self.turns, self.seconds = side, turns, list[float]()
        self._since = 0.0

    def run(self, train: Training) -> Any:
        try:
            self.turns.wait(self.side)
            self._since = time.perf_counter()
            result = train(self.step_end)
        except BaseException as error:
            self.turns.abort(error)
            raise
        self.turns.leave(self.side)
        return result

    def step_end(self) -> bool:
        self.seconds.append(time.perf_counter() - self._since)
        if len(self.seconds) % (WARM + TIMED) == 0:
            self.turns.pass_on()
            self.turns.wait(self.side)
        self._since = time.perf_counter()
        return False

    def blocks(self) -> list[float]:
        """Median seconds of the timed steps of each whole block."""
        block = WARM + TIMED
        whole = range(0, len(self.seconds) - block + 1, block)
        return [median(self.seconds[start + WARM : start + block]) for start in whole]
