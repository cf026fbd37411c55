"""The bench's own arithmetic: turns, pairs, medians, bounds. Nothing here looks at a clock's reading."""

from __future__ import annotations

from collections.abc import Callable

import pytest

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
