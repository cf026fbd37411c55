"""How the command line speaks, on a terminal and into a file."""

import io
import os
import re

import pytest

from cpt.terminal import Marked, Plain, Terminal, speaking


class Screen(io.StringIO):
    """A terminal to write to."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """80 columns of colour, whatever the tests run in."""
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Screen()


LINE = Marked.of("sums  +12.5  better", [(6, 11, "better")])


def test_a_file_gets_the_time_of_day_and_no_control_character() -> None:
    file = io.StringIO()
    say = Plain(file)
    say(LINE)
    say("one\ntwo")
    lines = file.getvalue().splitlines()
    assert [line[9:] for line in lines] == ["sums  +12.5  better", "one", "two"]
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", file.getvalue())


def test_a_reader_who_leaves_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """As `cpt run quickstart | head -2`: a training must not end because nobody reads along."""
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream:
        say = Plain(stream)
        say("one")
        os.close(read)
        for line in ("two", "three"):
            say(line)
    assert capsys.readouterr().err == "nobody reads the output any more: it goes on without\n"


def test_a_terminal_colours_what_is_marked(screen: Screen) -> None:
    Terminal(screen)(LINE)
    assert screen.getvalue() == "sums  \x1b[32m+12.5\x1b[0m  better\n"


def test_no_color_is_obeyed(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    Terminal(screen)(LINE)
    assert screen.getvalue() == "sums  +12.5  better\n"


def test_what_looks_like_markup_is_said_as_it_is(screen: Screen) -> None:
    Terminal(screen)("[bold]stage[/bold] :smile: [1/3]")
    assert screen.getvalue() == "[bold]stage[/bold] :smile: [1/3]\n"


def test_long_lines_break_between_words_and_stand_further_in(screen: Screen) -> None:
    Terminal(screen)("  " + "word " * 20 + "/a/path/that-is-not-broken" * 4)
    lines = screen.getvalue().splitlines()
    assert lines[0] == "  " + " ".join(["word"] * 15)
    assert lines[1].startswith("    word")
    assert "/a/path/that-is-not-broken" * 4 in screen.getvalue()


def test_the_moving_line_goes_and_gives_the_cursor_back(screen: Screen) -> None:
    terminal = Terminal(screen)
    for done in range(3):
        terminal.moving("reverse", done, 2, "loss 0.5  1:05 left")
        terminal.drawn = 0.0
    assert "\x1b[?25l" in screen.getvalue()
    assert "loss 0.5  1:05 left" in screen.getvalue()
    terminal.still()
    terminal.still()
    assert screen.getvalue().count("\x1b[?25h") == 1
    assert screen.getvalue().endswith("\x1b[2K")
    assert max(map(len, re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())))) <= 80


def test_many_terms_give_way_to_steps_and_time_left(screen: Screen) -> None:
    terminal = Terminal(screen)
    terms = "  ".join(f"method{i}/penalty 0.000{i}" for i in range(6))
    for done in (10, 20):
        terminal.moving("reverse", done, 100, f"loss 3.615  {terms}", "1:05 left")
        terminal.drawn = 0.0
    terminal.still()
    line = next(part for part in re.split(r"[\r\n]", plain(screen)) if "20/100" in part)
    assert line.startswith("reverse")
    assert "loss 3.615" in line
    assert "\u2026" in line
    assert line.rstrip().endswith("1:05 left")
    assert len(line) <= 80


def plain(screen: Screen) -> str:
    """What was written, without its control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())


def test_lines_that_stay_stand_above_the_one_that_moves(screen: Screen) -> None:
    terminal = Terminal(screen)
    terminal.moving("reverse", 1, 2, "")
    terminal("a note")
    terminal.still()
    assert "a note\n" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())


@pytest.mark.parametrize("ended", [None, KeyboardInterrupt, ValueError])
def test_whatever_ends_a_command_the_line_is_taken_away(screen: Screen, ended: type[BaseException] | None) -> None:
    def command() -> None:
        with speaking(screen) as say:
            assert isinstance(say, Terminal)
            say.moving("reverse", 1, 2, "")
            if ended:
                raise ended

    if ended:
        with pytest.raises(ended):
            command()
    else:
        command()
    assert screen.getvalue().rstrip("\x1b[12AK\r\n").endswith("\x1b[?25h")


def test_who_speaks(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    with speaking(screen) as say:
        assert isinstance(say, Terminal)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as CI sets it: still a file
    with speaking(io.StringIO()) as say:
        assert isinstance(say, Plain)
    monkeypatch.setenv("TERM", "dumb")
    with speaking(screen) as say:
        assert isinstance(say, Plain)
