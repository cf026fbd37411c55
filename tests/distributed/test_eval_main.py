"""`python -m eval_harness` on several processes: the files of one, one voice, one message for an error of any."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from eval_harness.results import from_document
from tests.plugins import require

pytestmark = pytest.mark.distributed

SUITE = """
sets:
  facts: {task: tiny_world/facts, limit: 40}
  written: {task: tiny_world/copy, limit: 10, measures: [exact_match], exact_match: generate}
  text: {task: tiny_world/text, limit: 6}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any, tiny_llama: Any) -> Path:
    require("two_ranks", dist.is_available() and dist.is_gloo_available(), "torch was built without gloo")
    folder = tmp_path_factory.mktemp("eval")
    tiny_llama(initializer_range=0.4).save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    (folder / "suite.yaml").write_text(SUITE)
    return folder


def run(root: Path, place: Path, processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "eval_harness", *arguments]
    return subprocess.run(
        [*command, "--suite", "suite.yaml", "--device", "cpu"],
        cwd=place,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def alone(root: Path, place: Path) -> dict[str, Any]:
    one = run(root, place, 1, "--model", "model", "--out", "one")
    assert one.returncode == 0, one.stderr
    assert one.stdout.count("\nfacts ") == 2  # a line per measure
    return json.loads((place / "one" / "results.json").read_text())


@pytest.mark.parametrize(("processes", "tokens"), [(2, None), (3, 64), (1, 100)])
def test_several_processes_and_other_batches_write_what_one_does(
    root: Path, place: Path, alone: dict[str, Any], processes: int, tokens: int | None
) -> None:
    out = f"by{processes}"
    extra = ["--batch-tokens", str(tokens)] if tokens else []
    done = run(root, place, processes, "--model", "model", "--out", out, *extra)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nfacts ") == 2  # one table
    assert done.stderr.count("loading base from") == 1
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


def test_a_finished_folder_is_kept_by_any_number_of_processes(root: Path, place: Path, alone: dict[str, Any]) -> None:
    again = run(root, place, 2, "--model", "model", "--out", "one")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("kept, measured before") == 3
    assert "loading" not in again.stderr
    assert json.loads((place / "one" / "results.json").read_text()) == alone


def test_an_error_is_said_once(root: Path, place: Path) -> None:
    bad = run(root, place, 2, "--model", "nowhere/at/all")
    assert bad.returncode != 0
    assert bad.stderr.count("error: nowhere/at/all: no such folder") == 1
    assert "eval_harness/__main__.py" not in bad.stderr  # the launcher's traceback, none of ours


def test_an_error_on_the_second_process_ends_both(root: Path, place: Path) -> None:
    """The second process finds another folder than the first: its tokenizer is gone there."""
    code = (
        "import os, sys; from eval_harness import __main__ as m, checkpoint as c; true = c.load_tokenizer\n"
        "def gone(place):\n"
        "    if os.environ['RANK'] == '1': raise c.LoadError('the tokenizer is gone here')\n"
        "    return true(place)\n"
        "c.load_tokenizer = gone; code = m.main(sys.argv[1:]); sys.stderr.flush(); os._exit(code)\n"
    )
    (place / "gone.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "gone.py"]
    done = subprocess.run(
        [*command, "--model", "model", "--suite", "suite.yaml", "--device", "cpu"],
        cwd=place,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.count("error: the tokenizer is gone here") == 1
