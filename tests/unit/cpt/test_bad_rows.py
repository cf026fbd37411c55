"""Bad streams, files and rows, as far as they can be told without a model: every problem at once, by dotted path."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt.config import Source, Stream
from cpt.data.sources import load
from cpt.errors import ConfigError, DataError
from cpt.validate import problems

FIVE = """
name: five
model: tiny-world
training: {learning_rat: 1.0, max_steps: 4, per_device_train_batch_size: 8}
stages:
  - name: one
    data: {task: tiny_world/reverse}
    methods: [repley]
  - name: two
    data: {task: tiny_world/reverse, limt: 3}
    methods: [{type: replay, ratio: 1.5, earlier: all}]
evaluation: {batch_tokens: 0}
"""
# Each problem's place, and the value that mends it when the place is pasted into an override.
MENDED = {
    "training.learning_rat": None,
    "stages.0.methods.0.type": "hft",
    "stages.1.data.0.limt": None,
    "stages.1.methods.0.ratio": "0.25",
    "evaluation.batch_tokens": "64",
}


def test_five_mistakes_are_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "five.yaml"
    file.write_text(FIVE)
    with pytest.raises(ConfigError) as caught:
        Stream.from_yaml(file)
    assert [problem.partition(" = ")[0] for problem in caught.value.problems] == list(MENDED)


def test_their_places_paste_into_overrides(tmp_path: Path) -> None:
    """Also where YAML gave a method by its name alone, and one source without its list."""
    file = tmp_path / "five.yaml"
    file.write_text(FIVE)
    overrides = [f"{place}={value}" for place, value in MENDED.items() if value]
    with pytest.raises(ConfigError) as caught:
        Stream.from_yaml(file, overrides)
    assert [problem.partition(" = ")[0] for problem in caught.value.problems] == [
        place for place, value in MENDED.items() if value is None
    ]
    file.write_text(FIVE.replace("learning_rat:", "learning_rate:").replace("limt:", "limit:"))
    stream = Stream.from_yaml(file, [*overrides, "stages.two.data.0.limit=7"])
    assert [method.type for stage in stream.stages for method in stage.methods] == ["hft", "replay"]
    assert stream.stages[1].data[0].limit == 7


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("name", "write dotted.path=value"),
        ("name=[", "'[' is not valid YAML; put text in quotes"),
        ("name.first=x", "name is 'five', which has no parts to set"),
        ("stages.three.name=x", "stages.three does not exist; there are: 0 (one), 1 (two)"),
        ("stages.0.methods.7=hft", "stages.0.methods.7 does not exist; there are: 0"),
    ],
)
def test_an_override_that_fits_nothing(tmp_path: Path, override: str, said: str) -> None:
    file = tmp_path / "five.yaml"
    file.write_text(FIVE)
    with pytest.raises(ConfigError, match=re.escape(said)):
        Stream.from_yaml(file, [override])


@pytest.mark.parametrize("content", [b"name: \xff", b"name: [", b"- a list"], ids=["not UTF-8", "not YAML", "a list"])
def test_a_file_that_is_no_stream(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(str(file))):
        Stream.from_yaml(file)


@pytest.mark.parametrize("field", ["per_device_train_batch_size", "gradient_accumulation_steps", "save_steps"])
@pytest.mark.parametrize("value", [0, -1])
def test_counts_below_one_are_refused(field: str, value: int) -> None:
    with pytest.raises(ConfigError) as caught:
        Stream.parse({"name": "a", "model": "tiny-world", "training": {field: value}})
    assert caught.value.problems == [f"training.{field} = {value}: must be greater than 0"]


def stream_of(**data: Any) -> Stream:
    return Stream.parse({"name": "a", "model": "tiny-world", "stages": [{"name": "one", "data": data}]})


def test_every_file_and_every_stage_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    stages = [
        {"name": "one", "data": {"file": "row.jsonl"}, "test": {"file": "rows.jsonl"}},
        {"name": "two", "data": [{"file": "rows.jsonl"}, {"task": "tiny_world/revers"}]},
        {"name": "three", "data": {"file": "rows.jsonl"}, "test": {"rows": [{"text": " "}]}},
    ]
    raw = {"name": "a", "model": str(tmp_path), "data_root": str(tmp_path), "stages": stages}
    model, first, second, third = problems(Stream.parse(raw))
    assert model == f"model.path = {str(tmp_path)!r}: the folder holds no config.json, so it is no checkpoint."
    assert first.startswith(f"stages.0.data.0.file = '{tmp_path}/row.jsonl': no such file. Nearest in")
    assert "rows.jsonl" in first
    assert second.startswith("stages.1.data.1.task = 'tiny_world/revers': tiny_world has no task 'revers'. Did you")
    assert third == "stages.2.test (rows in memory) row 0: row with an empty text: `text` has no text"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "a", "answr": "b"}, "row without an answer: no answer or output or response"),
        ({"prompt": "a"}, "row without an answer: it has a prompt and no `completion`"),
        ({"prompt": "a", "completion": ""}, "row with an empty answer"),
        ({"question": "a", "answer": None}, "row without an answer"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message of role 'assistant'"),
        ({"question": "a", "choices": ["b", "c"], "answer_index": 2}, "answer_index = 2: must be a whole number"),
        ({"q": "a", "a": "b"}, "no known form: fields found: q, a"),
    ],
)
def test_a_row_that_cannot_be_learned(row: dict[str, Any], said: str) -> None:
    source = Source(rows=[{"prompt": "fine", "completion": "fine"}, row])
    with pytest.raises(DataError) as caught:
        load(source, None, "stages.0.data.0")
    (problem,) = caught.value.problems
    assert problem.startswith("stages.0.data.0 (rows in memory) row 1: ")
    assert said in problem


def test_a_file_of_bad_rows_does_not_flood() -> None:
    with pytest.raises(DataError) as caught:
        load(Source(rows=[{"x": "y"}] * 50), None, "stages.0.data.0")
    assert len(caught.value.problems) == 4
    assert caught.value.problems[-1] == "stages.0.data.0: stopped after three unreadable rows of 50"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.jsonl", "", "no rows"),
        ("rows.jsonl", '{"prompt": "a"\n', "rows.jsonl:1: malformed JSON"),
        ("rows.json", "[]", "no rows"),
        ("rows.csv", "question,answer\n", "no rows"),
        ("rows.csv", "question,answer\na\n", "rows.csv:2: not the header's 2 columns"),
        ("rows.parquet", "PAR1", "not a readable parquet file"),
        ("rows.txt", "a", "suffix '.txt' is not one of .jsonl"),
    ],
)
def test_a_file_without_usable_rows(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    (problem,) = problems(stream_of(file=str(tmp_path / name)))
    assert problem.startswith("stages.0.data.0")
    assert str(tmp_path / name) in problem
    assert said in problem


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("frage,antwort\na,b\n")
    fields = {"question": "frage", "answer": "antwrt"}
    (problem,) = problems(stream_of(file=str(tmp_path / "rows.csv"), fields=fields))
    assert problem == (
        "stages.0.data.0 (rows.csv) row 0: fields.answer = 'antwrt': no such field in the row "
        "(fields found: frage, antwort)"
    )
    assert not problems(stream_of(file=str(tmp_path / "rows.csv"), fields=fields | {"answer": "antwort"}))


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        (0.97, "leaves no room for task rows in an effective batch of 8"),
        (0.3, "of 8 rows is 2.4 rows, not a whole number: use 0.25 (2 rows) or 0.375 (3 rows)"),
        (1.0, "must be less than 1"),
    ],
)
def test_a_share_that_no_batch_can_hold(ratio: float, said: str) -> None:
    methods = [{"type": "replay", "ratio": ratio, "general": {"task": "tiny_world/general"}}]
    raw = yaml.safe_load(FIVE) | {"training": {"per_device_train_batch_size": 8}, "evaluation": {}}
    raw["stages"] = [{"name": "one", "data": {"task": "tiny_world/reverse"}, "methods": methods}]
    with pytest.raises(ConfigError) as caught:
        Stream.parse(raw)
    (problem,) = caught.value.problems
    assert problem.startswith(f"stages.0.methods.0.ratio = {ratio}: {said}")
