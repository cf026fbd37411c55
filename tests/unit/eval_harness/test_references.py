"""Several right answers to a row: the best counts, the definition says so, and rows with one stay what they were."""

from __future__ import annotations

from typing import Any

import pytest

from eval_harness.cache import Cache
from eval_harness.generation import Generation
from eval_harness.measure import EvalSet, Prepared, measure, set_definition
from eval_harness.rows import Row, RowError, canonical
from eval_harness.sources import find_task, fingerprint

WRITTEN = ("quasi_exact_match", "contains_answer", "format_drift_text", "f1", "rouge_l", "rouge_l_recall")


def with_references(row: Row, *references: str) -> Row:
    return canonical({"prompt": row.prompt, "completion": "market of words", "references": references})


@pytest.fixture
def right(half_taught: Any, tokenizer: Any, word_rows: list[Row]) -> list[Row]:
    """Rows whose answer the model writes exactly."""
    found = measure(half_taught, tokenizer, [EvalSet("s", word_rows)])["s"]["exact_match"].per_item
    return [row for row in word_rows if found[row.id]][:4]


@pytest.mark.parametrize("how", ["one_pass", "generate"])
def test_any_right_answer_that_is_written_is_exact(
    half_taught: Any, tokenizer: Any, right: list[Row], word_rows: list[Row], how: Any
) -> None:
    def value(rows: list[Row]) -> Any:
        one = EvalSet("s", rows, ("exact_match",), exact_match=how)
        return measure(half_taught, tokenizer, [one])["s"]["exact_match"]

    assert value([with_references(row) for row in right]).value == 0
    found = value([with_references(row, "an x", row.completion or "") for row in right])
    assert found.value == 1
    assert found.definition.startswith(f"exact_match@1({how},best_reference,")
    mixed = [with_references(right[0], right[0].completion or ""), with_references(right[1])]
    assert list(value(mixed).per_item.values()) == [1, 0]


def test_written_measures_take_the_best(monkeypatch: pytest.MonkeyPatch, model: Any, tokenizer: Any) -> None:
    def values(written: str, **row: Any) -> dict[str, Any]:
        ids = tokenizer(written).input_ids
        monkeypatch.setattr("eval_harness.generation.generate", lambda model, tokenizer, prompts, how, **k: [ids])
        one = EvalSet("s", [canonical({"question": "Which?"} | row)], WRITTEN, generation=Generation(16))
        return measure(model, tokenizer, [one])["s"]

    row = {"answer": "Rome", "answers": ["Rome", "the river harbour", "the market"]}
    found = {name: result.value for name, result in values("the river Paris", **row).items()}
    # Against "river harbour": 1 of 2 words either way; ROUGE keeps "the": 2 of 3. Against the others less.
    assert found["f1"] == pytest.approx(0.5)
    assert found["rouge_l"] == found["rouge_l_recall"] == pytest.approx(2 / 3)
    assert (found["quasi_exact_match"], found["contains_answer"]) == (0, 0)
    found = {name: result.value for name, result in values("It is the market.", **row).items()}
    assert (found["quasi_exact_match"], found["contains_answer"], found["format_drift_text"]) == (0, 1, 1)
    several, one = values("x", **row), values("x", answer="Rome")
    for name in WRITTEN:
        assert several[name].definition.replace(",best_reference", "") == one[name].definition
        assert several[name].definition != one[name].definition


def test_a_row_knows_its_right_answers() -> None:
    plain = {"question": "Which?", "answer": "Rome"}
    several = canonical(plain | {"references": ["Roma", "Rome", "Roma", 7]})
    assert several.references == ("Roma", "7")
    assert canonical(plain | {"answers": ["Roma", "7"]}) == several
    assert several.id != canonical(plain).id == canonical(plain | {"references": []}).id
    assert canonical(plain | {"answers": {"text": ["Roma"]}}).references == ()
    said = [{"role": "assistant", "content": "Rome"}]
    asked = {"prompt": [{"role": "user", "content": "Which?"}], "completion": said, "references": ["Roma"]}
    assert canonical(asked).references == ("Roma",)
    for bad in ("Roma", [""], [["Roma"]]):
        with pytest.raises(RowError, match=r"references = .*: must be a list of strings that are not empty"):
            canonical(plain | {"references": bad})
    choices = {"question": "Which?", "choices": ["Rome", "Paris"], "answer_index": 0}
    assert canonical(choices | {"references": ["Roma"]}).references == ("Roma",)
    with pytest.raises(RowError, match="'Paris' is one of the choices and not the answer 'Rome'"):
        canonical(choices | {"references": ["Paris"]})


