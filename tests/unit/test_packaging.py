"""What `pip install .` puts on a machine: everything that a user names, and that it works from there.

One wheel is built from the checkout and one from the sdist; the first is installed into an empty
environment that sees today's dependencies through a .pth file, so nothing is downloaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest


def run(*command: str | Path, cwd: Path, timeout: int = 300, **env: str) -> str:
    """Run to success and return what was printed; on failure show it."""
    # A PYTHONPATH of the caller would lead back to the checkout.
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | env,
        timeout=timeout,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout}"
    return done.stdout


def build(source: Path, out: Path, *options: str) -> Path:
    """Build what `options` say with the installed hatchling; return the wheel."""
    run(sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", out, source, cwd=out)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(root, tmp_path_factory.mktemp("wheel"), "--wheel")


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds our wheel and, behind it, today's dependencies."""
    home = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    install = ("-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    run(sys.executable, *install, cwd=home)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    # Lines of a .pth are appended as they are: an editable install of ours behind them stays unseen.
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return python


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_what_a_user_names(root: Path, wheel: Path) -> None:
    def placed(pattern: str, folder: str = "") -> set[str]:
        files = {f"{folder}{path.relative_to(root)}" for path in root.glob(pattern)}
        assert files, f"the checkout has no {pattern}"
        return files

    expected = placed("recipes/**/*.yaml", "cpt/bundled/") | placed("recipes/*.py", "cpt/bundled/")
    expected |= placed("launch/accelerate/*.yaml", "cpt/bundled/")
    expected |= placed("launch/deepspeed/*.json", "cpt/bundled/")
    expected |= placed("cpt/report/assets/*") | placed("constraints.txt", "cpt/bundled/")
    expected |= placed("cpt/assets/tiny_world/*") | placed("eval_harness/suites/*.yaml")
    expected |= placed("cpt/**/*.py") | placed("eval_harness/**/*.py")
    assert expected - names(wheel) == set()
    assert "cpt/assets/tiny_world/model.safetensors" in names(wheel)


def test_wheel_holds_nothing_else(wheel: Path) -> None:
    assert {name.split("/")[0] for name in names(wheel)} == {"cpt", "eval_harness", "cpt-0.1.0.dist-info"}
    assert not [name for name in names(wheel) if "__pycache__" in name or name.endswith(".pyc")]
    assert "cpt-0.1.0.dist-info/licenses/LICENSE" in names(wheel)


def test_wheel_from_the_sdist_is_the_same(root: Path, wheel: Path, tmp_path: Path) -> None:
    assert names(build(root, tmp_path)) == names(wheel)


def test_installed_packages_import_from_the_environment(python: Path, tmp_path: Path) -> None:
    where = "import cpt, eval_harness; print(cpt.__file__); print(eval_harness.__file__)"
    found = run(python, "-c", where, cwd=tmp_path).splitlines()
    assert all(Path(line).is_relative_to(python.parents[1]) for line in found), found


def test_the_version_is_said_once(python: Path, tmp_path: Path) -> None:
    both = "import cpt, importlib.metadata as m; print(cpt.__version__ == m.version('cpt'), cpt.__version__)"
    assert run(python, "-c", both, cwd=tmp_path).split() == ["True", "0.1.0"]


def test_installed_command_helps(python: Path, tmp_path: Path) -> None:
    printed = run(python.with_name("cpt"), "--help", cwd=tmp_path, COLUMNS="100")
    assert "validate" in printed
    assert "run" in printed


def test_installed_command_validates_a_bundled_recipe(python: Path, tmp_path: Path) -> None:
    assert "nothing wrong" in run(python.with_name("cpt"), "validate", "quickstart", cwd=tmp_path)


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "world"), [("one_process_cpu", 1), ("two_processes_cpu", 2)])
def test_launch_file_starts_as_many_ranks_as_it_says(
    root: Path, tmp_path: Path, require, name: str, world: int
) -> None:
    """accelerate starts one process and exits 0 for a MULTI_CPU file: count what really runs."""
    import torch

    require("two_ranks", torch.distributed.is_gloo_available(), "torch was built without gloo")
    script = tmp_path / "rank.py"
    script.write_text(
        "from transformers import TrainingArguments\n"
        "import torch\n"
        "from pathlib import Path\n"
        f"arguments = TrainingArguments(output_dir={str(tmp_path / 'out')!r}, use_cpu=True)\n"
        f"said = Path({str(tmp_path)!r}, f'rank{{arguments.process_index}}.txt')\n"
        "said.write_text(str(arguments.world_size))\n"
        "if torch.distributed.is_initialized():\n"
        "    torch.distributed.destroy_process_group()\n"
    )
    config = root / "launch" / "accelerate" / f"{name}.yaml"
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", config)
    run(*launch, "--main_process_port", "0", script, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert {file.name: file.read_text() for file in tmp_path.glob("rank?.txt")} == {
        f"rank{rank}.txt": str(world) for rank in range(world)
    }
