"""What a run leaves, what a second run keeps, and what a user takes away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt import Run, RunDirError, Stream, run
from cpt.ask import answers
from cpt.export import export
from cpt.report.summary import as_json, side_by_side, text

pytestmark = pytest.mark.e2e

STREAM = Path(__file__).with_name("stream.yaml")
SHORT = ["training.max_steps=4", "training.save_steps=2", "stages.stories.training.max_steps=4"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def go(*overrides: str, **options: Any) -> tuple[Run, list[str]]:
    """Run the small stream; what it said."""
    said: list[str] = []
    done = run(Stream.from_yaml(STREAM, [*SHORT, *overrides]), say=said.append, **options)
    return done, said


def stamps(done: Run) -> dict[str, float]:
    """When each stage's DONE and eval/DONE were written."""
    files = [*done.path.glob("stages/*/DONE"), *done.path.glob("stages/*/eval/DONE")]
    return {file.relative_to(done.path / "stages").as_posix(): file.stat().st_mtime_ns for file in files}


def test_a_run_leaves_what_the_layout_promises(here: Path) -> None:
    done, _ = go()
    names = {path.relative_to(done.path).as_posix() for path in done.path.rglob("*") if path.is_file()}
    for name in (
        *("run.json", "stream.yaml", "matrix.json", "stages/00_base/stage.json", "stages/00_base/eval/DONE"),
        *("stages/01_reverse/DONE", "stages/01_reverse/model/model.safetensors", "stages/01_reverse/metrics.jsonl"),
        *("stages/02_stories/eval/sums.json", "stages/02_stories/eval/DONE"),
    ):
        assert name in names
    kinds = {Path(name).suffix for name in names} - {""}
    assert kinds <= {".json", ".jsonl", ".yaml", ".safetensors", ".jinja", ".lock"}
    assert not list(done.path.glob("stages/*/checkpoints"))
    assert Stream.from_yaml(done.path / "stream.yaml") == Stream.from_yaml(STREAM, SHORT)
    facts = as_json([done.path])[done.path.name]["stages"]["01_reverse"]
    assert facts["rows"]["replay"]["rows"] == 200
    assert facts["methods"]["replay"]["rows_per_batch"] == 2
    assert facts["trained_parameters"] < facts["parameters"]
    assert facts["steps"] == 4


def test_the_matrix_has_every_set_after_every_stage(here: Path) -> None:
    done, _ = go()
    matrix = json.loads((done.path / "matrix.json").read_text())
    assert [row["stage"] for row in matrix["rows"]] == ["base", "reverse", "stories"]
    for row in matrix["rows"]:
        assert set(row["scores"]) == {"reverse", "stories", "sums", "copy"}
        for measures in row["scores"].values():
            for result in measures.values():
                assert result["n"] == (20 if "bits_per_byte" in result["definition"] else 40)
                assert result["definition"]
    assert matrix["rows"][0]["scores"]["sums"]["exact_match"]["value"] == 1.0
    assert matrix["rows"][0]["scores"]["copy"]["exact_match"]["definition"].startswith("exact_match@1(generate")
    summary = matrix["summary"]["exact_match"]
    assert summary["average_performance"]["value"] == matrix["rows"][2]["scores"]["reverse"]["exact_match"]["value"]
    assert summary["bwt_gem"]["value"] is None  # one task with this measure
    assert summary["bwt_gem"]["reason"]
    shown = text([done.path])
    assert "stories" in shown
    assert "exact_match: AP " in shown
    assert "undefined: BWT_GEM, FWT_GEM, F_max" in shown


def test_a_finished_stream_does_nothing_the_second_time(here: Path) -> None:
    first, _ = go()
    before = {path: path.stat().st_mtime_ns for path in first.path.glob("stages/**/*") if path.is_file()}
    second, said = go()
    assert second.path == first.path
    assert {path: path.stat().st_mtime_ns for path in first.path.glob("stages/**/*") if path.is_file()} == before
    assert any("every stage is finished: reverse, stories; nothing to train" in line for line in said)


def test_changing_the_last_stage_redoes_only_that_stage(here: Path) -> None:
    first, _ = go()
    before = stamps(first)
    second, said = go("stages.stories.training.learning_rate=1e-4")
    assert second.path == first.path
    assert "stages: reverse kept, stories redo" in said
    after = stamps(second)
    kept = {name for name in after if after[name] == before.get(name)}
    assert kept == {"00_base/eval/DONE", "01_reverse/DONE", "01_reverse/eval/DONE"} | {
        name for name in kept if "superseded" in name
    }
    old = first.path / "stages" / "02_stories.superseded-1"
    assert (old / "DONE").exists()
    assert (old / "model" / "model.safetensors").exists()


def test_changing_the_first_stage_redoes_all_and_adding_one_keeps_all(here: Path) -> None:
    go()
    raw = yaml.safe_load(Stream.from_yaml(STREAM, SHORT).to_yaml())
    raw["stages"].append({"name": "more", "data": {"task": "tiny_world/last_letter", "limit": 64}})
    said: list[str] = []
    run(Stream.parse(raw), say=said.append)
    assert "stages: reverse kept, stories kept, more to do" in said
    said.clear()
    raw["stages"][0]["methods"] = []
    run(Stream.parse(raw), say=said.append)
    assert "stages: reverse redo, stories redo, more redo" in said


