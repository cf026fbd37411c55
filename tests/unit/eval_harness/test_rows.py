"""Rows: every form recognised, every unusable row refused with its reason."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_harness.rows import RowError, canonical, content_key, normalise

USER = {"role": "user", "content": "2 + 2?"}
ASSISTANT = {"role": "assistant", "content": "4"}


def test_instruction_joins_its_input_on_a_new_line():
    row = canonical({"task": "x", "instruction": "Add.", "input": "2 2", "answer": "4", "choices": ["3", "4"]})
    assert (row.kind, row.prompt, row.completion, row.choices) == ("completion", "Add.\n2 2", "4", ("3", "4"))
    assert row.separator == " "


@pytest.mark.parametrize("empty", [{}, {"input": ""}, {"input": "  "}, {"input": None}])
def test_an_empty_input_adds_nothing(empty):
    assert canonical({"instruction": "Say hi.", "output": "hi", **empty}).prompt == "Say hi."


@pytest.mark.parametrize("name", ["answer", "output", "response"])
def test_the_three_names_of_an_answer(name):
    assert canonical({"instruction": "Say hi.", name: "hi"}).completion == "hi"


def test_multiple_choice_takes_its_answer_from_the_index():
    row = canonical({"question": "Live young?", "choices": ["birds", "cats"], "answer_index": 1, "subject": "b"})
    assert (row.prompt, row.completion, row.choices) == ("Live young?", "cats", ("birds", "cats"))


def test_question_with_a_number_as_answer():
    row = canonical({"question": "2 + 2?", "answer": 4})
    assert (row.prompt, row.completion, row.choices, row.separator) == ("2 + 2?", "4", (), " ")


def test_trl_strings_are_taken_literally():
    row = canonical({"prompt": "2 + 2 =", "completion": " 4"})
    assert (row.prompt, row.completion, row.separator) == ("2 + 2 =", " 4", "")


def test_trl_messages():
    row = canonical({"prompt": [USER], "completion": [ASSISTANT]})
    assert (row.kind, row.prompt, row.messages, row.completion) == ("completion", None, (USER,), "4")


def test_conversation_and_text():
    assert canonical({"messages": [USER, ASSISTANT]}).messages == (USER, ASSISTANT)
    text = canonical({"text": "Once.", "source": "book"})
    assert (text.kind, text.text) == ("text", "Once.")


def test_fields_map_and_win_over_the_rows_own_names():
    raw = {"q": "2 + 2?", "a": "4", "answer": "five"}
    assert canonical(raw, {"question": "q", "answer": "a"}).completion == "4"
    # MMLU on the hub: `answer` is a position.
    mmlu = {"question": "Best?", "choices": ["a", "b"], "answer": 1}
    assert canonical(mmlu, {"answer_index": "answer"}).completion == "b"
    with pytest.raises(RowError, match=r"answer_index: answer"):
        canonical(mmlu)


@pytest.mark.parametrize(
    ("raw", "fields", "said"),
    [
        ({"q": "a", "r": "b"}, None, "fields found: q, r.*Known: .*fields:"),
        ({}, None, "fields found: none"),
        ({"question": "a"}, None, "without an answer"),
        ({"instruction": "a", "input": "b"}, None, "without an answer: no answer or output or response"),
        ({"prompt": "a"}, None, "no `completion`"),
        ({"question": "a", "answer": " "}, None, "empty answer"),
        ({"prompt": "a", "completion": ""}, None, "empty answer"),
        ({"prompt": [USER], "completion": [{"role": "assistant", "content": ""}]}, None, "empty answer"),
        ({"prompt": "", "completion": "b"}, None, "empty prompt"),
        ({"text": "\n"}, None, "empty text"),
        ({"question": "a", "answer": "c", "choices": ["a", "b"]}, None, r"'c' is not among the choices"),
        ({"question": "a", "choices": ["a", "b"], "answer_index": 2}, None, "answer_index = 2.*0 to 1"),
        ({"question": "a", "choices": ["a", "b"], "answer_index": -1}, None, "answer_index = -1"),
        ({"question": "a", "choices": ["a", "b"], "answer_index": True}, None, "answer_index = True"),
        ({"question": "a", "choices": ["a"], "answer_index": 0}, None, "at least two"),
        ({"question": "a", "choices": "ab", "answer_index": 0}, None, "choices = 'ab'"),
        ({"question": "a", "choices": ["a", ""], "answer_index": 0}, None, "empty choice"),
        ({"question": ["a"], "answer": "b"}, None, "question = .*must be a string"),
        ({"messages": [USER]}, None, "no message of role 'assistant'"),
        ({"messages": []}, None, "non-empty list"),
        ({"messages": [{"role": "user", "content": [1]}]}, None, r"messages\[0\]"),
        ({"prompt": [USER], "completion": [ASSISTANT, USER]}, None, "one message of role 'assistant'"),
        ({"prompt": [USER], "completion": "4"}, None, "both must be strings, or both lists"),
        (
            {"q": "a", "answer": "b"},
            {"question": "Q"},
            r"fields.question = 'Q': no such field.*found: q, answer",
        ),
        ({"q": "a"}, {"quest": "q"}, "fields.quest: not a field.*question"),
    ],
)
def test_unusable_rows_say_why(raw, fields, said):
    with pytest.raises(RowError, match=said):
        canonical(raw, fields)


def test_id_is_of_the_content_alone():
    row = canonical({"question": "a", "answer": "b", "subject": "x"})
    assert row.id == canonical({"subject": "y", "answer": "b", "question": "a"}).id
    assert len(row.id) == 16
    assert int(row.id, 16) >= 0
    others = [
        {"question": "a", "answer": "B"},
        {"question": "a", "answer": "b", "choices": ["b", "c"]},
        {"text": "a"},
    ]
    assert len({row.id, *(canonical(other).id for other in others)}) == 4


def test_content_key_is_one_for_all_forms_of_a_question():
    forms = [
        {"prompt": "2 + 2?", "completion": "4"},
        {"question": " 2 +  2?", "answer": 4},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"messages": [USER, ASSISTANT]},
        {"question": "２ + 2？", "answer": "4", "choices": ["4", "5"]},  # full-width: NFKC
    ]
    assert len({content_key(canonical(form)) for form in forms}) == 1
    assert content_key(canonical({"question": "2 + 2?", "answer": "5"})) != content_key(canonical(forms[0]))
    assert content_key(canonical({"text": "A  b"})) == content_key(canonical({"text": "a b\n"}))


def test_normalise_by_hand():
    assert normalise("  ﬁne\tSTRASSE \n ß  ") == "fine strasse ss"


@given(st.text())
def test_normalise_ignores_outer_and_repeated_space(text):
    assert normalise(f" \n{text}\t") == normalise(text)
    assert "  " not in normalise(text)


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("Sky? ", "blue"), ([{"role": "user", "content": "Sky?"}], [{"role": "assistant", "content": "blue"}])],
)
def test_a_prompt_and_completion_may_bring_choices(prompt, completion) -> None:
    row = {"prompt": prompt, "completion": completion}
    found = canonical(row | {"choices": ["green", "blue"]})
    assert found.choices == ("green", "blue")
    assert canonical(row).id != found.id
    assert canonical(row).choices == ()
    with pytest.raises(RowError, match="'blue' is not among the choices"):
        canonical(row | {"choices": ["green", "red"]})
