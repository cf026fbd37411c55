"""`python -m eval_harness` on several processes: the files of one, one voice, one message for an error of any."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from eval_harness.results import from_document
from tests.distributed.launcher import TORCHRUN, finished

pytestmark = pytest.mark.distributed

SUITE = """
sets:
  facts: {task: tiny_world/facts, limit: 40}
  written: {task: tiny_world/copy, limit: 10, measures: [exact_match], exact_match: generate}
  text: {task: tiny_world/text, limit: 6}
"""
MEASURED = ["--model", "model", "--out"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any, tiny_llama: Any) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    tiny_llama(initializer_range=0.4).save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    (folder / "suite.yaml").write_text(SUITE)
    return folder


def run(place: Path, processes: int, *arguments: str, module: str = "eval_harness") -> tuple[int, str]:
    """(exit code, what all processes printed)."""
    launcher = [sys.executable] if processes == 1 else [*TORCHRUN[:-1], str(processes)]
    asked = [*arguments, "--suite", "suite.yaml", "--device", "cpu"]
    return finished(launcher, asked, place, 240, module=module)


@pytest.fixture(scope="module")
def alone(place: Path) -> dict[str, Any]:
    code, printed = run(place, 1, *MEASURED, "one")
    assert code == 0, printed
    assert printed.count("\nset, measure ") == 1
    return json.loads((place / "one" / "results.json").read_text())


@pytest.mark.parametrize(("processes", "tokens"), [(2, None), (3, 64), (1, 100)])
def test_several_processes_and_other_batches_write_what_one_does(
    place: Path, alone: dict[str, Any], processes: int, tokens: int | None
) -> None:
    out = f"by{processes}"
    code, printed = run(place, processes, *MEASURED, out, *(["--batch-tokens", str(tokens)] if tokens else []))
    assert code == 0, printed
    assert printed.count("\nset, measure ") == 1  # one table
    assert printed.count("loading base from") == 1
    theirs = json.loads((place / out / "results.json").read_text())
    assert theirs["settings"] == alone["settings"]
    one, several = from_document(alone), from_document(theirs)
    assert one.keys() == several.keys() == {"facts", "written", "text"}
    for name in one:
        for kind, result in one[name].items():
            found = several[name][kind]
            assert list(found.per_item) == list(result.per_item)
            if kind == "exact_match":
                assert found.per_item == result.per_item
            assert found.per_item == pytest.approx(result.per_item, rel=1e-5), (name, kind)


def test_a_finished_folder_is_kept_by_any_number_of_processes(place: Path, alone: dict[str, Any]) -> None:
    code, printed = run(place, 2, *MEASURED, "one")
    assert code == 0, printed
    assert printed.count("kept, measured before") == 3
    assert "loading" not in printed
    assert json.loads((place / "one" / "results.json").read_text()) == alone


def test_an_error_is_said_once_and_the_launcher_ends_with_1(place: Path) -> None:
    code, printed = run(place, 2, "--model", "nowhere/at/all")
    assert code == 1  # torchrun's own code for any failure: ours was 2
    assert printed.count("error: nowhere/at/all: no such folder") == 1
    assert "exitcode  : 2" in printed
    assert "eval_harness/__main__.py" not in printed  # the launcher's traceback, none of ours


def test_an_error_on_the_second_process_ends_both(place: Path) -> None:
    """The second process finds another folder than the first: its tokenizer is gone there."""
    code = (
        "import os, sys; from eval_harness import __main__ as m, checkpoint as c; true = c.load_tokenizer\n"
        "def gone(place):\n"
        "    if os.environ['RANK'] == '1': raise c.LoadError('the tokenizer is gone here')\n"
        "    return true(place)\n"
        "c.load_tokenizer = gone; code = m.main(sys.argv[1:]); sys.stderr.flush(); os._exit(code)\n"
    )
    (place / "gone.py").write_text(code)
    ended, printed = run(place, 2, "--model", "model", module="gone")
    assert ended != 0
    assert printed.count("error: the tokenizer is gone here") == 1
