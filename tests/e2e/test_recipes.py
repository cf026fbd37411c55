"""Every shipped recipe: short, found, copied, and run by name, as a script and under a launcher."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt import ConfigError, Run, Stream, run
from cpt.recipe_book import copy, recipes, text
from cpt.resources import bundled
from cpt.validate import problems, unchecked
from eval_harness.rows import canonical

pytestmark = pytest.mark.e2e

FOLDER = bundled("recipes")
MODULES = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem not in ("__init__", "tiny_base"))
FEW = ["training.max_steps=2", "training.per_device_train_batch_size=16", "training.logging_steps=1"]
ALONE = {  # what else makes a recipe short
    "sft_then_rft": ["stages.0.training.max_steps=2", "stages.1.training.max_steps=2", "training.warmup_steps=0"],
    "evaluate": [],
}


def few(name: str) -> list[str]:
    """Overrides under which a recipe takes seconds."""
    return [*([] if name == "evaluate" else FEW), *ALONE.get(name, [])]


def tiny(name: str) -> list[str]:
    """The classic recipe asks the Hub: its structure, over rows in memory. Sets of a few rows."""
    if name == "classic_stream":
        return [*few(name), *small(Stream.from_yaml(FOLDER / "classic_stream.yaml"))]
    few_sets = "evaluation.general={copy: {task: tiny_world/copy, limit: 4}, text: {task: tiny_world/text, limit: 4}}"
    stages = Stream.from_yaml(FOLDER / f"{name}.yaml").stages
    limits = [f"stages.{i}.test.limit=4" for i, stage in enumerate(stages) if stage.test and stage.test.task]
    return [*few(name), few_sets, *limits]


def small(stream: Stream) -> list[str]:
    """Overrides that put rows in memory, and the tiny model, in the place of names on the Hub."""
    row = {"prompt": "Copy these letters: abc", "completion": "abc"}
    found = ["model=tiny-world"]
    for i, stage in enumerate(stream.stages):
        rows = [{"text": "One morning a fox."}] * 100 if stage.kind == "pretrain" else [row] * 20
        found += [f"stages.{i}.data={source(rows)}"]
        found += [f"stages.{i}.test={source([row])}"] if stage.test else []
        for key in stage.method_sources():
            found += [f"stages.{i}.{key}={source([row] * 20)}"]
    return [*found, f"evaluation.general={yaml.safe_dump({'copy': {'rows': [row]}}, default_flow_style=True)}"]


def source(rows: list[dict[str, str]]) -> str:
    return yaml.safe_dump({"rows": rows}, default_flow_style=True, width=10**6).strip()


def test_there_is_a_module_and_a_real_stream_for_each() -> None:
    assert [
        *("classic_stream", "evaluate", "pretrain_stream", "quickstart", "rft_stream", "sft_stream", "sft_then_rft")
    ] == MODULES
    names = {one.name for one in recipes()}
    for name in MODULES:
        assert name in names
        assert f"real/{name}" in names or name == "classic_stream"
        assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= 90
    for one in recipes():
        if one.needs:
            assert all(size in one.file.read_text() for size in ("0.5B", "1.5B", "7B"))


@pytest.mark.parametrize("name", [one.name for one in recipes() if one.kinds != ("sweep",)])
def test_every_recipe_is_valid(name: str) -> None:
    stream = Stream.from_yaml(name)
    assert problems(stream) == []
    assert bool(unchecked(stream)) == bool(next(one for one in recipes() if one.name == name).needs)


@pytest.mark.parametrize("name", [one.name for one in recipes() if one.needs])
def test_every_commented_size_is_valid_and_every_launch_file_there(name: str) -> None:
    said = (FOLDER / f"{name}.yaml").read_text()
    sizes = re.findall(r"^# model: (\{[^}]*\})", said, re.MULTILINE)
    assert len(sizes) == 2
    for size in sizes:
        assert problems(Stream.from_yaml(name, [f"model={size}"])) == []
    for file in re.findall(r"launch/\S+\.(?:json|yaml)", said):
        assert (bundled("launch").parent / file).is_file()


# The data sets that recipes name, as their pages on the Hub show them: splits, and a row without what we do not read.
ON_THE_HUB: dict[str, tuple[set[str], dict[str, Any]]] = {
    "locuslab/TOFU": ({"train"}, {"question": "Who?", "answer": "She."}),
    "HuggingFaceTB/smoltalk": (
        {"train", "test"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    ),
    "google-research-datasets/mbpp": ({"train", "test", "validation", "prompt"}, {"text": "Add.", "code": "a + b"}),
    "databricks/databricks-dolly-15k": ({"train"}, {"instruction": "Why?", "context": "", "response": "So."}),
    "wikimedia/wikipedia": ({"train"}, {"title": "Fox", "text": "A fox is an animal."}),
    "HuggingFaceTB/cosmopedia-100k": ({"train"}, {"prompt": "Write a story.", "text": "One morning."}),
}


@pytest.mark.parametrize("name", [one.name for one in recipes() if one.name.startswith("real/")])
def test_columns_and_splits_are_those_of_the_hub(name: str) -> None:
    for stage in Stream.from_yaml(name).stages:
        kind = "text" if stage.kind == "pretrain" else "completion"
        for source in [*stage.data, *([stage.test] if stage.test else [])]:
            if source.hub:
                splits, row = ON_THE_HUB[source.hub]
                assert source.split in splits
                found = canonical(row, source.fields)
                assert found.kind == kind
                assert kind == "text" or found.separator  # joined literally, question and answer would touch
        for source in [one for part in stage.method_sources().values() for one in part if one.hub]:
            splits, row = ON_THE_HUB[source.hub]
            assert source.split in splits
            canonical(row, source.fields)


def as_a_script(name: str) -> None:
    """Run a recipe's module to its end, which is exit code 0."""
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0