def test_a_changed_evaluation_plan_measures_again_and_trains_nothing(here: Path) -> None:
    first, _ = go()
    before = stamps(first)
    second, said = go("evaluation.general.sums.limit=20", "training.logging_steps=3")
    assert second.path == first.path
    assert "every stage is finished: reverse, stories; nothing to train" in " ".join(said)
    after = stamps(second)
    assert {name for name in before if after[name] != before[name]} == {
        f"{stage}/eval/DONE" for stage in ("00_base", "01_reverse", "02_stories")
    }
    matrix = json.loads((second.path / "matrix.json").read_text())
    assert matrix["rows"][1]["scores"]["sums"]["exact_match"]["n"] == 20
    done = second.path / "stages/01_reverse/eval/DONE"
    assert json.loads(done.read_text())["facts"]["measured"] == []  # 20 of the rows that were scored before
    go("evaluation.general.sums.limit=50", "training.logging_steps=3")
    assert json.loads(done.read_text())["facts"]["measured"] == ["sums"]  # the other sets were already known


def test_two_streams_share_the_bases_evaluation(here: Path) -> None:
    go()
    other, said = go("name=other")
    base = json.loads((other.path / "stages/00_base/eval/DONE").read_text())
    assert base["facts"]["measured"] == []
    assert any("measured 00_base on 4 sets already known" in line for line in said)


def test_new_and_run_choose_the_directory(here: Path) -> None:
    first, _ = go()
    second, _ = go(new=True)
    assert second.path != first.path
    assert Run.newest(Path("runs"), "small").path == second.path  # type: ignore[union-attr]
    third, said = go(run_dir=first.path)
    assert third.path == first.path
    assert any("nothing to train" in line for line in said)
    with pytest.raises(RunDirError, match="is a run of stream 'small', not of 'other'"):
        go("name=other", run_dir=first.path)


def test_a_stage_loads_where_cpt_is_not_installed(here: Path, tmp_path: Path) -> None:
    done, _ = go()
    (tmp_path / "blocker.py").write_text(
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in {'cpt', 'eval_harness'}:\n"
        "            raise ImportError(f'{name} was imported')\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    code = (
        "import blocker, sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "chat = [{'role': 'user', 'content': 'Sort: b a'}]\n"
        "ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors='pt', return_dict=True)\n"
        "print(model.generate(**ids, max_new_tokens=3).shape[0])\n"
    )
    command = [sys.executable, "-c", code, str(done.path / "stages/02_stories/model")]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": str(tmp_path)}
    found = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "1"


def test_export_writes_a_model_with_its_card(here: Path, tmp_path: Path) -> None:
    done, _ = go()
    folder = export(done, "reverse", tmp_path / "out")
    card = (folder / "README.md").read_text()
    assert "Base model: tiny-world" in card
    assert "replay" in card
    assert "| sums | exact_match |" in card
    weights = "model.safetensors"
    assert (folder / weights).read_bytes() == (done.find("1").model / weights).read_bytes()
    with pytest.raises(RunDirError, match="is a file, or not empty"):
        export(done, "reverse", tmp_path / "out")
    with pytest.raises(RunDirError, match=r"has no stage 'revers'; it has 00_base, 01_reverse, 02_stories"):
        export(done, "revers", tmp_path / "new")
    (done.find("1").model / weights).write_bytes(b"damaged")
    with pytest.raises(RunDirError, match="is damaged"):
        export(done, "reverse", tmp_path / "new")


def test_ask_shows_several_stages(here: Path) -> None:
    done, _ = go()
    found = dict(answers(done, "2 + 3 =", ["0", "stories"], 8))
    assert list(found) == ["00_base", "02_stories"]
    everyone = answers(done, "2 + 3 =", [], 8)
    assert [name for name, _ in everyone] == ["00_base", "01_reverse", "02_stories"]


def test_retention_keeps_only_the_last_model(here: Path) -> None:
    done, _ = go("retention.models=last")
    assert not done.find("reverse").model.exists()
    assert done.find("stories").model.exists()
    _, said = go("retention.models=last")
    assert any("nothing to train" in line for line in said)


def test_a_stream_without_stages_measures_the_base(here: Path) -> None:
    raw = {"name": "look", "model": "tiny-world", "evaluation": {"general": {"sums": {"task": "tiny_world/sums"}}}}
    done = run(Stream.parse(raw), say=lambda line: None)
    matrix = json.loads((done.path / "matrix.json").read_text())
    assert matrix["rows"][0]["scores"]["sums"]["exact_match"]["value"] == 1.0
    assert "base" in text([done.path])


def test_the_same_run_from_python_rows(here: Path) -> None:
    """Data in memory, no YAML anywhere."""
    rows = [{"prompt": f"Say {word}", "completion": word} for word in ("ab", "cd", "ef", "gh")]
    stage = {"name": "say", "data": {"rows": rows}, "test": {"rows": rows}}
    training = {"learning_rate": 3e-3, "num_train_epochs": 30, "per_device_train_batch_size": 4}
    stream = Stream(name="mine", model="tiny-world", stages=[stage], training=training)  # type: ignore[arg-type]
    said: list[str] = []
    done = run(stream, say=said.append)
    matrix = json.loads((done.path / "matrix.json").read_text())
    scores = [row["scores"]["say"]["exact_match"]["value"] for row in matrix["rows"]]
    assert scores[1] == 1.0 > scores[0]
    assert "note: 4 of 4 test rows of 'say' also stand in training rows (say)" in said
    again = run(stream, say=lambda line: None)  # the same object twice: nothing in it has changed
    assert again.path == done.path


def test_side_by_side_compares_runs(here: Path) -> None:
    first, _ = go()
    second, _ = go("name=other")
    lines = side_by_side({run.name: json.loads((run.path / "matrix.json").read_text()) for run in (first, second)})
    assert lines[0] == ["run", "base", "reverse", "stories", "AP", "forgetting"]
    assert [line[0] for line in lines[1:]] == ["small", "other"]
    assert "general average after each stage" in text([first.path, second.path])
