"""Free text against references, by hand and by slow implementations; what is cut off; which choice is named."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval_harness.metrics import text

# ---- normalisation, exact match, containment, F1 ----------------------------------------------------


@pytest.mark.parametrize(
    ("given_text", "normalised"),
    [
        ("The  Eiffel\tTower!", "eiffel tower"),
        ("a U.S. state-of-the-art", "us stateoftheart"),
        ("$1,234.50", "123450"),
        ("theatre", "theatre"),  # an article is a word
        ("A", "a"),  # articles alone are kept: the choice A is an answer
        ("The.", "the"),
        ("?!", ""),
        ("", ""),
        ("Der Turm «Eiffel»", "der turm «eiffel»"),  # neither its articles nor its quotation marks are known
    ],
)
def test_squad_normalise(given_text: str, normalised: str) -> None:
    assert text.squad_normalise(given_text) == normalised


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "contains", "f1"),
    [
        ("the Paris.", ["Paris"], 1, 1, 1),
        ("It is Paris", ["Paris"], 0, 1, 0.5),  # precision 1/3, recall 1
        ("Paris", ["Paris, France"], 0, 0, 2 / 3),
        ("Parisian", ["Paris"], 0, 0, 0),
        ("in Lyon or Paris", ["Rome", "Paris"], 0, 1, 0.4),
        ("x x y", ["x z z"], 0, 0, 1 / 3),  # bags: one x is shared
        ("", ["Paris"], 0, 0, 0),
        ("", [""], 1, 1, 1),  # SQuAD 2.0: no answer
        ("The!", [""], 0, 0, 0),
        ("?", [""], 1, 1, 1),
        ("A.", ["A"], 1, 1, 1),
        ("5", ["3.5"], 0, 0, 0),
        ("?", ["!"], None, None, None),  # nothing to compare with
        ("+", ["+", "plus"], 0, 0, 0),  # the other reference decides
        ("答案是北京。", ["北京"], 0, 1, 0),  # no spaces between words
        ("Bangkok คือกรุงเทพ", ["กรุงเทพ"], 0, 1, 0),
        ("«Paris»", ["Paris"], 0, 1, 0),
    ],
)
def test_strict_lenient_and_overlap(
    prediction: str, references: list[str], exact: float | None, contains: float | None, f1: float | None
) -> None:
    assert text.quasi_exact_match(prediction, references) == exact
    assert text.contains_answer(prediction, references) == contains
    assert text.f1(prediction, references) == pytest.approx(f1)


@pytest.mark.parametrize("references", [[], "Paris"])
@pytest.mark.parametrize("metric", [text.quasi_exact_match, text.contains_answer, text.f1])
def test_references_are_a_list(metric: object, references: object) -> None:
    with pytest.raises(ValueError, match="must be a list of at least one string"):
        metric("Paris", references)  # type: ignore[operator]


PHRASES = st.text(alphabet="ab .the", max_size=12)


@given(PHRASES, st.lists(PHRASES, min_size=1, max_size=3))
def test_strict_is_never_above_lenient_nor_overlap_and_a_reference_never_hurts(
    prediction: str, references: list[str]
) -> None:
    exact, contains = text.quasi_exact_match(prediction, references), text.contains_answer(prediction, references)
    f1 = text.f1(prediction, references)
    assert (exact is None) == (contains is None) == (f1 is None)
    if exact is not None and contains is not None and f1 is not None:
        assert exact <= contains
        assert exact <= f1 <= 1
        more = text.f1(prediction, [*references, prediction or "x"])
        assert more is not None
        assert more >= f1


# ---- ROUGE-L ----------------------------------------------------------------------------------------


def lcs(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    @cache
    def longest(i: int, j: int) -> int:
        if i == len(one) or j == len(other):
            return 0
        if one[i] == other[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    return longest(0, 0)


WORDS = st.lists(st.sampled_from(["x", "y", "zz", "7"]), min_size=1, max_size=8)


@given(WORDS, WORDS, st.booleans())
@settings(deadline=None)  # the first call imports the package
def test_rouge_l_against_its_definition(given_words: list[str], reference: list[str], stemmer: bool) -> None:
    shared = lcs(tuple(given_words), tuple(reference))
    precision, recall = shared / len(given_words), shared / len(reference)
    mean = 2 * precision * recall / (precision + recall) if shared else 0.0
    found = text.rouge_l(" ".join(given_words), ". ".join(reference).upper(), stemmer=stemmer)
    assert found == pytest.approx((precision, recall, mean))


def test_rouge_l_by_hand() -> None:
    """ "cats sat here" against "the cat sits": without stems nothing is shared, with them cat and no more."""
    assert text.rouge_l("cats sat here", "the cat sits", stemmer=False) == (0, 0, 0)
    assert text.rouge_l("cats sat here", "the cat sits", stemmer=True) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert text.rouge_l("a b c d", "a c", stemmer=False) == pytest.approx((0.5, 1, 2 / 3))


def test_rouge_l_recall_is_tofus(shared: Path) -> None:
    """Every continuation of a published evaluation log (Maini et al. 2024), to the last digit."""
    path = shared / "data" / "unlearning" / "tofu_eval_logs" / "phi_retain90_wd0.01_eval_log_aggregated.json"
    logs = json.loads(path.read_text()).values()
    pairs = [
        (log["rougeL_recall"][key], *log["generated_text"][key][-2:]) for log in logs for key in log["rougeL_recall"]
    ]
    assert len(pairs) > 500
    found = [text.rouge_l(prediction, reference, stemmer=True) for _, prediction, reference in pairs]
    assert [one and one.recall for one in found] == [recall for recall, *_ in pairs]


def test_rouge_l_of_what_has_no_tokens() -> None:
    assert text.rouge_l("Beijing", "北京", stemmer=True) is None  # undefined, not 0
    assert text.rouge_l("Beijing", "", stemmer=True) is None
    assert text.rouge_l("北京", "Beijing", stemmer=True) == (0, 0, 0)  # nothing of the reference is said
    assert text.rouge_l("", "Beijing", stemmer=True) == (0, 0, 0)
    assert [text.rouge_coverage(one) for one in ("It's 5!", "北京 is", "北京", "?!", "")] == [1.0, 0.5, 0.0, None, None]
    assert text.rouge_coverage("café") == 0.75


# ---- what is cut off --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("<think>a</think><answer>B</answer>", "B"),
        ("B", "B"),
        (" <think>\nlong\n</think>\n\nB\n", "B"),
        ("a</think>B", "B"),  # the template opened it
        ("a</think>b</think>B", "B"),
        ("<think>a", ""),  # still reasoning
        ("B <think>a", "B"),
        ("<think>a<think>b</think>c</think>B", "B"),
        ("<think>a</think>B<think>c</think>D", "BD"),
        ("<THINKING>a</THINKING>B", "B"),
        ("<reasoning>1 < 2</reasoning>B", "B"),
        ("if 1 < 2 then <b>B</b>", "if 1 < 2 then <b>B</b>"),
        ("I think B", "I think B"),
        ("", ""),
    ],
)
def test_strip_reasoning(written: str, answer: str) -> None:
    assert text.strip_reasoning(written) == answer
    assert text.strip_reasoning(written, text.REASONING) == answer


def test_reasoning_by_a_pattern_of_ones_own() -> None:
    assert text.strip_reasoning("[THINK]a[/THINK] B", r"(?s)\[THINK\].*?\[/THINK\]") == "B"
    assert text.strip_reasoning("<think>a</think>B", r"\d") == "<think>a</think>B"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("unit", ["<think>", "</think>", "<", "</", "<think>a</think>", "a"])
def test_a_megabyte_is_stripped(unit: str) -> None:
    text.strip_reasoning(unit * (1_000_000 // len(unit)))


def test_a_pattern_that_explodes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MATCH_SECONDS", 0.1)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"undecided after 0\.1 s on 80 characters"):
        text.strip_reasoning("a" * 80, "(a|aa)+b")
    assert time.monotonic() - began < 30
    assert text.find("b+", "abbc")[0] == "bb"
    assert text.find("b+", "abbc", whole=True) is None


@pytest.mark.parametrize(
    ("written", "stops", "kept"),
    [
        ("one\ntwo", ["\n"], "one"),
        ("one two Question: x", ["Question:", "two"], "one "),  # the first in the text
        ("one", ["\n"], "one"),
        ("one", [], "one"),
        ("\none", ["\n"], ""),
    ],
)
def test_until_stop(written: str, stops: list[str], kept: str) -> None:
    assert text.until_stop(written, stops) == kept


def test_an_empty_stop_is_an_error() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        text.until_stop("one", ["\n", ""])


# ---- choices ----------------------------------------------------------------------------------------

CITIES = ["New York", "New York City", "Boston", "The Hague"]


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("B", 1),
        ("b.", 1),
        ("(B)", 1),
        ("B) New York City", 1),
        ("**B**", 1),
        ("B\nbecause", 1),
        ("The answer is (C).", 2),
        ("Answer: c", 2),
        ("so \\boxed{\\text{(C)}}", 2),
        ("A. No wait, the answer is C.", 2),
        ("I would take (D), clearly", 3),
        ("Let me see.\nC) Boston", 2),
        ("I think it is Boston!", 2),
        ("New York City", 1),
        ("new york", 0),
        ("hague", 3),
        ("The answer is Boston", 2),
        # ambiguous, or none
        ("A or B", None),
        ("either (A) or (B)", None),
        ("the answer is A. the answer is B.", None),
        ("New York, not Boston", None),
        ("New York City or New York", None),
        ("E", None),  # there are four
        ("A dog", None),
        ("I do not know", None),
        ("Bostonians", None),
        ("", None),
    ],
)
def test_named_choice(answer: str, index: int | None) -> None:
    assert text.named_choice(answer, CITIES) == index


def test_named_choice_of_equal_texts_is_ambiguous() -> None:
    assert text.named_choice("yes", ["yes", "Yes.", "no"]) is None
    assert text.named_choice("no", ["yes", "Yes.", "no"]) == 2
    assert text.named_choice("?", ["?", "!"]) is None


@pytest.mark.parametrize("count", [1, 27])
def test_named_choice_wants_a_letter_for_each(count: int) -> None:
    with pytest.raises(ValueError, match=f"choices = {count} strings: must be 2 to 26"):
        text.named_choice("A", ["x"] * count)


@given(st.integers(0, 3), st.sampled_from(["{}", "({})", "{}.", "Answer: {}", "the answer is ({}).", "\\boxed{{{}}}"]))
def test_every_form_names_its_letter(index: int, form: str) -> None:
    assert text.named_choice(form.format("ABCD"[index]), CITIES) == index


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, eval_harness.metrics.text; print([m for m in ('nltk', 'rouge_score') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
