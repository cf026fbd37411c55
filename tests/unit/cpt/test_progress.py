"""What a run says of a stage in training: how far, the loss and the methods' terms by name, pace, time left."""

from itertools import count

import pytest

from cpt.progress import StageProgress, counting, duration, still


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Moves:
    """A voice that has a line which moves."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.moved: list[tuple[str, int, int, str]] = []
        self.stilled = 0

    def __call__(self, line: str) -> None:
        self.lines.append(line)

    def moving(self, name: str, done: int, total: int, text: str, left: str = "") -> None:
        self.moved.append((name, done, total, "  ".join(part for part in (text, left) if part)))

    def still(self) -> None:
        self.stilled += 1


def test_lines_tell_share_step_loss_terms_pace_and_time_left() -> None:
    said, clock = list[str](), Clock()
    progress = StageProgress("two", {"ewc"}, said.append, clock)
    progress.at(0, 100)
    for step in (10, 20, 30, 40):
        clock.now = step * 1.0
        progress.at(step, 100)
        progress.log({"step": step, "loss": 1 / step, "ewc/pull": 0.5, "entropy": 9.0, "num_tokens": 2000.0 * step})
    assert said == [
        "   10%  step 10 of 100  loss 0.1  ewc/pull 0.5  1:30 left",
        "   20%  step 20 of 100  loss 0.05  ewc/pull 0.5  2,000 tokens/s  1:20 left",
        "   40%  step 40 of 100  loss 0.025  ewc/pull 0.5  2,000 tokens/s  1:00 left",
    ]


def test_a_slow_stage_says_a_line_a_minute() -> None:
    said, clock = list[str](), Clock()
    progress = StageProgress("two", (), said.append, clock)
    progress.at(0, 10_000)
    for step in range(1, 9):
        clock.now = step * 25.0
        progress.log({"step": step, "loss": 1.0})
    assert [line.split()[2] for line in said] == ["1", "4", "7"]


def test_a_stage_that_goes_on_counts_its_own_pace() -> None:
    voice, clock = Moves(), Clock()
    progress = StageProgress("two", (), voice, clock)
    progress.at(80, 100)  # from the checkpoint
    clock.now = 10.0
    progress.at(85, 100)
    assert voice.moved == [("two", 80, 100, ""), ("two", 85, 100, "0:30 left")]


def test_a_line_that_moves_takes_the_place_of_lines() -> None:
    voice, clock = Moves(), Clock()
    progress = StageProgress("two", (), voice, clock)
    for step in range(4):
        clock.now = float(step)
        progress.at(step, 3)
        progress.log({"step": step, "loss": 0.5, "reward": 0.25, "kl": None})
    progress.end()
    assert voice.lines == []
    assert voice.moved[2] == ("two", 2, 3, "loss 0.5  reward 0.25  0:01 left")
    assert voice.moved[3] == ("two", 3, 3, "loss 0.5  reward 0.25")
    assert voice.stilled == 1


def test_the_trainers_closing_line_has_no_loss_and_is_not_told() -> None:
    said = list[str]()
    progress = StageProgress("two", (), said.append, Clock())
    progress.at(0, 1)
    progress.log({"step": 1, "train_runtime": 2.0, "train_loss": 0.1})
    assert said == []


def test_counting_moves_a_line_only_where_one_can() -> None:
    voice = Moves()
    tell = counting("measuring", voice)
    assert tell is not None
    tell(3, 7)
    assert voice.moved == [("measuring", 3, 7, "")]
    still(voice)
    assert voice.stilled == 1
    assert counting("measuring", print) is None
    still(print)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0:00"),
        (65, "1:05"),
        (3600, "1:00:00"),
        (7205, "2:00:05"),
        (86400, "1 day 0:00:00"),
        (180_005, "2 days 2:00:05"),
    ],
)
def test_durations_read_like_clocks(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_pace_is_never_divided_by_no_time() -> None:
    said, clock = list[str](), Clock()
    progress = StageProgress("two", (), said.append, clock)
    progress.at(0, 2)
    tokens = count(100, 100)
    for step in (1, 2):
        progress.log({"step": step, "loss": 1.0, "num_tokens": next(tokens)})
    assert said == ["   50%  step 1 of 2  loss 1", "  100%  step 2 of 2  loss 1"]
