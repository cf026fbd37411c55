"""Sources: real files of every format, and what each broken one says."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from eval_harness.rows import canonical
from eval_harness.sources import SourceError, fingerprint, read_rows, task_families

ROWS = [{"question": "2 + 2?", "answer": "4"}, {"question": 'Naïve, "quoted"\nline?', "answer": "b"}]


def write(path, name):
    target = path / name
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    if name.endswith(".jsonl"):
        target.write_text(lines + "\n", encoding="utf-8")
    elif name.endswith(".gz"):
        target.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".json"):
        target.write_text(json.dumps(ROWS), encoding="utf-8")
    elif name.endswith(".csv"):
        quoted = ['"' + row["question"].replace('"', '""') + f'",{row["answer"]}' for row in ROWS]
        target.write_text("question,answer\n" + "\n".join(quoted) + "\n", encoding="utf-8-sig")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), target)
    return target


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    assert read_rows(file=write(tmp_path, name)) == ROWS


def test_in_memory_and_task():
    assert read_rows(rows=ROWS) == ROWS
    rows = read_rows(task="tiny_world/facts", split="test")
    assert canonical(rows[0]).kind == "completion"
    assert "tiny_world" in task_families()


@pytest.mark.parametrize("given", [{}, {"file": "a.jsonl", "task": "b/c"}, {"rows": ROWS, "hub": "x"}])
def test_exactly_one_origin(given):
    with pytest.raises(SourceError, match="exactly one of hub, file, task, rows"):
        read_rows(**given)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', r"a\.jsonl:3: malformed JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"a\.jsonl:2: a line must be a JSON object, this is list"),
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl", b'{"a": "\xff"}', "not UTF-8"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.json", b'{"a": 1}', "must hold a list of objects, holds dict"),
        ("a.json", b'[\n{"a": 1},\n}', r"a\.json:3: malformed JSON"),
        ("a.json", b"[1]", r"a\.json\[0\]: a row must be an object, this is int"),
        ("a.csv", b"a,b\n1,2\n3\n", r"a\.csv:3: not the header's 2 columns"),
        ("a.csv", b"a,b\n1,2,3\n", r"a\.csv:2"),
        ("a.csv", b'a,b\n"1,2\n', "malformed CSV"),
        ("a.csv", b"a,b\n", "no rows"),
        ("a.parquet", b"PAR1 truncated", "not a readable parquet file"),
        ("a.txt", b"x", r"'\.txt' is not one of .*\.jsonl"),
    ],
)
def test_broken_files_name_the_place(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SourceError, match=said):
        read_rows(file=path)


def test_missing_files_name_their_neighbours(tmp_path):
    write(tmp_path, "facts.jsonl")
    with pytest.raises(SourceError, match=r"no such file\. Nearest.*facts\.jsonl"):
        read_rows(file=tmp_path / "fact.jsonl")
    with pytest.raises(SourceError, match="does not exist either"):
        read_rows(file=tmp_path / "nowhere" / "a.jsonl")
    with pytest.raises(SourceError, match="is a folder"):
        read_rows(file=tmp_path)


@pytest.mark.parametrize(
    ("task", "split", "said"),
    [
        ("tiny_wrld/facts", "test", "unknown family 'tiny_wrld'. Did you mean 'tiny_world'"),
        ("tiny_world/fact", "test", "no task 'fact'. Did you mean 'facts'"),
        ("tiny_world", "test", "no task ''"),
        ("tiny_world/facts", "dev", "split 'dev'"),
    ],
)
def test_unknown_tasks_suggest(task, split, said):
    with pytest.raises(SourceError, match=said):
        read_rows(task=task, split=split)


def test_empty_and_malformed_memory():
    with pytest.raises(SourceError, match=r"rows = .*no rows"):
        read_rows(rows=[])
    with pytest.raises(SourceError, match=r"rows\[1\]: a row must be an object"):
        read_rows(rows=[{"a": 1}, "b"])  # type: ignore[list-item]


def test_a_hub_name_offline_is_one_clear_error():
    with pytest.raises(SourceError, match=r"hub = 'nobody/nothing-here', split 'test': cannot be loaded: .*file:"):
        read_rows(hub="nobody/nothing-here", split="test")


def test_fingerprint_is_of_content_and_order():
    lines = b'{"a":1,"b":"x"}\n{"a":2,"b":"y"}\n'
    rows = [{"b": "x", "a": 1}, {"a": 2, "b": "y"}]
    assert fingerprint(rows) == hashlib.sha256(lines).hexdigest()
    assert fingerprint(iter(rows)) == fingerprint(rows) != fingerprint(rows[::-1])
    assert fingerprint([canonical(ROWS[0])]) != fingerprint([canonical(ROWS[1])])


@pytest.mark.parametrize(
    "module",
    [
        "eval_harness",
        "eval_harness.rows",
        "eval_harness.sources",
        "eval_harness.results",
        "eval_harness.measure",
        "eval_harness.__main__",
        "eval_harness.suite",
        "eval_harness.tasks.multiple_choice",
        "eval_harness.run",
        "eval_harness.launched",
        "eval_harness.hf",
        "eval_harness.metrics.stability",
        "eval_harness.metrics.continual",
    ],
)
def test_light_modules_import_nothing_heavy(module):
    code = (
        f"import sys, importlib; importlib.import_module({module!r}); "
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy', 'cpt') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names_resolve():
    import eval_harness

    for name in eval_harness.__all__:
        assert getattr(eval_harness, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = eval_harness.no_such_name
