"""The processes of one launch by torchrun or `accelerate launch`: a Shard, and how the error of one ends all.

Every process holds the whole model, on a device of its own, and scores its part of the rows. What they exchange are
Python objects, over sockets (gloo) on CPUs and GPUs alike: nothing waits inside a kernel for a process that is gone.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

PATIENCE = timedelta(hours=1)  # a process that lives may be loading a large model; one that died is noticed at once
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
HOW = "torchrun --nproc_per_node N -m eval_harness ..., or accelerate launch --num_processes N -m eval_harness ..."

T = TypeVar("T")


class LaunchError(RuntimeError):
    """Processes that do not find each other, or one of them that ended; or what went wrong on another one."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of the launch: a Shard. All call every method, in the same order.

    rank, world   its number, and how many there are; with one, everything here is immediate
    local         its number on its machine: which GPU is its own
    errors        kinds of error that are raised as themselves on all processes
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    errors: tuple[type[Exception], ...] = ()

    @property
    def is_main(self) -> bool:
        """Whether this is the first process: it alone reads sets, writes files and prints."""
        return self.rank == 0

    def gather(self, part: Any) -> list[Any]:
        """What every process passes, by rank, on all of them; it must be picklable.

        Raises:
            LaunchError: another process ended, or does not answer.
        """
        if self.world == 1:
            return [part]
        import torch.distributed as dist

        parts: list[Any] = [None] * self.world
        with self._in_words():
            dist.all_gather_object(parts, part)
        return parts

    def on_main(self, function: Callable[[], T]) -> T:
        """Let the first process call the function; its result (picklable), or its error, is everybody's."""
        if self.world == 1:
            return function()
        import torch.distributed as dist

        made, error = _attempt(function) if self.is_main else (None, None)
        holder = [(made, _told(error))]
        with self._in_words():
            dist.broadcast_object_list(holder, src=0)
        self._agree(error, [holder[0][1]])
        return made if self.is_main else holder[0][0]  # type: ignore[return-value]

    def together(self, function: Callable[[], T]) -> T:
        """Call the function on every process and return each its own; the error of one ends all alike."""
        if self.world == 1:
            return function()
        made, error = _attempt(function)
        self._agree(error, self.gather(_told(error)))
        return made  # type: ignore[return-value]

    def end(self) -> None:
        """Part from the others; call it on success and on errors that all share."""
        if self.world > 1:
            import torch.distributed as dist

            dist.destroy_process_group()

    def _agree(self, own: Exception | None, failures: list[tuple[str, str] | None]) -> None:
        """Raise the error of the lowest rank that has one: itself there, its copy elsewhere."""
        first = next((rank for rank, failure in enumerate(failures) if failure is not None), None)
        if first is None:
            return
        if first == self.rank and own is not None:
            raise own
        name, text = failures[first]  # type: ignore[misc]
        known = {kind.__name__: kind for kind in self.errors}
        raise known[name](text) if name in known else LaunchError(f"process {first}: {name}: {text}")

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            said = (str(error).splitlines() or ["no message"])[0][:200]
            raise LaunchError(
                f"process {self.rank}: another process of this launch ended or does not answer; its own message says "
                f"why. What was measured is kept: the same command goes on from there ({said})"
            ) from error


def start(errors: tuple[type[Exception], ...] = (), environ: Mapping[str, str] = os.environ) -> Ranks:
    """Meet the other processes of this launch; imports torch only if there are any.

    Raises:
        LaunchError: the launcher's variables are incomplete, or the processes do not find each other.
    """
    world = int(environ.get("WORLD_SIZE") or 1)
    if world == 1:
        return Ranks(errors=errors)
    missing = [name for name in NEEDED if not environ.get(name)]
    if missing:
        raise LaunchError(f"WORLD_SIZE = {world}, but {', '.join(missing)} is not set. Start with {HOW}")
    import torch.distributed as dist

    try:
        dist.init_process_group("gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        address = f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}"
        raise LaunchError(f"the {world} processes did not find each other at {address}: {error}") from error
    return Ranks(dist.get_rank(), dist.get_world_size(), int(environ["LOCAL_RANK"]), errors)


class Stop:
    """Whether a signal asked for a stop; called between two batches."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_requests() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM ask for a stop at the next safe point, a second Ctrl-C stops at once (main thread only)."""
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop():
            raise KeyboardInterrupt
        stop.signal = number

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _attempt(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return function(), None
    except Exception as error:  # raised by _agree, on all processes
        return None, error


def _told(error: Exception | None) -> tuple[str, str] | None:
    return None if error is None else (type(error).__name__, str(error))