@pytest.mark.parametrize("name", MODULES)
def test_the_script_runs_its_own_stream(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *tiny(name)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    as_a_script(name)
    said = capsys.readouterr().out
    page = Path(said.rsplit("open ", 1)[1].strip())
    assert page.name == "report.html"
    assert page.is_file()
    assert Run.open(tmp_path / "runs" / name).stages()


def test_a_reward_of_the_recipes_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rft_stream.py", "--own", *few("rft_stream")])
    monkeypatch.setattr(sys, "path", list(sys.path))
    as_a_script("rft_stream")
    rewards = Run.open(tmp_path / "runs" / "rft_stream").find("new_sums").done()["facts"]["rewards"]
    assert [one["raised"] for one in rewards.values()] == [0, 0]
    assert any("near" in name for name in rewards)


@pytest.mark.parametrize(
    "name", ["sft_stream", *(pytest.param(n, marks=pytest.mark.slow) for n in MODULES if n != "sft_stream")]
)
def test_accelerate_starts_a_copy(name: str, tmp_path: Path) -> None:
    """Copied by `cpt cp`, started as the recipe's header says."""
    mine = copy(name, tmp_path / "mine.yaml")
    accelerate = shutil.which("accelerate", path=str(Path(sys.executable).parent))
    assert accelerate
    launch = [accelerate, "launch", "--num_processes", "1", "--cpu", str(FOLDER / f"{name}.py")]
    done = subprocess.run(
        [*launch, "--config", str(mine), *tiny(name)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "report.html" in done.stdout


@pytest.mark.parametrize("name", [one.name for one in recipes() if one.name.startswith("real/") and one.kinds])
def test_the_structure_of_a_real_stream_trains(name: str, tmp_path: Path) -> None:
    """Its methods, adapters, rewards and schedule, on the tiny model and a few rows."""
    stream = Stream.from_yaml(name)
    rewarded = "rft" in {stage.kind for stage in stream.stages}
    short = ["training.max_steps=2", "training.gradient_accumulation_steps=1"]
    short += [] if rewarded else ["training.max_length=128"]
    for i, stage in enumerate(stream.stages):
        short += [f"stages.{i}.training.max_steps=2"]
        short += [f"stages.{i}.training.max_completion_length=4"] if stage.kind == "rft" else []
    short += [f"training.per_device_train_batch_size={40 if 'pretrain' in name else 16}", f"output_dir={tmp_path}"]
    done = run(Stream.from_yaml(name, [*short, *small(stream)]), say=lambda line: None)
    assert [folder.done() is not None for folder in done.stages()[1:]] == [True] * len(stream.stages)


def test_a_copy_keeps_every_letter_and_writes_over_nothing(tmp_path: Path) -> None:
    made = copy("quickstart", tmp_path / "deep" / "my.yaml")
    assert made.read_text() == (FOLDER / "quickstart.yaml").read_text()
    made.write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        copy("quickstart", made)
    assert copy("real/sft_stream", made, force=True).read_text() == (FOLDER / "real" / "sft_stream.yaml").read_text()
    assert copy("quickstart", tmp_path) == tmp_path / "quickstart.yaml"
    with pytest.raises(ConfigError, match=r"write .*my\.txt\.yaml"):
        copy("quickstart", tmp_path / "my.txt")
    with pytest.raises(ConfigError, match="Did you mean 'quickstart'"):
        copy("quickstar", tmp_path / "a.yaml")


def test_the_list_fits_a_terminal() -> None:
    listed = text(recipes())
    assert max(map(len, listed.splitlines()[:-1])) <= 80
    assert listed.index("real/quickstart") > listed.index("quickstart_naive")  # what needs nothing stands first


@pytest.mark.parametrize("given", [["--config", "nope.yaml"], ["foo=1"]])
def test_a_script_says_a_mistake_in_a_line(given: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "sft_stream.py"), *given]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
