"""The bench itself: turns, pairs, medians, bounds, and its trainings in small. Nothing here looks at a clock."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bench import two_ranks
from tests.bench.figures import Figure, bootstrap, ratio_of, table
from tests.bench.timing import TIMED, WARM, interleave, steps_for


def test_trainings_take_turns_block_by_block() -> None:
    order: list[str] = []

    def side(name: str) -> Callable[[Callable[[], bool]], str]:
        def train(step_end: Callable[[], bool]) -> str:
            for _ in range(steps_for(2)):
                order.append(name)
                assert step_end() is False
            return name.upper()

        return train

    seconds, results = interleave({"a": side("a"), "b": side("b")}, 2)
    block = WARM + TIMED
    assert "".join(order) == ("a" * block + "b" * block) * 3 + "ab"
    assert results == {"a": "A", "b": "B"}
    assert [len(blocks) for blocks in seconds.values()] == [2, 2]


@pytest.mark.parametrize("first", ["broken", "endless"])
def test_a_training_that_fails_ends_the_other_one(first: str) -> None:
    def broken(step_end: Callable[[], bool]) -> None:
        raise ValueError("no such model")

    def endless(step_end: Callable[[], bool]) -> None:
        while True:
            step_end()

    sides = {"broken": broken, "endless": endless}
    with pytest.raises(ValueError, match="no such model"):
        interleave({first: sides.pop(first)} | sides, 2)


def test_the_ratio_is_the_median_of_pairs_and_not_the_ratio_of_medians() -> None:
    figure = ratio_of("step", [1.0, 4.0, 9.0], [2.0, 1.0, 3.0], ("ours", "theirs"), most=3.0)
    assert figure.value == 3.0  # of 0.5, 4, 3; the medians are 4 and 2
    assert figure.interval == (0.5, 4.0)
    assert figure.samples == {"ours seconds": [1.0, 4.0, 9.0], "theirs seconds": [2.0, 1.0, 3.0]}


def test_the_interval_brackets_the_median_and_closes_on_equal_values() -> None:
    assert bootstrap([2.0] * 5) == (2.0, 2.0)
    low, high = bootstrap([float(i) for i in range(1, 16)])
    # Order statistics of 15: P(median below the 4th) is 2.4 % by the binomial of a resample.
    assert 4.0 <= low <= 5.0
    assert 11.0 <= high <= 12.0


@pytest.mark.parametrize(("value", "holds"), [(0.97, False), (0.98, True), (1.02, True), (1.03, False)])
def test_a_bound_includes_its_ends(value: float, holds: bool) -> None:
    figure = Figure("share", value, "x", most=1.02, least=0.98)
    assert figure.holds is holds
    assert ("does not hold" in table([figure])) is not holds
    assert figure.to_json()["holds"] is holds


@pytest.mark.parametrize(("value", "holds"), [(1.49, False), (1.5, True), (9.0, True)])
def test_a_bound_may_be_a_lower_one_alone(value: float, holds: bool) -> None:
    figure = ratio_of("speed", [value], [1.0], ("two", "one"), least=1.5, measured="rows per second")
    assert figure.holds is holds
    assert figure.cells()[4] == "at least 1.5 x"
    assert figure.samples == {"two rows per second": [value], "one rows per second": [1.0]}
    assert figure.to_json()["most"] is None


def test_a_figure_without_a_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="share: a figure without a bound"):
        Figure("share", 1.0, "x")


def test_torch_is_not_here_while_the_memory_of_a_child_is_measured(root: Path) -> None:
    code = "import sys, tests.bench.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_one_process_and_two_ranks_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    worlds: list[int] = []

    def seconds_per_step(world: int) -> float:
        worlds.append(world)
        return 4.0 / world

    monkeypatch.setattr(two_ranks, "cores", lambda: [2, 5])
    monkeypatch.setattr(two_ranks, "seconds_per_step", seconds_per_step)
    (figure,) = two_ranks.two_ranks(7)
    assert worlds == [1, 2] * two_ranks.MOST_REPEATS
    assert figure.value == 2.0
    assert figure.samples["one process rows per second"] == [two_ranks.BATCH / 4.0] * two_ranks.MOST_REPEATS


def test_on_one_core_two_ranks_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(two_ranks, "cores", lambda: [3])
    assert two_ranks.two_ranks(1) == []
    assert "need two cores, and this process may use 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("child", "error"),
    [
        ("sys.exit('no such model')", "2 processes exited 1:\nno such model"),
        ("open(sys.argv[2] + '/0.json', 'w').write('{\"processes\": 1}')", "asked for 2 processes, trained on 1"),
    ],
)
def test_two_ranks_that_fail_or_are_one_are_an_error(monkeypatch: pytest.MonkeyPatch, child: str, error: str) -> None:
    monkeypatch.setitem(two_ranks.SIDES, 2, [sys.executable, "-c", f"import sys; {child}"])
    with pytest.raises(RuntimeError, match=error):
        two_ranks.seconds_per_step(2)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bench's Llama with a hidden size of 16."""
    from tests.bench import training

    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    shape = {"vocab_size": 1024, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2} | heads
    monkeypatch.setattr(training, "SHAPE", shape)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["sft_no_methods", "lora"])
def test_a_stage_and_bare_trl_run_against_each_other(name: str) -> None:
    from tests.bench import training

    (figure,) = getattr(training, name)(1)
    assert {side: len(seconds) for side, seconds in figure.samples.items()} == {"cpt seconds": 1, "trl seconds": 1}


@pytest.mark.usefixtures("small")
def test_half_fine_tuning_holds_state_for_what_it_reports() -> None:
    from tests.bench import training

    _, frozen, reported = training.half_fine_tuning(1)
    assert frozen.value < 0.5
    assert reported.value == pytest.approx(1.0, abs=0.02)


@pytest.mark.usefixtures("small")
def test_rewarded_sides_sample_the_same_completions() -> None:
    from tests.bench import rewarded

    (figure,) = rewarded.rft_no_methods(1)
    assert {side: len(seconds) for side, seconds in figure.samples.items()} == {"cpt seconds": 1, "trl seconds": 1}


@pytest.mark.usefixtures("small")
def test_rewarded_sides_that_share_random_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.bench import rewarded

    def shared_state(step_end: Any) -> Any:
        return step_end

    monkeypatch.setattr(rewarded, "own_random_state", shared_state)
    with pytest.raises(RuntimeError, match="sampled different completions"):
        rewarded.rft_no_methods(1)
