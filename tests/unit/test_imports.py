"""The import directions are kept by a linter; here the linter is shown to bite.

Each case adds one forbidden import to a copy of the tree and expects `lint-imports` to name it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PACKAGES = ("cpt", "eval_harness", "recipes")
FREE = {"cpt.cli", "cpt.__main__"}  # the top: it may import everything, and nobody imports it

ARROWS = [
    ("eval_harness/rows.py", "import cpt.errors", "eval_harness.rows -> cpt.errors"),
    ("eval_harness/metrics/__init__.py", "import eval_harness.results", "eval_harness.metrics -> "),
    ("cpt/losses/a_loss.py", "import cpt.data", "cpt.losses.a_loss -> cpt.data"),
    ("cpt/losses/a_loss.py", "import cpt.added_later", "cpt.losses.a_loss -> cpt.added_later"),
    ("cpt/evaluation.py", "import cpt.trainers.sft", "cpt.evaluation -> cpt.trainers.sft"),
    ("cpt/data/__init__.py", "import cpt.methods.base", "cpt.data -> cpt.methods.base"),
    ("cpt/data/__init__.py", "import eval_harness.scoring", "cpt.data -> eval_harness.scoring"),
    ("cpt/methods/hft.py", "import cpt.trainers.plug", "cpt.methods.hft -> cpt.trainers.plug"),
    ("cpt/methods/replay.py", "import cpt.config", "cpt.methods.replay -> cpt.config"),
    ("cpt/trainers/plug.py", "import cpt.stream", "cpt.trainers.plug -> cpt.stream"),
    ("cpt/rewards/text.py", "import cpt.stream", "cpt.rewards.text -> cpt.stream"),
    ("cpt/adapters/spec.py", "import cpt.config", "cpt.adapters.spec -> cpt.config"),
    ("cpt/config.py", "import cpt.stream", "cpt.config -> cpt.stream"),
    ("cpt/config.py", "import cpt.methods.hft", "cpt.config -> cpt.methods.hft"),
    ("cpt/report/__init__.py", "import cpt.run_dir", "cpt.report -> cpt.run_dir"),
    ("cpt/stream.py", "import cpt.cli", "cpt.stream -> cpt.cli"),
    ("recipes/__init__.py", "import cpt.stream", "recipes -> cpt.stream"),
]


@pytest.fixture
def tree(root: Path, tmp_path: Path) -> Path:
    """A copy of our Python files and the linter's configuration."""
    only_python = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.json", "*.yaml", "*.md")
    for package in PACKAGES:
        shutil.copytree(root / package, tmp_path / package, ignore=only_python)
    shutil.copy(root / "pyproject.toml", tmp_path)
    (tmp_path / "cpt" / "losses").mkdir(exist_ok=True)
    (tmp_path / "cpt" / "losses" / "__init__.py").touch()
    (tmp_path / "cpt" / "added_later.py").write_text('"""A module that no contract has heard of."""\n')
    return tmp_path


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    """Run lint-imports in `tree`, whose packages win over installed ones."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=120, check=False)


def test_the_tree_keeps_its_directions(tree: Path) -> None:
    done = lint(tree)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(("file", "line", "arrow"), ARROWS, ids=[arrow.strip() for *_, arrow in ARROWS])
def test_a_new_arrow_fails(tree: Path, file: str, line: str, arrow: str) -> None:
    with (tree / file).open("a") as source:
        source.write(f"\n{line}\n")
    done = lint(tree)
    assert done.returncode == 1, done.stdout + done.stderr
    assert arrow in done.stdout


def test_every_module_of_cpt_has_a_row(root: Path) -> None:
    """A module that is added must say what it may import, or it may import everything."""
    config = tomllib.loads((root / "pyproject.toml").read_text())
    contracts = config["tool"]["importlinter"]["contracts"]
    rows = {module.removesuffix(".**") for contract in contracts for module in contract["source_modules"]}
    children = {f"cpt.{path.stem}" for path in (root / "cpt").glob("*.py") if path.stem != "__init__"}
    children |= {f"cpt.{path.parent.name}" for path in (root / "cpt").glob("*/__init__.py")}
    assert children - rows - FREE == set(), "add a row to [tool.importlinter] in pyproject.toml"
