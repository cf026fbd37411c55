"""How findings look: at most 80 columns, words before colours, or JSON."""

import os
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from cpt.doctor import Examination
from cpt.doctor.line import Line

WIDTH = 80
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "not here": "dim"}
_INDENT = " " * (2 + len("not here") + 2 + len("shared memory") + 2)


def block(line: Line, width: int = WIDTH) -> str:
    """One finding: status, name, what was measured, and below it what to do and what needs it."""
    head = f"  {line.status.upper() if line.status == 'fail' else line.status:8}  {line.name:13}  "
    first, *more = (line.found or "-").split("\n")
    parts = [_wrapped(head, first, width), *(_wrapped(_INDENT, part, width) for part in more)]
    if line.status != "ok" and line.needed_by:
        parts.append(_wrapped(_INDENT, f"needed by {', '.join(line.needed_by)}", width))
    if line.advice and line.status != "ok":
        parts.append(_wrapped(_INDENT, f"-> {line.advice}", width, hanging=3))
    return "\n".join(parts)


def _wrapped(head: str, text: str, width: int, hanging: int = 0) -> str:
    """A word that is longer than the line (a path) stays whole."""
    follow = _INDENT + " " * hanging
    keep = {"break_long_words": False, "break_on_hyphens": False}
    lines = textwrap.wrap(text, width, initial_indent=head, subsequent_indent=follow, **keep)  # type: ignore[arg-type]
    return "\n".join(lines) or head.rstrip()


def verdict(examination: Examination) -> str:
    """The last lines: how many of each, what was left out, and whether the stream, or anything, can run."""
    count = {status: sum(line.status == status for line in examination.lines) for status in _STYLES}
    words = {"ok": "ok", "warn": "to know of", "fail": "failed", "not here": "not here"}
    said = [", ".join(f"{n} {words[status]}" for status, n in count.items() if n)]
    if examination.left_out:
        why = f"not needed by {examination.stream.name}" if examination.stream else "left out by --quick"
        said.append(f"{why}: {', '.join(examination.left_out)}")
    reasons = examination.reasons()
    subject = examination.stream.name if examination.stream else "a stream"
    if reasons:
        said.append(f"{subject} cannot run here: {', '.join(line.name for line in reasons)}")
    else:
        said.append(f"{subject} can run here")
    return "\n".join(part for one in said for part in textwrap.wrap(one, WIDTH))


def as_json(examination: Examination) -> dict[str, Any]:
    """Every line and the verdict, once all checks are made."""
    return {
        "stream": examination.stream.name if examination.stream else None,
        "folder": str(examination.at.folder),
        "lines": [asdict(line) for line in examination.lines],
        "left_out": examination.left_out,
        "reasons": [line.name for line in examination.reasons()],
    }


def shown(examination: Examination, lines: Iterable[Line]) -> None:
    """Print each line as it is known, and the verdict; on a terminal with colour, and what is being tried below."""
    from rich.console import Console
    from rich.text import Text

    seen = sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")  # FORCE_COLOR: a file is a file
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, force_terminal=seen)
    width = min(WIDTH, console.width)
    with console.status("", spinner="dots") as status:
        names = iter(check.name + " (may take a minute)" * check.slow for check in examination.checks)
        status.update(f"trying {next(names, '')}")
        for line in lines:
            text = Text(block(line, width))
            text.stylize(_STYLES[line.status], 2, 2 + len(line.status))
            console.print(text)
            status.update(f"trying {next(names, 'nothing more: cleaning up')}")
    console.print(Text(verdict(examination)))
