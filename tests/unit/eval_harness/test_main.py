"""The command line: a table, files that are gone on from, one line per problem."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eval_harness import run
from eval_harness.__main__ import _parser, main
from eval_harness.errors import Interrupted
from eval_harness.progress import Progress, Silent
from eval_harness.result_table import table
from eval_harness.results import Result, from_document, from_items, schema

SUITE = """
description: two sets
sets:
  words: {file: words.jsonl, limit: 5, fields: {question: q, answer: a}}
  text: {file: text.jsonl, group: general}
"""
ARGUMENTS = ["--model", "model", "--suite", "suite.yaml", "--out", "out", "--device", "cpu"]


@pytest.fixture
def place(tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"q": f"word {i}?", "a": "river"} for i in range(8)]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "The capital of Italy is Rome."}) + "\n")
    (tmp_path / "suite.yaml").write_text(SUITE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def document(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_as_a_process(place: Path, root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "eval_harness", *ARGUMENTS, "--limit", "3", "--batch-tokens", "64"],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["set,", "measure", "value", "n"]
    assert [line.split()[0] for line in lines[1:6]] == ["words", "exact_match", "answer_loss", "text", "bits_per_byte"]
    assert max(map(len, lines)) <= 80
    assert any("words (1 of 2): 100 %" in line for line in done.stderr.splitlines())
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", done.stdout + done.stderr)  # neither is a terminal
    found = document(place / "out" / "results.json")
    results = from_document(found)
    assert (found["model"], found["limit"], found["dtype"]) == ("model", 3, "auto")
    assert results["words"]["answer_loss"].n == 3
    assert f"{results['words']['answer_loss'].value:.4f} ± " in lines[3]
    one = from_document(document(place / "out" / "words.json"))
    assert one == {"words": results["words"]}


def test_the_documents_are_of_the_published_schema(place: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    assert main(ARGUMENTS) == 0
    for name in ("results", "words", "text"):
        jsonschema.validate(document(place / "out" / f"{name}.json"), schema())
    settings = document(place / "out" / "results.json")["settings"]
    assert settings["text"]["prompting"] == "text"
    assert settings["words"]["prompting"].startswith("chat:")


# ---- what a second call keeps -------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the sets that were measured, not kept."""
    names: list[str] = []
    true = run.measure

    def spy(model: Any, tokenizer: Any, sets: Any, **how: Any) -> Any:
        names.extend(one.name for one in sets)
        return true(model, tokenizer, sets, **how)

    monkeypatch.setattr(run, "measure", spy)
    return names


def test_a_second_call_keeps_what_is_equal(
    place: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(ARGUMENTS) == 0
    first, out = document(place / "out" / "results.json"), capsys.readouterr().out
    measured.clear()
    assert main(ARGUMENTS) == 0
    second = capsys.readouterr()
    assert measured == []
    assert "words: kept, measured before" in second.err
    assert "loading" not in second.err
    assert (document(place / "out" / "results.json"), second.out) == (first, out)


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (["--limit", "2"], ["words"]),  # the one text stays one text
        (["--seed", "1"], []),  # nothing is drawn
    ],
)
def test_a_second_call_measures_what_changed(
    place: Path, measured: list[str], change: list[str], again: list[str]
) -> None:
    assert main(ARGUMENTS) == 0
    measured.clear()
    assert main([*ARGUMENTS, *change]) == 0
    assert measured == again


