"""What a run writes to a terminal and to a file, with real processes and a real pseudo-terminal."""

import fcntl
import json
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.e2e.processes import cpt

pytestmark = pytest.mark.e2e

STREAM = Path(__file__).with_name("stream.yaml")
LONG = ("training.max_steps=400", "evaluation.within=off")
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"  # the cursor
COLOUR = re.compile(r"\x1b\[(3|9)\d")
SHOWS_STEPS = re.compile(rb"[1-9]\d*/400")


def on_a_terminal(arguments: list[str], folder: Path, presses: int, **environment: str) -> tuple[int, str, bool]:
    """(exit code, output, whether the terminal's modes are as before) of cpt on 80 columns.

    presses: how often Ctrl-C is typed once a stage is seen to train.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.environ |= {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"} | environment
        os.execv(sys.executable, [sys.executable, "-m", "cpt", *arguments])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    before, written, pressed = termios.tcgetattr(terminal), b"", 0
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                piece = os.read(terminal, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            written += piece
        if pressed < presses and SHOWS_STEPS.search(written):
            os.write(terminal, b"\x03")
            pressed += 1
            time.sleep(0.02)
    after = termios.tcgetattr(terminal)
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), written.decode(), before == after


def test_ctrl_c_twice_leaves_the_terminal_sane(tmp_path: Path) -> None:
    code, written, same = on_a_terminal(["run", str(STREAM), *LONG], tmp_path, presses=2)
    assert code == 130, written[-2000:]
    assert same
    assert written.count(HIDE) == written.count(SHOW) > 0
    assert written.rfind(SHOW) > written.rfind(HIDE)
    assert "stopping at the next safe point; Ctrl-C again stops at once" in written
    assert "error: stopped" in written
    assert "Traceback" not in written
    assert COLOUR.search(written)


def test_no_color_and_one_ctrl_c(tmp_path: Path) -> None:
    code, written, same = on_a_terminal(["run", str(STREAM), *LONG], tmp_path, presses=1, NO_COLOR="1")
    assert code == 130, written[-2000:]
    assert same
    assert "with a checkpoint written" in " ".join(written.split())
    assert not COLOUR.search(written)
    assert written.count(HIDE) == written.count(SHOW) > 0
    assert list(tmp_path.glob("runs/*/stages/01_reverse/checkpoints/*/SEAL.json"))


def test_a_file_holds_no_control_characters(tmp_path: Path) -> None:
    few = ("training.max_steps=4", "stages.stories.training.max_steps=4", "training.logging_steps=2")
    code, written = cpt(["run", str(STREAM), *few], tmp_path)
    assert code == 0, written
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", written)
    assert re.search(r"^\d\d:\d\d:\d\d \[2/2\] stories: pretrain from 01_reverse$", written, re.MULTILINE)
    assert re.search(r"^\d\d:\d\d:\d\d +100%  step 4 of 4  loss \d\S*", written, re.MULTILINE)
    assert re.search(r"^\d\d:\d\d:\d\d     after stories  .* now  change", written, re.MULTILINE)


def test_tensorboard_keeps_a_folder_per_stage(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    few = ("training.max_steps=4", "stages.stories.training.max_steps=4", "training.report_to=tensorboard")
    code, written = cpt(["run", str(STREAM), *few, "evaluation.within=off"], tmp_path)
    assert code == 0, written
    for stage in ("01_reverse", "02_stories"):
        (folder,) = tmp_path.glob(f"runs/*/stages/{stage}")
        events = reader.EventAccumulator(str(folder / "tensorboard")).Reload()
        logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [round(event.value, 4) for event in events.Scalars("train/loss")] == [
            round(line["loss"], 4) for line in logged if "loss" in line
        ]
