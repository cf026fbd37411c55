"""The tests' own machinery: a skip for what CI requires is a failure there, and every kind is counted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = {
    "unit/test_a.py": "from tests.plugins import require\n"
    "def test_needs_data(): require('shared', False, 'no data folder')\n"
    "def test_holds(): assert True\n",
    "parity/test_b.py": "def test_breaks(): assert 1 == 2\n",
}


def run_pytest(root: Path, folder: Path, *options: str, required: str = "") -> subprocess.CompletedProcess[str]:
    """Run TESTS in `folder` with our plugin, in a process of their own."""
    for name, text in TESTS.items():
        path = folder / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib -p tests.plugins\n")
    env = os.environ | {"CPT_REQUIRE": required, "PYTHONPATH": str(root)}
    env = {key: value for key, value in env.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", *options, "tests"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["one process", "xdist"])
def test_last_lines_count_every_kind(root: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    done = run_pytest(root, tmp_path, *options)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-7:-1] == [
        "unit:        1 passed, 0 failed, 1 skipped",
        "contract:    0 passed, 0 failed, 0 skipped",
        "parity:      0 passed, 1 failed, 0 skipped",
        "distributed: 0 passed, 0 failed, 0 skipped",
        "e2e:         0 passed, 0 failed, 0 skipped",
        "browser:     0 passed, 0 failed, 0 skipped",
    ]


def test_a_required_skip_fails(root: Path, tmp_path: Path) -> None:
    done = run_pytest(root, tmp_path, required="shared,two_ranks")
    assert "unit:        1 passed, 1 failed, 0 skipped" in done.stdout
    assert "no data folder; CPT_REQUIRE says shared must be here" in done.stdout


def test_a_misspelt_requirement_stops_the_run(root: Path, tmp_path: Path) -> None:
    done = run_pytest(root, tmp_path, required="sharde")
    assert done.returncode == 4
    known = "['bitsandbytes', 'browser', 'deepspeed', 'lm_eval', 'shared', 'two_ranks']"
    assert f"CPT_REQUIRE names ['sharde']; requirements are {known}" in done.stderr


def test_require_refuses_an_undeclared_name(require) -> None:
    with pytest.raises(ValueError, match="'gpu' is no requirement"):
        require("gpu", True, "no accelerator")
