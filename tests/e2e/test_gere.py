"""GeRe in a stream: recorded once, of the base, and nothing to lose before the first step."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from cpt import ConfigError, Run, Stream, run
from cpt.data.recording import Recorder

pytestmark = pytest.mark.e2e

GERE = {"type": "gere", "ratio": 0.25, "general": {"task": "tiny_world/general", "limit": 70}, "weight": 10.0}


def stream(folder: Path, *methods: dict[str, Any], **more: Any) -> Stream:
    def stage(name: str, **own: Any) -> dict[str, Any]:
        return {"name": name, "data": {"task": f"tiny_world/{name}", "limit": 200}, "methods": list(methods)} | own

    return Stream.parse(
        {
            "name": "kept",
            "model": "tiny-world",
            "output_dir": str(folder),
            "training": {"per_device_train_batch_size": 16, "max_steps": 4, "logging_steps": 1, "learning_rate": 1e-3},
            "stages": [stage("reverse"), stage("last_letter")],
            "evaluation": {"within": "off"},
        }
        | more
    )


def margins(done: Run) -> list[list[float]]:
    """By stage, the logged margin of every step."""
    files = sorted(done.path.glob("stages/*/metrics.jsonl"))
    return [[line["gere/margin"] for line in map(json.loads, file.open()) if "gere/margin" in line] for file in files]


def test_the_base_is_recorded_once_for_all_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = list[int]()
    hidden = Recorder.hidden
    monkeypatch.setattr(Recorder, "hidden", lambda *about, **how: (passes.append(1), hidden(*about, **how))[1])
    first, second = margins(done := run(stream(tmp_path, GERE), say=lambda line: None))
    assert first[0] == 0.0  # exactly: padded, among task rows
    assert min(first[1:]) > 0
    assert second[0] > 0  # of the base, which the stage before has left
    assert len(passes) == 2 * 2 + 2  # two passes over two parts, and the noise
    (recorded,) = (done.path / "memory").iterdir()
    assert json.loads((recorded / "about.json").read_text())["count"] == 70
    assert not any(
        line["gere/outside"]
        for line in list(map(json.loads, next(done.path.glob("stages/01*/metrics.jsonl")).open()))[:1]
    )


def test_under_lora_the_base_lies_beneath(tmp_path: Path) -> None:
    """A fresh adapter changes nothing yet; in the second stage the first one's is switched off for the record."""
    stages = [
        {"name": "reverse", "data": {"task": "tiny_world/reverse", "limit": 200}, "adapter": "new"},
        {
            "name": "last_letter",
            "data": {"task": "tiny_world/last_letter", "limit": 200},
            "adapter": "new",
            "methods": [GERE],
        },
    ]
    done = run(stream(tmp_path, stages=stages), say=lambda line: None)
    full = run(stream(tmp_path / "full", GERE), say=lambda line: None)
    (under,), (plain,) = ((one.path / "memory").iterdir() for one in (done, full))
    assert under.name == plain.name
    for name in ("thresholds.safetensors", "regions-00000.safetensors", "regions-00001.safetensors"):
        assert (under / name).read_bytes() == (plain / name).read_bytes()


def test_a_stream_that_is_not_at_its_base_records_the_base(tmp_path: Path) -> None:
    """Full weights, and the method only in the second stage: another model is opened for the while."""
    late = stream(tmp_path, GERE).model_dump()
    late["stages"][0]["methods"] = []
    done, whole = (
        run(Stream.parse(late), say=lambda line: None),
        run(stream(tmp_path / "w", GERE), say=lambda line: None),
    )
    (one,), (other,) = ((of.path / "memory").iterdir() for of in (done, whole))
    assert (one / "regions-00001.safetensors").read_bytes() == (other / "regions-00001.safetensors").read_bytes()


def test_dynamic_weights_make_the_margin_as_large_as_the_token_loss(tmp_path: Path) -> None:
    done = run(stream(tmp_path, GERE | {"weight": "dynamic", "at_most": 1e6}), say=lambda line: None)
    lines = [json.loads(line) for line in next(done.path.glob("stages/02*/metrics.jsonl")).open()]
    steps = [line for line in lines if "gere/margin" in line]
    for before, now in itertools.pairwise(steps):
        weight = before["gere/token_loss"] / (before["gere/distance"] + 1e-8)
        assert now["gere/margin"] == pytest.approx(weight * now["gere/distance"], rel=1e-4)