def test_a_folder_is_of_one_model(
    place: Path, measured: list[str], make_model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(ARGUMENTS) == 0
    before = (place / "out" / "results.json").read_text()
    measured.clear()
    assert main([*ARGUMENTS, "--dtype", "bfloat16"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: out: holds results of model (weights ")
    assert "dtype auto, quantization trained" in said
    assert said.endswith("dtype bfloat16, quantization trained): give another folder with --out, or delete out")
    make_model(len(tokenizer), seed=5).save_pretrained(place / "model")  # other weights of the same name
    (place / "out" / "results.json").unlink()
    assert main(ARGUMENTS) == 2  # words.json and text.json say whose they are
    assert main([*ARGUMENTS[:4], "--out", "other", "--device", "cpu"]) == 0
    assert measured == ["words", "text"]
    assert document(place / "other" / "results.json")["results"] != json.loads(before)["results"]


def test_files_of_sets_that_are_not_asked_for_are_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ARGUMENTS) == 0
    assert "also holds" not in capsys.readouterr().err
    (place / "suite.yaml").write_text("sets: {text: {file: text.jsonl, group: general}}")
    (place / "out" / "mine.json").write_text("{}")  # no measurement
    assert main(ARGUMENTS) == 0
    assert "out also holds words.json, measured earlier; results.json does not" in capsys.readouterr().err
    assert list(document(place / "out" / "results.json")["results"]) == ["text"]


def test_a_damaged_file_is_measured_again(place: Path, measured: list[str]) -> None:
    assert main(ARGUMENTS) == 0
    good = (place / "out" / "words.json").read_text()
    (place / "out" / "words.json").write_text(good[: len(good) // 2])
    measured.clear()
    assert main(ARGUMENTS) == 0
    assert measured == ["words"]
    assert document(place / "out" / "words.json")["results"] == json.loads(good)["results"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_call_keeps_the_sets_before(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    assert main(ARGUMENTS) == 0
    whole = document(place / "out" / "results.json")["results"]
    for name in ("text.json", ".cache"):
        (place / "out" / name).unlink()
    true = run.measure

    def signalled(model: Any, tokenizer: Any, sets: Any, *, should_stop: Any, **how: Any) -> Any:
        os.kill(os.getpid(), number)
        assert should_stop()
        return true(model, tokenizer, sets, should_stop=should_stop, **how)

    with monkeypatch.context() as patch:
        patch.setattr(run, "measure", signalled)
        assert main(ARGUMENTS) == code
    assert "interrupted; what was measured is in out" in capsys.readouterr().err
    assert not (place / "out" / "results.json").exists()
    assert (place / "out" / "words.json").exists()
    assert main(ARGUMENTS) == 0
    assert document(place / "out" / "results.json")["results"] == whole


def test_signals_are_as_before_afterwards(place: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    main(ARGUMENTS)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# ---- combined quantities, lists, bad input ---------------------------------------------------------------


def test_combined_quantities_are_results_too(place: Path) -> None:
    rows = [{"question": f"word {i}?", "answer": "river"} for i in range(4)]
    (place / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    (place / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[2:]))
    text = "sets: {a: {file: a.jsonl, measures: [min_k]}, b: {file: b.jsonl, measures: [min_k]}}\n"
    text += "combined: {attack: {measure: membership_auc, members: a, nonmembers: b}}"
    (place / "suite.yaml").write_text(text)
    assert main(ARGUMENTS) == 0
    results = from_document(document(place / "out" / "results.json"))
    low, high = results["a"]["min_k"].per_item.values(), results["b"]["min_k"].per_item.values()
    wins = sum((one < other) + 0.5 * (one == other) for one in low for other in high)
    assert results["attack"]["membership_auc"].value in (wins / 4, 1 - wins / 4)


def test_list_shows_sets_and_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n{name}\n" in f"\n{text}" for name in ("general", "memorisation", "reading", "tiny_world"))
    assert main(["--list", "--suite", "tiny_world", "--limit", "70"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny_world"
    assert lines[2].split() == ["facts", "70", "rows", "task", "tiny_world/facts"]
    assert lines[-1].split() == ["text", "50", "rows", "task", "tiny_world/text"]
    assert main(["--list", "--suite", "tiny_wrld"]) == 2


def test_list_imports_nothing_heavy(root: Path) -> None:
    code = (
        "import sys; from eval_harness.__main__ import main; main(['--list']); "
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy', 'lm_eval') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert out.stdout.splitlines()[-1] == "[]"


def test_compare_is_a_command_of_its_own(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS[:4], "--out", "a", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main(["compare", "a", "a"]) == 0
    assert "answer_loss" in capsys.readouterr().out
    assert main(["compare", "a", "nowhere"]) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "suite.yaml"], ["--model and --suite are needed"]),
        (["--model", "nowhere/at/all", "--suite", "suite.yaml"], ["nowhere/at/all: no such folder"]),
        (["--model", "nobody/nothing-here", "--suite", "suite.yaml"], ["nobody/nothing-here: no such folder, and not"]),
        (["--model", "model", "--suite", "suite.yaml", "--revision", "v1"], ["model: is here already, so a revision"]),
        (
            ["--model", "model", "--suite", "tiny_wrld,none.yaml"],
            ["did you mean 'tiny_world'", "none.yaml: no such file"],
        ),
        (["--model", "model", "--suite", "suite.yaml", "--out", "words.jsonl"], ["--out words.jsonl: cannot be made"]),
        (
            ["--model", "model", "--suite", "suite.yaml,suite.yaml"],
            ["--suite suite.yaml,suite.yaml: 'words' is the name of two sets", "'text' is the name of two sets"],
        ),
        (["--model", "model", "--suite", "tiny_world", "--data", "no"], ["--data no: no such folder"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_per_problem_and_code_2(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: list[str]
) -> None:
    assert main([*arguments, "--limit", "1", "--device", "cpu"]) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == len(said), lines
    for line, part in zip(errors, said, strict=True):
        assert part in line


@pytest.mark.parametrize("given", [["--limit", "0"], ["--seed", "-1"], ["--dtype", "int8"], ["--batch-tokens", "x"]])
def test_bad_numbers_are_refused_by_name(capsys: pytest.CaptureFixture[str], given: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(given)
    assert caught.value.code == 2
    assert given[0] in capsys.readouterr().err


def test_every_option_stands_on_its_page(root: Path) -> None:
    page = (root / "docs" / "evaluate.md").read_text(encoding="utf-8")
    options = {name for action in _parser()._actions for name in action.option_strings if name.startswith("--")}
    assert set(re.findall(r"^\| `(--[\w-]+)` \|", page, re.MULTILINE)) == options - {"--help"}


def test_an_lm_eval_set_is_known_by_its_task_files(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter is replaced: what is asked here is when it is called, and with what."""
    pytest.importorskip("lm_eval")
    asked = []

    def replaced(model: Any, tokenizer: Any, sets: Any, **how: Any) -> Any:
        asked.append((sets[0].task, sets[0].apply_chat_template))
        return {"w": {"acc": Result(0.5, 2, None, "d@1", True, {"a": 0.0, "b": 1.0})}}

    monkeypatch.setattr("eval_harness.lm_eval_adapter.run", replaced)
    monkeypatch.setattr("eval_harness.lm_eval_adapter.check", lambda sets: None)
    (place / "tasks").mkdir()
    (place / "tasks" / "mine.yaml").write_text("task: mine")
    (place / "suite.yaml").write_text("sets: {w: {lm_eval: mine, include_path: tasks, chat_template: auto}}")
    assert main(ARGUMENTS) == main(ARGUMENTS) == 0
    assert asked == [("mine", True)]
    (place / "tasks" / "mine.yaml").write_text("task: mine\nnum_fewshot: 3")
    assert main(ARGUMENTS) == 0
    assert len(asked) == 2
    assert "0.5000" in capsys.readouterr().out
    # What --out holds is no task file, though it lies in the folder of task files.
    (place / "suite.yaml").write_text("sets: {w: {lm_eval: mine, include_path: .}, text: {file: text.jsonl}}")
    again = [*ARGUMENTS[:4], "--out", "here", "--device", "cpu"]
    assert main(again) == main(again) == 0
    assert len(asked) == 3
    (place / "data.json").write_text("[1]")
    assert main(again) == 0
    assert len(asked) == 4


def test_table_says_what_is_undefined_and_why_once() -> None:
    empty = from_items([], definition="d@1", higher_is_better=True, excluded={"longer_than_context": 4})
    assert table({"s": {"exact_match": empty}}).splitlines() == [
        "set, measure                          value                                   n",
        "s",
        "  exact_match                         undefined                               0",
        "",
        "  no item could be measured: 4 longer_than_context: s (exact_match)",
        "",
        "definitions",
        "  d@1: s",
    ]


def test_table_says_each_remark_and_definition_once_in_80_columns() -> None:
    def one(kind: str) -> Result:
        return Result(0.25, 40, 0.07, f"{kind}@1(sum,plain)", True, {}, {"longer_than_context": 2}, "chance level 0.25")

    long = Result(12345678.9, 10**6, 1e-9, f"lm_eval:acc@1.0({','.join(f'task=t{i}' for i in range(40))})", True)
    names = [f"set_{i}" for i in range(30)]
    results = {name: {kind: one(kind) for kind in ("acc", "acc_norm")} for name in names}
    results[f"group/{'x' * 90}"] = {"a_measure_of_a_name_that_is_longer_than_its_column": long}
    text = table(results)
    assert max(map(len, text.splitlines())) == 80
    words = " ".join(text.split())
    assert words.count("chance level 0.25: set_0 (acc, acc_norm), set_1 (acc, acc_norm),") == 1
    assert words.count("2 excluded, longer_than_context: set_0 (acc, acc_norm)") == 1
    assert words.count("acc@1(sum,plain): set_0, set_1,") == 1
    assert "1.235e+07 ± 1e-09" in words


# ---- progress ---------------------------------------------------------------------------------------


def test_plain_lines_come_every_ten_seconds_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    with Progress(clock=lambda: now[0]) as progress:
        progress.begin("facts (1 of 2)")
        for done in range(1, 101):
            now[0] += 0.5
            progress(done, 100)
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert lines == [f"facts (1 of 2): {done} %" for done in (1, 21, 41, 61, 81, 100)]


def test_progress_is_a_share_that_never_says_all_too_early(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(clock=lambda: 0.0) as progress:
        progress.begin("facts")
        progress.said = -1e9
        progress(199, 200)
        progress(200, 200)
        progress(200, 200)  # the last of several parts that end at once
    assert [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()] == ["facts: 99 %", "facts: 100 %"]


def test_one_line_moves_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")

    class Terminal:
        text = ""

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            self.text += text
            return len(text)

        def flush(self) -> None:
            """Nothing is held back."""

    terminal: Any = Terminal()
    with Progress(terminal) as progress:
        progress.begin("facts [red]")
        progress(3, 4)
        progress.say("kept [red]")
        progress.bar.refresh()
    assert "75%" in terminal.text
    assert "kept [red]" in terminal.text
    assert "facts [red]" in terminal.text
    terminal.text = ""
    monkeypatch.setenv("TERM", "dumb")
    with Progress(terminal) as progress:
        progress.begin("facts")
        progress(4, 4)
    assert terminal.text.endswith("facts: 100 %\n")
    assert "\x1b" not in terminal.text


def test_processes_that_do_not_speak(capsys: pytest.CaptureFixture[str]) -> None:
    with Silent() as progress:
        progress.begin("facts")
        progress(1, 1)
        progress.say("kept")
    assert capsys.readouterr().err == ""


def test_interrupted_is_no_error_of_ours() -> None:
    from eval_harness.__main__ import BAD_INPUT

    assert not issubclass(Interrupted, BAD_INPUT)
