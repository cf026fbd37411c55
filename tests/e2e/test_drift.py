"""Drift after every stage: nothing at the base, what the weights say after, known again without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpt.config import Stream
from cpt.errors import ConfigError, DataError
from cpt.stream import run
from eval_harness.loading import load
from eval_harness.weights import total, weight_distance

TASK = {"task": "tiny_world/reverse", "limit": 60}


def stream(folder: Path, **evaluation: Any) -> Stream:
    return Stream.parse(
        {
            "name": "drifting",
            "model": "tiny-world",
            "output_dir": str(folder),
            "training": {"max_steps": 6, "learning_rate": 1e-3, "use_cpu": True, "report_to": "none"},
            "stages": [
                {"name": "full", "data": TASK, "test": {**TASK, "limit": 5}},
                {"name": "more", "data": TASK, "adapter": {"mode": "new", "lora": {"r": 2}}},
            ],
            "evaluation": {"drift": {"task": "tiny_world/text", "split": "test", "limit": 6}, **evaluation},
        }
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("drift")
    return run(stream(folder), say=lambda line: None), folder


def scores(path: Path) -> list[dict[str, Any]]:
    return [row["scores"]["drift"] for row in json.loads((path / "matrix.json").read_text())["rows"]]


def test_the_base_has_not_moved_and_stages_have(finished: Any) -> None:
    base, full, more = scores(finished[0].path)
    names = {"forward_kl", "hidden_shift", "hidden_cosine_distance", "weight_distance", "weight_distance_relative"}
    assert set(base) == set(full) == names
    assert [one["value"] for one in base.values()] == [0.0] * 5
    assert all(one["value"] > 0 for one in (*full.values(), *more.values()))
    assert {full[name]["definition"] for name in names} == {more[name]["definition"] for name in names}


def test_the_distance_is_that_of_the_weights(finished: Any) -> None:
    path = finished[0].path
    start = load("cpt/assets/tiny_world", device="cpu").model
    for number, name in ((1, "full"), (2, "more")):
        model = load(path / f"stages/0{number}_{name}/model", device="cpu").model
        found = scores(path)[number]["weight_distance"]["value"]
        assert found == pytest.approx(total(weight_distance(model, start)).l2, rel=1e-5)


def test_what_is_known_needs_no_model(finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done, folder = finished
    before = (done.path / "matrix.json").read_bytes()
    for one in done.path.glob("stages/*/eval/DONE"):
        one.unlink()
    monkeypatch.setattr("cpt.evaluation.open_model", lambda *a: pytest.fail("a model was loaded"))
    monkeypatch.setattr("cpt.drift.open_model", lambda *a: pytest.fail("a model was loaded"))
    run(stream(folder), say=lambda line: None)
    assert (done.path / "matrix.json").read_bytes() == before


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.general\.drift.*rename it"):
        stream(tmp_path, general={"drift": TASK})
    with pytest.raises(ConfigError, match=r"evaluation\.drift\.count"):
        stream(tmp_path, drift={**TASK, "count": 3})
    with pytest.raises(DataError, match=r"evaluation\.drift\.task = 'tiny_world/nothing'"):
        run(stream(tmp_path, drift={"task": "tiny_world/nothing"}), say=lambda line: None)