def test_a_dynamic_weight_of_violators_is_by_their_own_mean(tmp_path: Path) -> None:
    dynamic = GERE | {"weight": "dynamic", "mean": "violators", "at_most": 1e6}
    done = run(stream(tmp_path, dynamic), say=lambda line: None)
    lines = [json.loads(line) for line in next(done.path.glob("stages/02*/metrics.jsonl")).open()]
    steps = [line for line in lines if "gere/margin" in line]
    assert len(steps) > 1
    for before, now in itertools.pairwise(steps):
        weight = before["gere/token_loss"] * before["gere/outside"] / before["gere/distance"]
        assert now["gere/margin"] == pytest.approx(weight * now["gere/distance"] / now["gere/outside"], rel=1e-3)


def test_packing_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stages\.0\.training\.packing = true: gere knows .* each row alone"):
        run(stream(tmp_path, GERE, training={"packing": True, "per_device_train_batch_size": 16, "max_steps": 4}))
    assert not list(tmp_path.glob("*/stages/01*"))


@pytest.mark.parametrize("keep", ["l1", "l2"])
def test_features_are_kept_where_they_were(tmp_path: Path, keep: str) -> None:
    """Nothing is lost at the start but rounding; a strong weight holds them nearer than a weak one."""
    ends = []
    training = {"per_device_train_batch_size": 16, "max_steps": 30, "logging_steps": 1, "learning_rate": 1e-3}
    for weight in (1e-6, 10.0):
        kept = GERE | {"keep": keep, "weight": weight}
        done = run(stream(tmp_path / str(weight), kept, training=training), say=lambda line: None)
        lines = [json.loads(line) for line in next(done.path.glob("stages/01*/metrics.jsonl")).open()]
        distances = [line["gere/distance"] for line in lines if "gere/distance" in line]
        assert distances[0] < 1e-5
        ends.append(distances[-1])
    assert ends[1] < ends[0] / 2


def test_one_pass_says_what_room_it_takes_and_leaves_none(tmp_path: Path) -> None:
    said = list[str]()
    one = run(stream(tmp_path, GERE | {"passes": 1}), say=said.append)
    two = run(stream(tmp_path / "two", GERE), say=lambda line: None)
    assert [line for line in said if "one pass over 70 rows keeps 0.1 MiB in" in line]
    assert margins(one) == margins(two)
    (folder,) = (one.path / "memory").iterdir()
    assert not list(folder.glob("features-*"))


def test_the_start_is_recorded_at_every_stage(tmp_path: Path) -> None:
    done = run(stream(tmp_path, GERE | {"of": "start"}), say=lambda line: None)
    assert [of[0] for of in margins(done)] == [0.0, 0.0]
    assert len(list((done.path / "memory").iterdir())) == 2


def test_the_mean_over_violators_is_larger_by_their_share(tmp_path: Path) -> None:
    done = run(stream(tmp_path, GERE | {"mean": "violators", "weight": 1.0}), say=lambda line: None)
    lines = [json.loads(line) for line in next(done.path.glob("stages/02*/metrics.jsonl")).open()]
    for line in lines:
        if "gere/margin" in line:
            assert line["gere/margin"] == pytest.approx(line["gere/distance"] / line["gere/outside"], rel=1e-3)


def test_shuffled_rows_come_among_the_tasks(tmp_path: Path) -> None:
    shuffled = {"type": "gere", "ratio": "shuffled", "general": {"task": "tiny_world/general", "limit": 50}}
    done = run(stream(tmp_path, shuffled, training={"per_device_train_batch_size": 25, "num_train_epochs": 1}))
    facts = [json.loads((folder / "DONE").read_text())["facts"] for folder in sorted(done.path.glob("stages/0[12]*"))]
    assert [one["steps"] for one in facts] == [10, 10]  # (200 + 50) / 25
    rft = {"kind": "rft", "rewards": ["exact_match"], "data": {"task": "tiny_world/reverse"}, "methods": [shuffled]}
    with pytest.raises(ConfigError, match=r"methods\.0\.ratio = 'shuffled': in an rft stage .* give a number"):
        stream(tmp_path, stages=[{"name": "rewarded", **rft}])


def test_fewer_general_rows_than_a_batch_is_to_hold_are_refused(tmp_path: Path) -> None:
    few = GERE | {"general": {"task": "tiny_world/general", "limit": 3}}
    with pytest.raises(ConfigError, match=r"ratio = 0.25: is 4 rows of every effective batch, and there are 3"):
        run(stream(tmp_path, few))
    assert not list(tmp_path.glob("*/stages/0*/DONE"))
