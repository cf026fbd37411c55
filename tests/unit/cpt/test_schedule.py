"""The infinite schedule: rates by hand, no jump anywhere, and a next stage that goes on from before the anneal."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cpt import ConfigError, DataError, Run, RunDirError, Stream, run
from cpt.schedule import STATE, Schedule
from cpt.trainers import rates as rates_module
from cpt.trainers.session import read_metrics

SHAPES = ("cosine", "inverse_sqrt", "linear")


def schedule(**given: Any) -> Schedule:
    return Schedule(type="infinite", **given)


def test_rates_by_hand() -> None:
    """20 steps: 2 up, 4 down to the constant half, constant, 5 of anneal to a tenth."""
    at = schedule(warmup=0.1, cooldown=0.2, anneal=0.25, constant=0.5, least=0.1, shape="linear").factor(20, False)
    assert [at(step) for step in range(3)] == [0.0, 0.5, 1.0]
    assert [at(step) for step in (3, 4, 5, 6)] == [0.875, 0.75, 0.625, 0.5]
    assert {at(step) for step in range(6, 16)} == {0.5}
    assert [at(step) for step in (16, 18, 20)] == pytest.approx([0.5 * 0.2**0.2, 0.5 * 0.2**0.6, 0.1])
    cosine = schedule(warmup=0.1, cooldown=0.2, anneal=0.25, constant=0.5).factor(20, False)
    assert cosine(4) == pytest.approx(0.75)
    root = schedule(warmup=0.1, cooldown=0.2, anneal=0.25, constant=0.5, shape="inverse_sqrt").factor(20, False)
    assert root(4) == pytest.approx(1 - 0.5 * (6**-0.5 - 1) / (11**-0.5 - 1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("goes_on", [False, True])
def test_no_jump_at_any_boundary(shape: Any, goes_on: bool) -> None:
    """The largest change from one step to the next is that of the steepest phase, and shrinks with the steps."""
    largest = []
    for steps in (1000, 10000):
        at = schedule(shape=shape).factor(steps, goes_on)
        rates = [at(step) for step in range(steps + 1)]
        assert all(0 <= rate <= 1 for rate in rates)
        largest.append(max(abs(b - a) for a, b in pairwise(rates)))
    assert largest[1] < largest[0] / 9
    assert at(0) == (0.5 if goes_on else 0.0)
    assert at(steps) == pytest.approx(0.1)


@pytest.mark.parametrize("steps", [2, 3, 7])
def test_a_stage_of_a_few_steps_has_an_anneal(steps: int) -> None:
    made = schedule()
    assert 0 < made.anneal_step(steps) < steps
    assert all(0 <= made.factor(steps, goes_on)(step) <= 1 for step in range(steps) for goes_on in (False, True))


def test_a_long_anneal_leaves_a_step_before_it() -> None:
    """A state before the anneal is kept of every stage that has two steps."""
    made = schedule(warmup=0, cooldown=0, anneal=0.9)
    assert [made.anneal_step(steps) for steps in (2, 3, 20)] == [1, 1, 2]


# ---- streams ----------------------------------------------------------------------------------------


def stream(folder: Path, *stages: dict[str, Any], **more: Any) -> Stream:
    training = {"per_device_train_batch_size": 8, "max_steps": 10, "logging_steps": 1, "learning_rate": 1e-3}
    names = ("reverse", "last_letter", "sums")
    own = [
        {"name": name, "data": {"task": f"tiny_world/{name}", "limit": 60}, "schedule": "infinite", **stage}
        for name, stage in zip(names, stages, strict=False)
    ]
    about = {"name": "rates", "model": "tiny-world", "output_dir": str(folder), "training": training}
    return Stream.parse(about | {"stages": own, "evaluation": {"within": "off"}} | more)


def rates(done: Run, stage: str) -> list[float]:
    lines = read_metrics(done.find(stage).path / "metrics.jsonl")
    return [line["learning_rate"] for line in lines if "learning_rate" in line]


def quiet(line: str) -> None:
    """Say nothing."""


@pytest.mark.e2e
def test_the_next_stage_goes_on_from_before_the_anneal(tmp_path: Path) -> None:
    said: list[str] = []
    done = run(stream(tmp_path, {}, {}), say=said.append)
    first, second = rates(done, "reverse"), rates(done, "last_letter")
    at = schedule().factor(10, False)
    assert first == pytest.approx([1e-3 * at(step) for step in range(10)])
    assert second[0] == pytest.approx(5e-4)
    assert second == pytest.approx([1e-3 * schedule().factor(10, True)(step) for step in range(10)])
    assert any("from 01_reverse, before its anneal" in line for line in said)
    kept = done.find("reverse").path / STATE
    assert {"model.safetensors", "optimizer.pt", "SEAL.json"} <= {file.name for file in kept.iterdir()}
    assert not list(kept.glob("rng_state*"))
    before, after = load_file(kept / "model.safetensors"), load_file(done.find("reverse").model / "model.safetensors")
    assert any(not tensor.equal(after[name]) for name, tensor in before.items())
    state = torch.load(kept / "optimizer.pt", weights_only=True)["state"]
    assert {float(entry["step"]) for entry in state.values()} == {8.0}
    ahead = torch.load(done.find("last_letter").path / STATE / "optimizer.pt", weights_only=True)["state"]
    assert {float(entry["step"]) for entry in ahead.values()} == {16.0}  # the moments went on


class Killed(RuntimeError):
    """Stands for a kill: nothing in the code under test catches it."""


@pytest.mark.e2e
@pytest.mark.parametrize("when", ["before the state is kept", "in the next stage"])
def test_killed_and_run_again_it_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    whole = run(stream(tmp_path / "whole", {}, {}), say=quiet)
    asked = stream(tmp_path / "killed", {}, {"training": {"save_steps": 3}})
    with monkeypatch.context() as patch:
        if when == "in the next stage":
            real, calls = rates_module.keep_state, []

            def second(*where: Path) -> None:
                calls.append(where)
                real(*where)
                if len(calls) == 2:
                    raise Killed

            patch.setattr(rates_module, "keep_state", second)
        else:
            patch.setattr(rates_module, "keep_state", lambda *where: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            run(asked, say=quiet)
    done = run(asked, say=quiet)
    for name in ("reverse", "last_letter"):
        one, two = (load_file(end.find(name).model / "model.safetensors") for end in (whole, done))
        assert all(tensor.equal(two[key]) for key, tensor in one.items())
        assert (done.find(name).path / STATE / "SEAL.json").is_file()


@pytest.mark.e2e
def test_a_stage_of_one_step_is_refused_before_it_trains(tmp_path: Path) -> None:
    """It has nothing before its anneal that the next could go on from."""
    with pytest.raises(DataError, match=r"schedule = 'infinite': a stage of 1 step .* raise training.max_steps"):
        run(stream(tmp_path, {"training": {"max_steps": 1}}, {}), say=quiet)
    assert not list(tmp_path.glob("*/stages/01*/DONE"))


@pytest.mark.e2e
def test_a_stage_may_warm_up_again_or_have_no_schedule(tmp_path: Path) -> None:
    said: list[str] = []
    done = run(
        stream(tmp_path, {}, {"schedule": {"type": "infinite", "go_on": False}}, {"schedule": None}), say=said.append
    )
    assert rates(done, "last_letter") == pytest.approx(rates(done, "reverse"))
    assert not any("before its anneal" in line for line in said)
    assert not (done.find("sums").path / STATE).exists()


@pytest.mark.e2e
def test_damaged_or_lost_state_is_refused(tmp_path: Path) -> None:
    done = run(stream(tmp_path, {}), say=quiet)
    kept = done.find("reverse").path / STATE
    (kept / "optimizer.pt").write_bytes(b"other")
    with pytest.raises(RunDirError, match=r"optimizer.pt: is damaged"):
        run(stream(tmp_path, {}, {}), say=quiet)
    for file in kept.iterdir():
        file.unlink()
    kept.rmdir()
    with pytest.raises(RunDirError, match="would start from these weights, which were not kept"):
        run(stream(tmp_path, {}, {}), say=quiet)


@pytest.mark.e2e
def test_only_the_newest_state_is_kept_where_models_are_not(tmp_path: Path) -> None:
    done = run(stream(tmp_path, {}, {}, retention={"models": "last"}), say=quiet)
    assert [file.parent.name for file in sorted(done.path.glob(f"stages/*/{STATE}"))] == ["02_last_letter"]


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"schedule": "infinit"}, "infinite"),
        ({"schedule": {"type": "infinite", "anneal": 0.9}}, "leaves too little: warmup, cooldown and anneal are 1.05"),
        ({"schedule": {"type": "infinite", "least": 0.6}}, r"must be at most constant \(0.5\)"),
        ({"schedule": {"type": "infinite", "warm": 0.1}}, "warmup"),
        ({"adapter": "new"}, "drop the adapter"),
        ({"methods": ["hft"]}, "hft trains other tensors in each stage"),
        ({"training": {"warmup_steps": 3}}, "decides the rate: leave it out there"),
        ({"kind": "rft", "rewards": ["exact_match"]}, "means nothing in an rft stage"),
    ],
)
def test_refused_in_words(tmp_path: Path, stage: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        stream(tmp_path, stage)
