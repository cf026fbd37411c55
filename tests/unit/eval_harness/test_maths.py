"""Mathematical results: what is announced, what is equal in notation and in value, and what takes too long."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval_harness.metrics import maths
from eval_harness.metrics.verifier import EQUAL, NOTHING_FOUND, UNEQUAL, UNREADABLE, Verifier

ENDLESS = "9^{9^{9^9}}"  # has more digits than there are atoms


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("so it is \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{3}, no: $\\boxed{ 4 }$", "4"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),  # escaped braces are no brackets
        ("\\fbox{5}", "5"),
        ("\\boxed{5", None),  # cut off
        ("\\boxed{}", None),
        ("steps\n#### 18\nQuestion: more", "18"),
        ("#### 3\n#### 4", "4"),
        ("####", None),
        ("The answer is 18.", "18"),
        ("the final Answer is: $3.50. So he pays", "$3.50"),
        ("the answer is 3\nthe answer is 4\n", "4"),
        ("The answer is \\boxed{4}. The answer is right.", "4"),
        ("#### 5, the answer is 6", "5, the answer is 6"),
        ("it is 18", None),
        ("", None),
        ("\\boxed{" + "1" * 1001 + "}", None),
    ],
)
def test_announced(text: str, result: str | None) -> None:
    assert maths.announced(text) == result


@pytest.mark.parametrize(
    ("prediction", "reference", "strict", "lenient"),
    [
        ("#### 18", "18", 1, 1),
        ("\\boxed{18}", "steps = 18\n#### 18", 1, 1),
        ("The answer is $1,234.", "1234", 1, 1),
        ("The answer is 5.0", "5", 1, 1),
        ("**The answer is 18.**", "18", 1, 1),
        ("\\boxed{\\dfrac12}", "\\frac{1}{2}", 1, 1),
        ("\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}", "(3,\\frac{\\pi}{2})", 1, 1),
        ("\\boxed{90^\\circ}", "90", 1, 1),
        ("\\boxed{\\text{Evelyn}}", "\\text{Evelyn}", 1, 1),
        ("\\boxed{Evelyn}", "\\text{Evelyn}", 1, 1),
        ("\\boxed{\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", 1, 1),
        # said, not as asked: drift
        ("so he has 18 apples", "18", 0, 1),
        ("18", "18", 0, 1),
        ("it is −5", "-5", 0, 1),
        ("\\boxed{0.5}", "\\frac{1}{2}", 0, 1),
        ("The answer is 3 - 13x", "-13x+3", 0, 1),
        ("we get $3-13x$", "-13x+3", 0, 1),
        ("\\boxed{x=5}", "5", 0, 1),
        ("\\boxed{18 apples}", "18", 0, 1),
        ("\\boxed{2, 1}", "1, 2", 0, 1),
        ("ten", "ten", 0, 1),
        # wrong
        ("#### 17, or was it 18", "18", 0, 0),
        ("18, no: \\boxed{17}", "18", 0, 0),
        ("\\boxed{(1, 234)}", "1234", 0, 0),
        ("\\boxed{net}", "ten", 0, 0),  # words are no products of letters
        ("\\boxed{eleven}", "7", 0, 0),
        ("seven", "7", 0, 0),
        ("", "7", 0, 0),
        ("\0 \ud800", "7", 0, 0),
        # no reference
        ("7", "", None, None),
        ("7", " \n", None, None),
        ("7", "so \\boxed{}", None, None),
        ("7", "####", None, None),
    ],
)
def test_strict_and_lenient(prediction: str, reference: str, strict: float | None, lenient: float | None) -> None:
    assert maths.math_strict(prediction, reference) == strict
    assert maths.math_lenient(prediction, reference) == lenient


def test_a_reference_of_which_nothing_can_be_read_is_undefined() -> None:
    verifier = Verifier()
    try:
        assert verifier.ask("no numbers", "7") == UNREADABLE
        assert verifier.ask("\\boxed{7}", "no numbers") == NOTHING_FOUND
        assert verifier.ask("\\boxed{7}", "no numbers", "it is 7") == EQUAL
        assert verifier.ask("\\boxed{7}", "8", "it is 7") == UNEQUAL  # the first that can be read decides
    finally:
        verifier.close()


@given(st.integers(-(10**9), 10**9), st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_a_result_is_itself_and_not_its_neighbour(value: int, off: int) -> None:
    for said in ("\\boxed{%s}", "#### %s", "The answer is %s.", "so he has %s left"):
        assert maths.math_lenient(said % f"{value:,}", str(value)) == 1.0
        assert maths.math_lenient(said % value, str(value + off)) == 0.0


@given(
    st.text(alphabet="\\boxed{}#answer is0123./^$()-, \n", max_size=40), st.text(alphabet="\\frac{}12x+", max_size=9)
)
@settings(max_examples=40, deadline=None)
def test_strict_is_never_above_lenient_and_nothing_raises(prediction: str, reference: str) -> None:
    strict, lenient = maths.math_strict(prediction, reference), maths.math_lenient(prediction, reference)
    assert strict in (0.0, 1.0, None)
    assert lenient in (0.0, 1.0, None)
    assert lenient is None or (strict is not None and strict <= lenient)


# ---- time, processes, threads -----------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[Verifier]:
    """A verifier with 0.4 seconds of CPU for an item."""
    monkeypatch.setattr("eval_harness.metrics.verifier.CPU_SECONDS", 0.4)
    verifier = Verifier()
    yield verifier
    verifier.close()


def test_an_item_that_takes_years_is_given_up_and_said(impatient: Verifier, caplog: pytest.LogCaptureFixture) -> None:
    began = time.monotonic()
    assert impatient.ask("\\boxed{7}", f"\\boxed{{{ENDLESS}}}") == UNEQUAL
    assert time.monotonic() - began < 30  # seconds of a busy machine, not years
    assert "not decided within 0.4 s" in caplog.text
    assert ENDLESS in caplog.text
    assert impatient.ask("\\boxed{7}", "\\boxed{7.0}") == EQUAL


def test_a_reference_that_takes_years_is_undefined(impatient: Verifier) -> None:
    nested = "(" * 900
    assert impatient.ask(f"\\boxed{{{nested}}}", "7") is None
    assert impatient.ask("\\boxed{7}", "7") == EQUAL


def test_an_answer_that_was_interrupted_is_not_the_next_ones() -> None:
    verifier = Verifier()
    assert verifier.ask("\\boxed{7}", "8") == UNEQUAL

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            verifier.ask("\\boxed{7}", f"\\boxed{{{ENDLESS}}}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert verifier.ask("\\boxed{7}", "7") == EQUAL
    verifier.close()


def test_a_process_that_somebody_ended_is_started_again() -> None:
    verifier = Verifier()
    assert verifier.ask("\\boxed{7}", "7.0") == EQUAL
    process = verifier._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert verifier.ask("\\boxed{7}", "7.0") == EQUAL
    verifier.close()


def test_it_works_in_threads() -> None:
    found: dict[int, float | None] = {}

    def solve(number: int) -> None:
        found[number] = maths.math_lenient(f"so it is {number}", f"{number % 4}.0")

    threads = [threading.Thread(target=solve, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: float(number < 4) for number in range(8)}


def test_without_math_verify_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ImportError, match=r"broken here.*pip install math-verify"):
        Verifier().ask("\\boxed{7}", "7")


def test_importing_it_imports_no_sympy() -> None:
    import subprocess

    code = "import sys, eval_harness.metrics.maths; print([m for m in ('sympy', 'math_verify') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


# ---- research data ----------------------------------------------------------------------------------


def rows(path: Path, most: int) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(most), strict=False)]


def test_every_reference_is_right_by_its_own_solution(shared: Path) -> None:
    data = shared / "data" / "math"
    solved = [(row["solution"], row["answer"]) for row in rows(data / "math500.test.jsonl", 300)]
    solved += [(f"{r['solution']}\n#### {r['answer']}", r["answer"]) for r in rows(data / "gsm8k.test.jsonl", 500)]
    assert [pair for pair in solved if maths.math_strict(*pair) != 1.0] == []
    # Again by value alone, as of a prediction in another notation.
    answers = [row["answer"] for row in rows(data / "math500.test.jsonl", 100)]
    unequal = [one for one in answers if maths._decided(one, f"so it is ${one}$") != 1.0]
    assert len(unequal) <= 3, unequal
