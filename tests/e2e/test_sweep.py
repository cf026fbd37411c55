"""A sweep from the command line: runs that are kept, one that fails, tables at the end."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cpt.cli import app

pytestmark = pytest.mark.e2e

SWEEP = """
name: mini
stream: sft_stream
overrides:
  - training.max_steps=2
  - training.per_device_train_batch_size=8
  - training.logging_steps=1
  - "evaluation.general={copy: {task: tiny_world/copy, limit: 10}}"
  - evaluation.within=off
  - stages.0.test.limit=10
  - stages.1.test.limit=10
  - stages.2.test.limit=10
over:
  methods: {replay: [{type: replay, ratio: 0.25, general: {task: tiny_world/general, limit: 50}}]}
  learning_rate: [RATES]
baselines: [sequential, joint, specialist]
"""


def test_a_sweep_goes_on_records_what_fails_and_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(SWEEP.replace("RATES", "1.0e-3"))
    cpt = CliRunner()
    before = cpt.invoke(app, ["sweep", "s.yaml", "--list"])
    assert before.exit_code == 0
    assert before.output.count("to do") == 6
    assert not Path("runs").exists()

    first = cpt.invoke(app, ["sweep", "s.yaml"])
    assert first.exit_code == 0, first.output
    assert "sequential  0.001" in first.output
    assert "specialist" in first.output
    assert "A  sequential-lr1e-3" in first.output
    assert max(map(len, Path("runs/mini.sweep/sweep.txt").read_text().splitlines())) <= 80
    assert len(list(Path("runs/mini.sweep/streams").glob("*.yaml"))) == 6
    assert Path("runs/mini.sweep/compare.html").stat().st_size > 10_000
    counted = [one["tokens"] for one in json.loads(Path("runs/mini.sweep/sweep.json").read_text())["runs"].values()]
    assert all(one["number"] > 0 and one["is_counted"] for one in counted)
    assert cpt.invoke(app, ["sweep", "s.yaml", "--list"]).output.count("done") == 6
    trained = sorted(Path("runs").glob("mini-*/stages/*/DONE"))

    Path("s.yaml").write_text(SWEEP.replace("RATES", "1.0e-3, 1.0e+30"))  # the second one blows up
    second = cpt.invoke(app, ["sweep", "s.yaml"])
    assert second.exit_code == 4
    assert "was not a number" in second.output
    held = json.loads(Path("runs/mini.sweep/sweep.json").read_text())
    assert held["runs"]["mini-replay-lr1e30"]["state"] == "failed"
    assert held["runs"]["mini-replay-lr1e-3"]["state"] == "done"
    assert {row["method"] for row in held["results"]} == {"sequential", "replay"}
    assert all(file.is_file() for file in trained)
    assert all("every stage is finished" in part for part in second.output.split("sweep: ") if "lr1e-3\n" in part[:60])


def test_under_a_launcher_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = CliRunner().invoke(app, ["sweep", "sweep"])
    assert found.exit_code != 0
    assert "start it in one process" in str(found.exception)
