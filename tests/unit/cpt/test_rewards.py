"""Rewards: what they score, what they make of huge and hostile completions, what a stage does with a failing one."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from cpt.errors import ConfigError, Stopped, TrainingError
from cpt.rewards import exact_match, format, math, numeric, text
from cpt.rewards.scoring import Scored
from cpt.rewards.spec import BUNDLED, Reward, StageReward, columns, identity, label, resolve
from eval_harness.metrics import text as patterns

HUGE, LONG = 10_000_000, 2_000_000  # characters
in_a_minute = pytest.mark.timeout(60)  # what backtracks, or is quadratic in a text, does not come back in days


def says(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "13"}, {"role": "assistant", "content": text}]


# ---- numeric ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("7", "7", 1),
        ("The answer is 7.", "7", 1),
        ("3 + 4 = 7", "7", 1),
        ("3 + 4 = 7, not 8", "7", 0),
        ("1,234,567.50 dollars", "1234567.5", 1),
        ("-$12", "-12", 1),
        ("−12", "-12", 1),
        ("10-3", "3", 1),  # an operator
        ("10 -3", "-3", 1),  # a sign
        ("pages 5-7", "7", 1),
        ("+5", "5", 1),
        (".5", "0.5", 1),
        ("2.5e3", "2500", 1),
        ("1E-3", "0.001", 1),
        ("1,23", "23", 1),  # a list, no thousands
        ("1234,567", "567", 1),
        ("1,2345", "2345", 1),
        ("50%", "50", 1),
        ("0.1000001", "0.1", 1),  # within 1e-6
        ("0.10001", "0.1", 0),
        ("9007199254740993", "9007199254740993", 1),  # 2**53 + 1, which no float is
        ("9007199254740992", "9007199254740993", 0),
        ("1e999", "1e999", 1),
        ("1e999", "2e999", 0),
        ("1e99999999999999999999999", "1", 0),
        ("nan", "1", 0),
        ("inf", "1e999", 0),
        ("seven", "7", 0),
        ("", "7", 0),
        ("e", "7", 0),
        ("7", "so 3 + 4 = 7\n#### 7", 1),  # GSM8K's way to write a reference
        ("-0", "0", 1),
    ],
)
def test_numeric(completion: str, answer: str, score: float) -> None:
    assert numeric([completion, says(completion)], [answer, answer]) == [score, score]


def test_numeric_options() -> None:
    two, one = ["first 3, then 4"], ["only 4"]
    assert numeric(two, ["3"], position="first") == [1.0]
    assert numeric(two, ["4"], position="last") == [1.0]
    assert numeric(two, ["4"], position="only") == [0.0]
    assert numeric(one, ["4"], position="only") == [1.0]
    assert numeric(["4.5", "4.6"], ["4", "4"], tolerance=0.5) == [1.0, 0.0]
    assert numeric(["4", "4.0000001"], [4, 4], tolerance=0) == [1.0, 0.0]
    with pytest.raises(ValueError, match="must be last, first or only"):
        numeric(one, ["4"], position="middle")  # type: ignore[arg-type]


@pytest.mark.parametrize("answer", ["", "three", "3/4", "12 of 30", "1e9999999999999999999999"])
def test_a_reference_that_is_not_one_number_is_an_error(answer: str) -> None:
    with pytest.raises(ValueError, match="is not one number"):
        numeric(["4"], [answer])


def test_a_row_without_a_reference_is_not_scored() -> None:
    assert numeric(["4", "4"], [None, "4"]) == [None, 1.0]
    assert exact_match(["4", "4"], [None, "4"]) == [None, 1.0]


WORDS = st.text(alphabet="abxyz:=() \n", min_size=1, max_size=5).map(lambda word: f" {word} ")
NUMBERS = st.one_of(
    st.integers(-(10**40), 10**40).map(lambda n: (str(n), Fraction(n))),
    st.integers(-(10**12), 10**12).map(lambda n: (f"{n:,}", Fraction(n))),
    st.decimals(allow_nan=False, allow_infinity=False, places=4, min_value=-(10**9), max_value=10**9).map(
        lambda d: (str(d), Fraction(d))
    ),
    st.tuples(st.integers(-999, 999), st.integers(-20, 20)).map(
        lambda p: (f"{p[0]}e{p[1]}", Fraction(p[0]) * Fraction(10) ** p[1])
    ),
)


@given(st.lists(st.tuples(WORDS, NUMBERS), min_size=1, max_size=4), st.integers(1, 9))
def test_numbers_between_words_are_read_exactly(parts: list[tuple[str, tuple[str, Fraction]]], off: int) -> None:
    completion = "".join(word + written for word, (written, _) in parts) + " end"
    for position, (_, (written, value)) in (("first", parts[0]), ("last", parts[-1])):
        other = str(value.numerator + off) if value.denominator == 1 else str(value.numerator)
        assert numeric([completion], [written], position=position, tolerance=0) == [1.0]  # type: ignore[arg-type]
        assert numeric([completion], [other], position=position, tolerance=0) == [0.0]  # type: ignore[arg-type]
    assert numeric([completion], [parts[0][1][0]], position="only") == [float(len(parts) == 1)]


@in_a_minute
@pytest.mark.parametrize(
    "completion",
    [
        "1 " * (HUGE // 2),
        "9" * HUGE,
        "1e" + "9" * HUGE,
        "1e-" + "9" * HUGE,
        "1" + ",111" * (HUGE // 4),
        "1" + ",1111" * (LONG // 5),
        "1," * (LONG // 2),
        "1e" * (LONG // 2),
        "-" * LONG,
        "." * LONG,
        "$" * LONG,
    ],
    ids=lambda completion: completion[:8],
)
def test_numeric_scores_megabytes(completion: str) -> None:
    assert numeric([completion], ["7"]) == [0.0]


@in_a_minute
def test_a_million_digits_are_compared_to_the_last() -> None:
    digits = "9" * 10**6
    assert numeric([digits, digits[:-1] + "7"], [digits, digits]) == [1.0, 0.0]
    assert numeric(["1e999999999999"], ["1"]) == [0.0]  # no number of a trillion digits is made


# ---- math -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("so it is \\boxed{\\frac{1}{2}}.", "0.5", 1),
        ("The answer is 3 - 13x.", "-13x + 3", 1),
        ("18 apples are left", "so 20 - 2 = 18\n#### 18", 1),
        ("18, no: \\boxed{17}", "18", 0),
        ("\\boxed{\\frac{1}{3}}", "0.33", 0),
        ("seven", "7", 0),
        ("", "7", 0),
        ("7", 7, 1),  # rows may hold numbers
    ],
)
def test_math(completion: str, answer: Any, score: float) -> None:
    assert math([completion, says(completion), completion], [answer, answer, None]) == [score, score, None]


@pytest.mark.parametrize("answer", ["", "\\boxed{}", "####"])
def test_an_answer_without_mathematics_is_an_error(answer: str) -> None:
    with pytest.raises(ValueError, match="holds no mathematics: give a result, or use exact_match"):
        math(["7"], [answer])


@in_a_minute
def test_math_gives_up_what_takes_years_and_scores_megabytes(caplog: pytest.LogCaptureFixture) -> None:
    assert math(["\\boxed{9^{9^{9^9}}}", "\\boxed{7.0}"], ["7", "7"]) == [0.0, 1.0]
    assert "not decided within 3 s" in caplog.text
    assert math(["1 " * (LONG // 2), "\\boxed{" * (LONG // 7), "{" * LONG], ["7"] * 3) == [0.0] * 3


# ---- exact_match and format -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer", "options", "score"),
    [
        (" Paris\n", "Paris", {}, 1),
        ("paris", "Paris", {}, 0),
        ("STRASSE", "straße", {"ignore_case": True}, 1),
        ("", "Paris", {}, 0),
        ("so 3 + 4\n#### 7\n", "7", {"pattern": "#### (.*)"}, 1),
        ("7", "7", {"pattern": "#### (.*)"}, 0),
        ("#### 7 #### 8", "7", {"pattern": r"#### (\d)"}, 1),  # the first place
        ("no", "None", {"pattern": "no|(yes)"}, 0),  # a group that took no part
        ("Answer: PARIS.", "paris", {"pattern": r"Answer: (\w+)", "ignore_case": True}, 1),
        ("7", 7, {}, 1),  # rows may hold numbers
    ],
)
def test_exact_match(completion: str, answer: Any, options: dict[str, Any], score: float) -> None:
    assert exact_match([completion, says(completion)], [answer, answer], **options) == [score, score]


def test_format_wants_the_whole_completion() -> None:
    thought = r"(?s)<think>.*</think>\s*<answer>.*</answer>"
    good = "<think>three\nplus</think>\n<answer>7</answer>"
    assert format([good, says(good), f"{good} and", f" {good}", ""], pattern=thought) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert format(["", "a\nb"], pattern=".*") == [1.0, 0.0]


def test_the_text_of_a_completion() -> None:
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "4"}, {"type": "image"}, {"text": "2"}]}]
    call = [{"role": "assistant", "content": None, "tool_calls": []}]
    assert [text.text_of(c) for c in ("", [], parts, call, says("x"))] == ["", "", "42", "", "x"]


@in_a_minute
def test_ten_megabytes_match_a_pattern() -> None:
    long = f"<think>{'a' * HUGE}</think>"
    assert format([long, long[:-1]], pattern="<think>.*</think>") == [1.0, 0.0]
    assert exact_match(["#" * HUGE + " 7"], ["7"], pattern="#### (.*)") == [1.0]
    assert exact_match(["a" * HUGE], ["a"]) == [0.0]


@in_a_minute
@pytest.mark.parametrize(
    ("pattern", "completion"),
    [("(a|aa)+b", "a" * 80), (r"(a+)(a+)\1\2b", "a" * 5000), (r"(\s+)+x|\s+$y", " " * 100_000)],
)
def test_a_pattern_that_explodes_is_given_up(pattern: str, completion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "MATCH_SECONDS", 0.1)
    with pytest.raises(TimeoutError, match=r"undecided after 0\.1 s on [\d,]+ characters"):
        exact_match([completion], ["b"], pattern=f"(?:{pattern})()")
    scored = Scored(partial(format, pattern=f"{pattern}|ok"), "format", "sums")
    assert scored(["p"] * 3, ["ok", completion, "no"]) == [1.0, 0.0, 0.0]
    assert scored.raised == 1
    assert "TimeoutError" in str(scored.first_error)


CALLS: list[Callable[..., list[float | None]]] = [
    numeric,
    partial(numeric, position="only"),
    math,
    exact_match,
    partial(exact_match, pattern="(-?[0-9]+)", ignore_case=True),
    lambda completions, answer: list(format(completions, pattern="[0-9]+")),
]


@pytest.mark.parametrize("reward", CALLS)
@given(st.data())
def test_a_score_is_zero_or_one_and_a_function_of_its_row(reward: Any, data: st.DataObject) -> None:
    texts = st.text(alphabet="0123456789.,+-−eE$#: a\n\0٣", max_size=12)
    rows = data.draw(st.lists(st.tuples(texts, st.integers(-99, 99).map(str)), max_size=5))
    before = list(rows)
    alone = [reward([completion], [answer])[0] for completion, answer in rows]
    assert reward([c for c, _ in rows], [a for _, a in rows]) == alone
    assert set(alone) <= {0.0, 1.0}
    assert rows == before


# ---- as configuration -------------------------------------------------------------------------------


class Rewards(BaseModel):
    rewards: list[StageReward]


def problems(entry: Any) -> dict[str, str]:
    """Place -> sentence."""
    with pytest.raises(ValidationError) as caught:
        Rewards(rewards=[entry])
    return {".".join(map(str, e["loc"])): e["msg"] for e in caught.value.errors()}


def test_a_name_alone_has_every_default_written() -> None:
    (reward,) = Rewards(rewards=["numeric"]).rewards  # type: ignore[list-item]
    assert reward.model_dump() == {
        "type": "numeric",
        "name": None,
        "weight": 1.0,
        "arguments": {"tolerance": 1e-6, "position": "last"},
    }


@pytest.mark.parametrize(
    "entry",
    [
        "exact_match",
        "my_package.rewards:helpful",
        {"type": "my_package.rewards.helpful", "weight": -0.5, "arguments": {"words": ["a", 1, None]}},
        {"type": "format", "name": "boxed", "arguments": {"pattern": r"\\boxed\{.*\}"}},
    ],
)
def test_what_is_written_is_read_again(entry: Any) -> None:
    once = Rewards(rewards=[entry])
    assert Rewards.model_validate_json(once.model_dump_json()) == once


@pytest.mark.parametrize(
    ("entry", "place", "sentence"),
    [
        ("numerc", "type", r"Did you mean 'numeric'\? Known: exact_match, format, math, numeric"),
        ("a..b", "type", r"is no path of a function: .* my_package\.rewards:helpful"),
        ("a.b:", "type", "is no path"),
        ("a.b:c d", "type", "is no path"),
        ("a.class:b", "type", "is no path"),
        (7, "", "must be a reward's name or a mapping"),
        ({"weight": 1}, "type", "required"),
        ({"type": "numeric", "weight": 0}, "weight", "must not be 0"),
        ({"type": "numeric", "weight": float("nan")}, "weight", "finite"),
        ({"type": "numeric", "weight": float("inf")}, "weight", "finite"),
        ({"type": "numeric", "wait": 1}, "wait", "not permitted"),
        ({"type": "numeric", "arguments": {"tolerence": 1}}, "arguments.tolerence", "Did you mean 'tolerance'"),
        ({"type": "numeric", "arguments": {"tolerance": -1}}, "arguments.tolerance", "greater than or equal to 0"),
        ({"type": "numeric", "arguments": {"tolerance": float("inf")}}, "arguments.tolerance", "finite"),
        ({"type": "numeric", "arguments": {"position": "mid"}}, "arguments.position", "'last', 'first' or 'only'"),
        ({"type": "numeric", "arguments": {"answer": "7"}}, "arguments.answer", "It takes: tolerance, position"),
        (
            {"type": "math", "arguments": {"tolerance": 1}},
            "arguments.tolerance",
            "is no argument of math. It takes: nothing",
        ),
        ("format", "arguments.pattern", "is required"),
        ({"type": "format", "arguments": {"pattern": "(a"}}, "arguments.pattern", r"missing \)"),
        ({"type": "format", "arguments": {"pattern": "(" * 5000}}, "arguments.pattern", "no regular expression"),
        ({"type": "exact_match", "arguments": {"pattern": "a"}}, "arguments.pattern", "needs a group"),
        ({"type": "my.own", "arguments": {"day": object()}}, "arguments.day", "JSON"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(entry: Any, place: str, sentence: str) -> None:
    import re

    found = problems(entry)
    at = f"rewards.0.{place}".rstrip(".")
    assert list(found) == [at]
    assert re.search(sentence, found[at])


def test_several_problems_are_said_at_once() -> None:
    arguments = {"tolerance": -1, "position": "mid", "patern": 1}
    found = problems({"type": "numeric", "weight": 0, "arguments": arguments})
    assert set(found) == {f"rewards.0.{key}" for key in ("weight", *(f"arguments.{name}" for name in arguments))}


def test_labels() -> None:
    assert label(Reward(type="numeric")) == "numeric"
    assert label(Reward(type="my.rewards.helpful")) == "helpful"
    assert label(Reward(type="my.rewards:Judge.helpful")) == "helpful"
    assert label(Reward(type="numeric", name="sum")) == "sum"


def test_validation_imports_no_heavy_library_and_nothing_of_the_user() -> None:
    code = (
        "import sys; from cpt.rewards.spec import Reward; Reward(type='this.is_not:there'); Reward(type='numeric');"
        "print([m for m in ('torch', 'numpy', 'transformers', 'trl', 'sympy', 'this') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


# ---- a user's function ------------------------------------------------------------------------------

SOURCE = """
from functools import partial
def helpful(completions, *, scale=1.0, **columns):
    return [scale * len(c) for c in completions]
