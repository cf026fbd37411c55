"""What a check finds, and what is known of a check before it runs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from cpt.config import Stream

Status = Literal["ok", "warn", "fail", "not here"]


@dataclass(frozen=True)
class Line:
    """One finding: what was measured, and the sentence, with its command, that mends what is wrong.

    found: several problems stand on lines of their own. needed_by: places of the stream that need this to be ok.
    """

    status: Status
    found: str
    advice: str | None = None
    name: str = ""
    seconds: float = 0.0
    needed_by: tuple[str, ...] = ()


def ok(found: str) -> Line:
    """It works."""
    return Line("ok", found)


def warn(found: str, advice: str) -> Line:
    """It works, and something about it will be felt."""
    return Line("warn", found, advice)


def fail(found: str, advice: str) -> Line:
    """It does not work."""
    return Line("fail", found, advice)


def absent(found: str, advice: str | None = None) -> Line:
    """It is not on this machine, and only some uses need it."""
    return Line("not here", found, advice)


@dataclass(frozen=True)
class Check:
    """One thing to try. It runs in a child process that is killed after `limit_s` seconds.

    advice: what to do when it raises, crashes or hangs. every_use: no stream runs where this fails. slow: left out by
    --quick. alone: in a process of its own, which sees one device and starts while the others are tried. of_stream: it
    is there because of the stream, which cannot run where it fails.
    """

    name: str
    function: Callable[[], Line]
    advice: str
    limit_s: float = 30.0
    every_use: bool = False
    slow: bool = False
    alone: bool = False
    of_stream: bool = False


@dataclass(frozen=True)
class At:
    """What checks work on: a folder on the disk of runs, one in it that is removed at the end, the stream if any."""

    folder: Path
    scratch: Path
    stream: "Stream | None" = None