def test_rows_without_any_keep_their_fingerprint() -> None:
    row = canonical({"question": "Which?", "answer": "Rome"})
    assert row.id == "6fda058818ac2b4e"
    assert fingerprint([row]) == "08c125171d65a303ad1ef71bf8a1308240c154bd21a5d7fb3869ff3db6fa3070"
    assert fingerprint([canonical({"question": "Which?", "answer": "Rome", "answers": ["Roma"]})]) != fingerprint([row])


def test_what_is_right_is_part_of_what_was_asked(
    half_taught: Any, tokenizer: Any, right: list[Row], tmp_path: Any
) -> None:
    store, row = Cache(tmp_path / "scores"), right[0]
    for how in ("one_pass", "generate"):
        for references in ((), (row.completion or "",), ("an x",)):
            one = EvalSet("s", [with_references(row, *references)], ("exact_match",), exact_match=how)
            cached = measure(half_taught, tokenizer, [one], cache=store, identity="a")
            assert cached == measure(half_taught, tokenizer, [one])
    sets = [EvalSet("s", [with_references(row, *references)]) for references in ((), ("an x",), ("x",))]
    assert len({set_definition(one, tokenizer) for one in sets}) == 3


def test_what_is_written_is_compared_with_answers_after_the_cache(
    half_taught: Any, tokenizer: Any, right: list[Row], tmp_path: Any
) -> None:
    """Text depends on the prompt alone; only an exact match asks for ids, and is no text that was kept before."""
    store, how = Cache(tmp_path / "scores"), {"generation": Generation(8), "exact_match": "generate"}
    texts, exact = (EvalSet("s", right, names, **how) for names in (("f1",), ("f1", "exact_match")))
    found = measure(half_taught, tokenizer, [texts], cache=store, identity="a")["s"]
    both = measure(half_taught, tokenizer, [exact], cache=store, identity="a")["s"]
    assert (both["exact_match"].value, both["f1"]) == (1, found["f1"])
    others = EvalSet("s", [with_references(row) for row in right], ("f1",), **how)
    asked: list[set[str]] = []
    again = measure(half_taught, tokenizer, [others], cache=store, identity="a", asking=asked.append)["s"]
    assert not asked
    assert again["f1"].value == measure(half_taught, tokenizer, [others])["s"]["f1"].value < 1


def test_within_a_stage_they_count_too(half_taught: Any, tokenizer: Any, right: list[Row]) -> None:
    sets = [EvalSet("s", [with_references(row, row.completion or "") for row in right])]
    assert Prepared(tokenizer, sets, 128).measure(half_taught) == measure(half_taught, tokenizer, sets)


def test_format_drift_is_not_of_what_is_written_in_other_words(
    half_taught: Any, tokenizer: Any, right: list[Row]
) -> None:
    def drifted(*references: str) -> float | None:
        raw = {"instruction": right[0].prompt, "choices": ["a market", "Rome"], "answer": "a market"}
        one = EvalSet("s", [canonical(raw | {"references": references})], ("acc", "exact_match", "format_drift"))
        found = measure(half_taught, tokenizer, [one])["s"]
        assert found["format_drift"].value == found["acc"].value - found["exact_match"].value
        return found["exact_match"].value

    assert (drifted("an x"), drifted(right[0].completion or "")) == (0, 1)


@pytest.mark.parametrize(
    ("task", "raw", "expected"),
    [
        ("squad", {"context": "c", "question": "q", "answers": {"text": ["a", "b", "a"]}}, ("a", ("b",))),
        ("triviaqa", {"question": "q", "answer": {"value": "a", "aliases": ["A", "a", "b"]}}, ("a", ("A", "b"))),
        ("nq_open", {"question": "q", "answer": ["a", "b"]}, ("a", ("b",))),
    ],
)
def test_tasks_with_several_answers_keep_them(task: str, raw: dict[str, Any], expected: Any) -> None:
    found = find_task(f"question_answering/{task}")
    assert found is not None
    row = canonical(found.asked(found.row(raw), "test"))
    assert (row.completion, row.references) == expected