def judged(completions, answer, level, **columns):
    return [0.0] * len(completions)
def takes_all(**columns):
    return [0.0] * len(columns["completions"])
def positional(completions, /, **columns):
    return []
def stingy(completions, answer):
    return []
def without(prompts, *, answer, trainer_state):
    return []
class Judge:
    def __call__(self, completions, **columns):
        return [0.5] * len(completions)
    @staticmethod
    def strict(completions, **columns):
        return [0.25] * len(completions)
judge = Judge()
twice = partial(helpful, scale=2.0)
number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of a user's, on Python's path for one test."""
    package = tmp_path / "users_package"
    package.mkdir()
    (package / "__init__.py").write_text("from users_package.rewards import helpful\n")
    (package / "rewards.py").write_text(SOURCE)
    (package / "broken.py").write_text("1 / 0\n")
    (package / "needy.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "users_package.rewards"
    for name in [name for name in sys.modules if name.partition(".")[0] == "users_package"]:
        del sys.modules[name]


def test_a_path_becomes_a_function_with_its_arguments(module: str) -> None:
    call = {"prompts": ["p"], "completions": ["abc"], "completion_ids": [[1]], "answer": ["x"], "trainer_state": None}
    for path, arguments, expected in (
        (f"{module}:helpful", {}, 3.0),
        (f"{module}.helpful", {"scale": 0.5}, 1.5),
        ("users_package.helpful", {}, 3.0),
        (f"{module}:twice", {}, 6.0),
        (f"{module}:takes_all", {}, 0.0),
        (f"{module}:judge", {}, 0.5),
        (f"{module}:Judge.strict", {}, 0.25),
    ):
        assert resolve(Reward(type=path, arguments=arguments))(**call) == [expected], path


def test_an_argument_wins_over_a_column_of_its_name(module: str) -> None:
    """TRL passes every column of the rows: one called `scale` or `tolerance` must not change the reward."""
    scaled = resolve(Reward(type=f"{module}:helpful", arguments={"scale": 2}))
    assert scaled(completions=["ab"], scale=[9.0]) == [4.0]
    tolerant = resolve(Reward(type="numeric"))
    assert tolerant(completions=["1.5"], answer=["1"], tolerance=[9.0], position=["?"], pattern=["?"]) == [0.0]


@pytest.mark.parametrize(
    ("path", "arguments", "sentence"),
    [
        ("not_a_package.rewards:helpful", {}, "there is no module not_a_package: .*PYTHONPATH"),
        ("users_package.reward:helpful", {}, r"there is no module users_package\.reward:"),
        ("users_package.rewards.Judge.strict", {}, "there is no module users_package.rewards.Judge.*module:Class"),
        ("users_package.needy:helpful", {}, "fails: ModuleNotFoundError: No module named 'not_installed_anywhere'"),
        ("users_package.broken:helpful", {}, "importing users_package.broken fails: ZeroDivisionError"),
        ("{}:helpfull", {}, "has no helpfull. Did you mean 'helpful'"),
        ("{}:number", {}, "is a int, no function: def helpful"),
        ("{}:Judge", {}, "is a type, no function"),
        ("{}:positional", {}, "does not accept completions= by name"),
        ("{}:without", {}, "does not accept completions= by name"),
        ("{}:stingy", {}, r"needs \*\*columns"),
        ("{}:helpful", {"scal": 2}, "has no argument 'scal'. Did you mean 'scale'"),
        ("{}:helpful", {"completions": []}, "has no argument 'completions'. Its own: scale"),
    ],
)
def test_what_does_not_resolve_is_said(module: str, path: str, arguments: dict[str, Any], sentence: str) -> None:
    path = path.format(module)
    with pytest.raises(ConfigError, match=sentence) as caught:
        resolve(Reward(type=path, arguments=arguments), "stages.1.rewards.0")
    assert str(caught.value).startswith(f"stages.1.rewards.0 = {path!r}: ")


def test_the_columns_a_reward_needs(module: str) -> None:
    assert columns(Reward(type="numeric")) == columns(Reward(type="exact_match")) == ["answer"]
    assert columns(Reward(type="format", arguments={"pattern": "a"})) == []
    assert columns(Reward(type=f"{module}:judged")) == ["answer", "level"]
    assert columns(Reward(type=f"{module}:judged", arguments={"level": 3})) == ["answer"]


def test_identity(module: str, tmp_path: Path) -> None:
    assert identity(Reward(type="numeric", name="sum", weight=2)) == {
        "type": "numeric",
        "weight": 2.0,
        "arguments": {"tolerance": 1e-6, "position": "last"},
    }
    digest = hashlib.sha256(SOURCE.encode()).hexdigest()
    for path in (f"{module}:helpful", f"{module}:twice", f"{module}:judge"):
        found = identity(Reward(type=path))
        assert found == {"type": path, "weight": 1.0, "arguments": {}, "sources": {module: digest}}
    reexported = identity(Reward(type="users_package:helpful"))["sources"]
    assert reexported == {"users_package": reexported["users_package"], module: digest}
    (tmp_path / "users_package" / "rewards.py").write_text(SOURCE + "# changed\n")
    assert identity(Reward(type=f"{module}:helpful"))["sources"][module] != digest
    assert json.loads(json.dumps(reexported)) == reexported


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_rewards_have_trls_signature(name: str) -> None:
    import inspect

    parameters = inspect.signature(BUNDLED[name]).parameters.values()
    kinds = [p.kind for p in parameters]
    assert next(iter(parameters)).name == "completions"
    assert kinds[-1] is inspect.Parameter.VAR_KEYWORD
    assert BUNDLED[name].__doc__


# ---- asked by a stage -------------------------------------------------------------------------------


def scored(function: Callable[..., Any]) -> Scored:
    return Scored(function, "helpful", "sums")


def ask(reward: Scored, completions: list[str], **more: Any) -> list[float | None]:
    ids = [[1]] * len(completions)
    return reward(prompts=["p"] * len(completions), completions=completions, completion_ids=ids, **more)


def test_every_kind_of_number_is_one() -> None:
    import torch

    values = [1, 0.5, True, False, None, np.float32(0.25), np.int64(-2), np.bool_(True), np.array(4.0)]
    values += [torch.tensor(0.125, requires_grad=True), torch.tensor(3), Fraction(1, 2)]
    expected = [1.0, 0.5, 1.0, 0.0, None, 0.25, -2.0, 1.0, 4.0, 0.125, 3.0, 0.5]
    reward = scored(lambda **columns: values)
    rewards = ask(reward, ["c"] * len(values))
    assert rewards == expected
    assert {type(value) for value in rewards} == {float, type(None)}
    for made in (tuple, iter, np.array, torch.tensor):
        assert ask(scored(lambda make=made, **columns: make([0.5, 1.0])), ["a", "b"]) == [0.5, 1.0]
    assert (reward.calls, reward.rows, reward.raised, reward.first_error) == (1, 12, 0, None)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ([1.0], "gave 1 scores for 2 completions"),
        ([1.0, 1.0, 1.0], "gave 3 scores for 2 completions"),
        ([], "gave 0 scores for 2 completions"),
        (0.5, r"gave 0\.5 \(float\)"),
        (None, r"gave None \(NoneType\)"),
        ("10", r"gave '10' \(str\)"),
        ({0: 1.0, 1: 1.0}, r"\(dict\)"),
        ({0.0, 1.0}, r"\(set\)"),
        (np.float64(0.5), r"\(float64\)"),
        ([1.0, "1"], r"gave '1' \(str\) for completion 2 of 2"),
        ([[1.0], 1.0], r"gave \[1\.0\] \(list\) for completion 1 of 2"),
        ([1j, 1.0], r"\(complex\) for completion 1"),
        ([np.array([1.0]), 1.0], r"\(ndarray\) for completion 1"),
        ([np.str_("1"), 1.0], r"\(str\) for completion 1"),
        ([1.0, float("nan")], "gave nan for completion 2 of 2, which is not finite"),
        ([1.0, float("-inf")], "gave -inf for completion 2"),
        ([1.0, 1e39], r"gave 1e\+39 for completion 2 of 2, which is not finite in float32"),
        ([1.0, 10**400], r"gave 10+\.\.\. for completion 2"),
    ],
)
def test_what_is_not_a_list_of_numbers_stops_the_stage(result: Any, said: str) -> None:
    with pytest.raises(TrainingError, match=rf"stage sums, reward helpful: .*{said}.*; a reward gives a list of one"):
        ask(scored(lambda **columns: result), ["a", "b"])


def inverse(completions: list[str], numerator: list[float], **columns: Any) -> list[float]:
    return [n / int(c) for c, n in zip(completions, numerator, strict=True)]


def test_a_row_that_raises_scores_zero_and_is_counted() -> None:
    reward = scored(inverse)
    state = object()  # TRL passes things that are no columns
    assert ask(reward, ["2", "0", "4", "x"], numerator=[1.0, 1.0, 2.0, 1.0], trainer_state=state) == [
        0.5,
        0.0,
        0.5,
        0.0,
    ]
    assert (reward.calls, reward.rows, reward.raised) == (1, 4, 2)
    assert str(reward.first_error).startswith("ZeroDivisionError: ")
    assert "(test_rewards.py:" in str(reward.first_error)
    assert str(reward.first_error).endswith("on '0'")
    assert ask(reward, ["1"], numerator=[3.0]) == [3.0]
    assert (reward.calls, reward.rows, reward.raised) == (2, 5, 2)


def test_a_missing_column_raises_on_every_row() -> None:
    reward = scored(inverse)
    assert ask(reward, ["1", "2"]) == [0.0, 0.0]
    assert reward.raised == 2
    assert "missing 1 required positional argument: 'numerator'" in str(reward.first_error)


def test_a_batch_that_raises_and_no_row_of_it_leaves_its_error() -> None:
    def only_one(completions: list[str], **columns: Any) -> list[float]:
        (completion,) = completions
        return [float(completion)]

    reward = scored(only_one)
    assert ask(reward, ["1", "2"]) == [1.0, 2.0]
    assert reward.raised == 0
    assert str(reward.first_error).endswith("on a batch of 2")
    assert ask(reward, ["1", "x"]) == [1.0, 0.0]
    assert str(reward.first_error).endswith("on 'x'")


def test_a_wrong_score_of_a_single_row_still_stops_the_stage() -> None:
    def none_at_all(completions: list[str], **columns: Any) -> list[float]:
        if len(completions) > 1:
            raise ValueError("too many")
        return []

    with pytest.raises(TrainingError, match="gave 0 scores for 1 completions"):
        ask(scored(none_at_all), ["1", "2"])


def test_errors_of_a_stop_pass_through() -> None:
    def stops(**columns: Any) -> list[float]:
        raise Stopped("SIGTERM")

    with pytest.raises(Stopped):
        ask(scored(stops), ["1", "2"])


def test_long_errors_and_completions_are_cut() -> None:
    def fails(**columns: Any) -> list[float]:
        raise ValueError("e" * HUGE)

    reward = scored(fails)
    assert ask(reward, ["c" * HUGE]) == [0.0]
    assert len(str(reward.first_error)) < 500


def test_async_functions_are_awaited_on_one_loop() -> None:
    loops = set()

    async def later(completions: list[str], **columns: Any) -> list[float]:
        loops.add(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return [1 / int(c) for c in completions]

    reward = scored(later)
    assert ask(reward, ["2", "4"]) == [0.5, 0.25]
    assert ask(reward, ["2", "0"]) == [0.5, 0.0]
    assert reward.raised == 1
    assert len(loops) == 1

    async def in_a_notebook() -> list[float | None]:
        return ask(reward, ["8"])

    assert asyncio.run(in_a_notebook()) == [0.125]


def test_what_a_failing_reward_logs_keeps_a_place_for_every_row() -> None:
    def logs(completions: list[str], log_extra: Any, log_metric: Any, **columns: Any) -> list[float]:
        log_extra("length", [len(c) for c in completions])
        log_metric("rows", len(completions))
        return [1 / int(c) for c in completions]

    extra: dict[str, list[Any]] = {}
    metrics: list[tuple[str, float]] = []
    callbacks = {
        "log_extra": lambda column, values: extra.setdefault(column, []).extend(values),
        "log_metric": lambda name, value: metrics.append((name, value)),
    }
    reward = scored(logs)
    assert ask(reward, ["1", "00", "100"], **callbacks) == [1.0, 0.0, 0.01]
    assert extra == {"length": [1, None, 3]}
    assert metrics == [("rows", 1), ("rows", 1)]
    assert ask(reward, ["1", "10"], **callbacks) == [1.0, 0.1]
    assert extra == {"length": [1, None, 3, 1, 2]}
    assert metrics[2:] == [("rows", 2)]


def test_counts_survive_a_kill() -> None:
    reward = scored(inverse)
    ask(reward, ["0", "1"], numerator=[1.0, 1.0])
    kept = json.loads(json.dumps(reward.state()))
    resumed = scored(inverse)
    resumed.restore(kept)
    ask(reward, ["x"], numerator=[1.0])
    ask(resumed, ["x"], numerator=[1.0])
    assert resumed.state() == reward.state()
    assert resumed.state() == {"calls": 2, "rows": 3, "raised": 2, "first_error": kept["first_error"]}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_trl_trains_with_them(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """One real step of GRPOTrainer: ours as they are, and as a stage asks them, under their own names."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def fails(completions: list[str], log_extra: Any, **columns: Any) -> list[float]:
        raise KeyError("no")

    failing = Scored(fails, "failing", "sums")
    shape = Scored(resolve(Reward(type="format", arguments={"pattern": "(?s).*"})), "anything", "sums")
    skips = Scored(lambda completions, **columns: [None, *[1.0] * (len(completions) - 1)], "skips", "sums")
    arguments = GRPOConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=4,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = Dataset.from_list([{"prompt": "1 + 1", "answer": "2", "pattern": "a column"}] * 4)
    trainer = GRPOTrainer(
        tiny_llama(), [numeric, shape, failing, skips], arguments, rows, processing_class=tiny_tokenizer
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert 0.0 <= logged["rewards/numeric/mean"] <= 1.0
    assert [logged[f"rewards/{name}/mean"] for name in ("anything", "failing", "skips")] == [1.0, 0.0, 1.0]
    assert (failing.calls, failing.rows, failing.raised) == (1, 4, 4)
