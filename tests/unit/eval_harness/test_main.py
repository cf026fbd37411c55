"""The command line, as a process: a table, files that are read back, one line per problem."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from eval_harness.__main__ import main, table
from eval_harness.results import Result, from_document
from eval_harness.suite import SuiteError, load_suite, shipped

SUITE = """
description: two sets
sets:
  words: {file: words.jsonl, limit: 5, fields: {question: q, answer: a}}
  text: {file: text.jsonl, group: general}
"""


@pytest.fixture
def place(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"q": f"word {i}?", "a": "river"} for i in range(8)]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "The capital of Italy is Rome."}) + "\n")
    (tmp_path / "suite.yaml").write_text(SUITE)
    return tmp_path


def test_as_a_process(place, root):
    arguments = ["--model", "model", "--suite", "suite.yaml", "--out", "out", "--limit", "3", "--batch-tokens", "64"]
    run = subprocess.run(
        [sys.executable, "-m", "eval_harness", *arguments, "--device", "cpu"],
        cwd=place,
        env={**__import__("os").environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].split() == ["set", "measure", "value", "n", "definition"]
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["words", "exact_match"],
        ["words", "answer_loss"],
        ["text", "bits_per_byte"],
    ]
    document = json.loads((place / "out" / "results.json").read_text())
    results = from_document(document)
    assert (document["model"], document["limit"]) == ("model", 3)
    assert results["words"]["answer_loss"].n == 3
    assert f"{results['words']['answer_loss'].value:.4f} ± " in lines[2]
    one = from_document(json.loads((place / "out" / "words.json").read_text()))
    assert one == {"words": results["words"]}


def test_list_names_the_shipped_suites(capsys):
    assert main(["--list"]) == 0
    assert capsys.readouterr().out.startswith("tiny_world ")
    assert shipped()["tiny_world"]


def test_the_shipped_suite_loads():
    sets = load_suite("tiny_world", limit=2)
    names = ["facts", "facts_heldout", "sums", "sums_heldout", "copy", "sort", "text"]
    assert [one.name for one in sets] == names
    assert all(len(one.rows) == 2 and one.group == "general" for one in sets)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "suite.yaml"], ["--model and --suite are needed"]),
        (["--model", "nowhere/at/all", "--suite", "suite.yaml"], ["nowhere/at/all: no such folder"]),
        (
            ["--model", "model", "--suite", "tiny_wrld,none.yaml"],
            ["did you mean 'tiny_world'", "none.yaml: no such file"],
        ),
        (["--model", "model", "--suite", "suite.yaml", "--out", "words.jsonl"], ["--out words.jsonl: cannot be made"]),
        (["--model", "model", "--suite", "suite.yaml,suite.yaml"], ["set 'words': given 2 times", "set 'text'"]),
    ],
)
def test_bad_input_is_one_line_per_problem_and_code_2(place, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(place)
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == len(said), lines
    for line, part in zip(errors, said, strict=True):
        assert part in line


def test_bad_numbers_are_refused_by_name(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--limit", "0"])
    assert caught.value.code == 2
    assert "--limit" in capsys.readouterr().err


def test_every_problem_of_a_suite_at_once(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(
        "sets:\n  a: {file: a.jsonl, measure: [x], group: tsk, limit: 0}\n  b: {split: test}\n  c: 3\n"
        "  d: {file: d.jsonl, measures: exact_match, fields: [q]}\n"
    )
    with pytest.raises(SuiteError) as caught:
        load_suite(str(path))
    said = str(caught.value).splitlines()
    for part in (
        "sets.a.measure: unknown key: did you mean 'measures'",
        "sets.a.group = 'tsk'",
        "sets.a.limit = 0",
        "sets.b: needs exactly one of task, file, hub",
        "sets.c = 3: must be a mapping",
        "sets.d.measures = 'exact_match'",
        "sets.d.fields = ['q']",
    ):
        assert any(part in line for line in said), (part, said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("sets: {a: {file: no.jsonl}}", "sets.a: file = .*no such file"),
        ("sets: {a: {file: rows.jsonl}}", "sets.a: row 1: no known form"),
        ("sets: [", "not readable YAML"),
        ("[]", "must be a mapping"),
        ("sets: {}", "`sets` must map"),
        ("stes: {}", "unknown keys stes"),
    ],
)
def test_suites_that_cannot_be_read(tmp_path, content, said):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    path = tmp_path / "s.yaml"
    path.write_text(content)
    with pytest.raises(SuiteError, match=said):
        load_suite(str(path))


def test_table_shows_what_is_undefined_and_why():
    empty = Result(None, 0, None, "d@1", True, {}, {"longer_than_context": 4}, "no item could be measured")
    lines = table({"s": {"exact_match": empty}}).splitlines()
    assert lines[1].split() == ["s", "exact_match", "undefined", "0", "d@1"]
    assert lines[2] == "s exact_match: 4 excluded: longer_than_context; no item could be measured"
