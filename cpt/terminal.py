"""How the command line speaks: lines that stay, and on a terminal one line below them that moves.

A function of a line is all that a run asks for (`say=print`). `Terminal` and `Plain` are such functions; a `Terminal`
also takes `moving`, and colours the parts of a `Marked` line. Without a terminal no control character is written.
"""

import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, TextIO

BAR, NAME = 8, 24  # columns of the moving line's bar, and of its name at most
STYLES = {"better": "green", "worse": "red", "head": "bold"}


class Marked(str):
    """A line some parts of which a terminal colours: (begin, end, "better" | "worse" | "head")."""

    parts: Sequence[tuple[int, int, str]] = ()

    @classmethod
    def of(cls, line: str, parts: Sequence[tuple[int, int, str]]) -> "Marked":
        """The line with its parts marked."""
        made = cls(line)
        made.parts = tuple(parts)
        return made


class Plain:
    """Lines with the time of day, for a file or a pipe. A reader who leaves (`| head`) does not end what is running."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout

    def __call__(self, line: str) -> None:
        stamp = f"{datetime.now():%H:%M:%S} "
        try:
            print("\n".join((stamp + part).rstrip() for part in line.split("\n")), file=self.stream, flush=True)
        except BrokenPipeError:
            # What is still in the buffer, and what others print, must find an open end.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
            print("nobody reads the output any more: it goes on without", file=sys.stderr, flush=True)


class Terminal:
    """Lines wrapped between words at the terminal's width, and one that moves below them; `NO_COLOR` is obeyed."""

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console

        self.console = Console(file=stream, highlight=False, markup=False, emoji=False)
        self.bar: Any = None

    def __call__(self, line: str) -> None:
        from rich.text import Text

        text = Text(line)
        for begin, end, style in getattr(line, "parts", ()):
            text.stylize(STYLES[style], begin, end)
        if text.cell_len > self.console.width and not isinstance(line, Marked):
            text = Text("\n".join(_wrapped(line, self.console.width)))
        self.console.print(text, soft_wrap=True)

    def moving(self, name: str, done: int, total: int, text: str, left: str = "") -> None:
        """Show how far something is; drawn at most four times a second. left: stands behind the text in any case."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
        from rich.table import Column

        if self.bar is None:
            # The text gives way on a narrow terminal; name, share, steps and time left stay.
            columns = (
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
                BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=BAR)),
                TaskProgressColumn(show_speed=False),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True, justify="right")),
            )
            self.bar = Progress(*columns, console=self.console, transient=True, auto_refresh=False, expand=True)
            self.bar.add_task(name, total=total, text=text)
            self.bar.start()
            self.drawn = 0.0
        given = min(len(name), NAME) + BAR + len(f"100% {total}/{total}  {left}") + 6
        said = "  ".join(part for part in (_cut(text, self.console.width - given), left) if part)
        self.bar.update(self.bar.task_ids[0], description=_cut(name, NAME), completed=done, total=total, text=said)
        if (now := self.console.get_time()) - self.drawn >= 0.25:
            self.drawn = now
            self.bar.refresh()

    def still(self) -> None:
        """Take the moving line away and give the cursor back."""
        bar, self.bar = self.bar, None
        if bar is not None:
            bar.stop()


def _cut(text: str, room: int) -> str:
    """The text, or as many of its whole parts (two spaces between them) as there is room for."""
    if len(text) <= room:
        return text
    parts = text.split("  ")
    while parts and len("  ".join(parts)) + 3 > room:
        parts.pop()
    return "  ".join([*parts, "\u2026"]) if parts else text[: max(0, room - 1)] + "\u2026" * (room > 0)


def _wrapped(line: str, width: int) -> list[str]:
    """Broken between words; what follows stands two columns further in than the line began."""
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    long_words = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(line, width, subsequent_indent=indent, drop_whitespace=True, **long_words)  # type: ignore[arg-type]


@contextmanager
def speaking(stream: TextIO | None = None) -> Iterator[Callable[[str], None]]:
    """What a command says its lines through (to stdout); whatever ends the block, the terminal is left as it was."""
    stream = stream or sys.stdout
    if not stream.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
        yield Plain(stream)
        return
    terminal = Terminal(stream)
    try:
        yield terminal
    finally:
        terminal.still()
