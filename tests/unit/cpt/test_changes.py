"""The table after a stage: what it changed, by set, readable without colour."""

from typing import Any

from cpt.report.changes import changes
from cpt.report.summary import aligned


def result(value: float | None, stderr: float | None = 0.01, lower: bool = False) -> dict[str, Any]:
    measure = "bits_per_byte" if lower else "exact_match"
    return {measure: {"value": value, "stderr": stderr, "definition": f"{measure}/1", "higher_is_better": not lower}}


def matrix(*rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    names = ["base", "one", "two"]
    return {
        "tasks": ["one", "two"],
        "general": sorted({name for row in rows for name in row} - {"one", "two"}),
        "rows": [{"index": i, "stage": names[i], "scores": row} for i, row in enumerate(rows)],
        "summary": {},
    }


BASE = {"one": result(0.0), "two": result(0.0), "sums": result(0.9, 0.02), "text": result(1.0, 0.01, lower=True)}
ONE = {"one": result(0.95), "two": result(0.0), "sums": result(0.88, 0.02), "text": result(1.5, 0.01, lower=True)}
TWO = {"one": result(0.5), "two": result(0.9), "sums": result(0.88, 0.02), "text": result(1.2, 0.01, lower=True)}


def test_a_line_per_set_with_both_differences() -> None:
    assert changes(matrix(BASE, ONE, TWO), 2) == [
        "    after two                            now  change          since base",
        "    two        learned  exact_match     90.0   +90.0  better       +90.0",
        "    one        earlier  exact_match     50.0   -45.0  worse        +50.0",
        "    sums       general  exact_match     88.0     0.0                -2.0",
        "    text       general  bits_per_byte  1.200  -0.300  better      +0.200",
    ]


def test_what_the_items_cannot_tell_is_marked_and_said_once() -> None:
    lines = changes(matrix(BASE, ONE, TWO), 1)
    assert lines[2:] == [
        "    sums       general  exact_match     88.0    -2.0  ~             -2.0",  # 2 points, error 2.8
        "    text       general  bits_per_byte  1.500  +0.500  worse       +0.500",
        "    ~: within 1.96 standard errors of the difference",
    ]
    assert not any("two " in line for line in lines)  # not trained yet


def test_colour_says_what_the_words_say() -> None:
    learned, forgotten, same, text = changes(matrix(BASE, ONE, TWO), 2)[1:]
    assert [learned[b:e].strip() for b, e, style in learned.parts if style == "better"] == ["+90.0", "better"]
    assert [forgotten[b:e].strip() for b, e, style in forgotten.parts if style == "worse"] == ["-45.0", "worse"]
    assert same.parts == ()
    assert {style for *_, style in text.parts} == {"better"}  # fewer bits a byte


def test_the_base_has_nothing_to_be_compared_with() -> None:
    assert changes(matrix(BASE), 0) == [
        "    after base                             now",
        "    one         to learn  exact_match      0.0",
        "    two         to learn  exact_match      0.0",
        "    sums        general   exact_match     90.0",
        "    text        general   bits_per_byte  1.000",
    ]
    assert changes(matrix(BASE), 1) == []


def test_undefined_scores_and_errors_leave_blanks() -> None:
    before = {"one": result(None), "sums": result(0.5, None)}
    now = {"one": result(0.5), "sums": result(0.75, None)}
    assert changes(matrix(before, now), 1) == [
        "    after one                         now  change  since base",
        "    one        learned  exact_match  50.0",
        "    sums       general  exact_match  75.0   +25.0       +25.0",
    ]


def test_of_many_sets_those_that_changed_most_are_shown() -> None:
    names = [f"set_{i:03d}_with_a_name_that_is_longer_than_a_line_of_a_terminal_has_room_for" for i in range(100)]
    before = {name: result(0.5) for name in names}
    now = {name: result(0.5 + i / 1000) for i, name in enumerate(names)}
    lines = changes(matrix(before, now), 1)
    assert len(lines) == 1 + 24 + 2
    assert lines[1].startswith("    set_076")
    assert lines[-2] == "    76 more sets changed less: matrix.json, or `cpt report`"
    assert max(map(len, lines)) <= 80


def test_columns_beyond_80_go_on_below_with_the_first_column() -> None:
    table = [["after stage", *(f"set_{i:06d}" for i in range(9))], ["base", *(str(i) for i in range(9))]]
    first, second = aligned(table).split("\n\n")
    assert max(map(len, first.splitlines())) <= 80
    assert first.splitlines()[1].split() == ["base", "0", "1", "2", "3", "4"]
    assert second.splitlines()[0].split() == ["after", "stage", "set_000005", "set_000006", "set_000007", "set_000008"]
    assert aligned([["a", "x" * 100], ["b", "y"]]).splitlines() == ["a  " + "x" * 100, "b  " + " " * 99 + "y"]
