"""Scores while a stage trains: they are the model's, they change nothing of the training, a kill leaves no trace."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cpt import Run, Stream, run
from cpt.inputs import read_inputs
from cpt.stability_gap import read_curve
from cpt.within import subset
from eval_harness.loading import load
from eval_harness.measure import measure
from tests.distributed.launcher import TORCHRUN, finished
from tests.e2e import sabotage
from tests.e2e.processes import cpt

pytestmark = pytest.mark.e2e

REPLAY = {"type": "replay", "ratio": 0.25, "general": {"task": "tiny_world/general", "limit": 100}}
RAW: dict[str, Any] = {
    "name": "small",
    "model": "tiny-world",
    "training": {
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 8,
        "max_steps": 8,
        "save_steps": 4,
        "logging_steps": 1,
    },
    "stages": [
        {
            "name": "reverse",
            "data": {"task": "tiny_world/reverse", "limit": 100},
            "test": {"task": "tiny_world/reverse", "limit": 30},
            "methods": [REPLAY, {"type": "hft", "embeddings": "frozen"}],
        },
        {
            "name": "rewarded",
            "kind": "rft",
            "data": {"task": "tiny_world/sums_rewarded"},
            "test": {"task": "tiny_world/sums_rewarded"},
            "rewards": ["exact_match"],
            "training": {"num_generations": 4, "max_completion_length": 4, "steps_per_generation": 4},
        },
        {
            "name": "letters",  # its dropout draws random numbers at every step
            "data": {"task": "tiny_world/last_letter", "limit": 100},
            "test": {"task": "tiny_world/last_letter", "limit": 30},
            "adapter": {"mode": "new", "lora": {"lora_dropout": 0.3}},
        },
    ],
    "evaluation": {
        "general": {"text": {"task": "tiny_world/text", "limit": 10}},
        "within": {"every": 3, "rows": 6},
    },
}


def stream(folder: Path, within: Any, stages: int = 3, **training: Any) -> Stream:
    raw = RAW | {"output_dir": str(folder), "stages": RAW["stages"][:stages]}
    raw["evaluation"] = RAW["evaluation"] | {"within": within}
    return Stream.parse(raw | {"training": RAW["training"] | training})


def weights(done: Run) -> dict[str, str]:
    files = sorted(done.path.glob("stages/*/model/**/*.safetensors"))
    return {file.relative_to(done.path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def lines(done: Run, stage: str) -> list[dict[str, Any]]:
    return read_curve(done.find(stage).path / "within.jsonl")[1]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[str]]:
    said: list[str] = []
    folder = tmp_path_factory.mktemp("scored")
    return run(stream(folder, RAW["evaluation"]["within"]), say=said.append), said


def test_weights_and_losses_are_those_of_a_run_without(scored: tuple[Run, list[str]], tmp_path: Path) -> None:
    without = run(stream(tmp_path, "off"), say=lambda line: None)
    assert not list(without.path.glob("stages/*/within.jsonl"))
    assert weights(scored[0]) == weights(without)
    assert len(weights(without)) == 3

    def logged(done: Run, stage: str) -> list[Any]:
        log = (done.find(stage).path / "metrics.jsonl").read_text().splitlines()
        return [
            (line["step"], line.get("loss"), line.get("grad_norm"), line.get("reward")) for line in map(json.loads, log)
        ]

    for stage in ("reverse", "rewarded", "letters"):
        assert logged(scored[0], stage) == logged(without, stage)


def test_every_stage_has_its_curve(scored: tuple[Run, list[str]]) -> None:
    done, said = scored
    seen = {"reverse": {"reverse", "text"}, "rewarded": {"reverse", "rewarded", "text"}}
    for stage in ("reverse", "rewarded", "letters"):
        head, found = read_curve(done.find(stage).path / "within.jsonl")
        assert head is not None
        assert [line["step"] for line in found] == [0, 3, 6, 8]
        for line in found:
            assert set(line["scores"]) == seen.get(stage, {"reverse", "rewarded", "letters", "text"})
            assert all(value is not None for by in line["scores"].values() for value in by.values())
        assert head["sets"]["text"]["measures"]["bits_per_byte"]["n"] == 6
        facts = (done.find(stage).done() or {})["facts"]["within"]
        assert facts["evaluations"] == 4
        assert facts["seconds"] > 0
    assert sum("within the stage: 4 evaluations, every 3 steps, on 6 rows" in line for line in said) == 3


def test_a_stage_begins_with_the_scores_that_the_one_before_ended_with(scored: tuple[Run, list[str]]) -> None:
    for before, after in (("reverse", "rewarded"), ("rewarded", "letters")):
        end, begin = lines(scored[0], before)[-1]["scores"], lines(scored[0], after)[0]["scores"]
        for name in end:
            assert begin[name] == pytest.approx(end[name], rel=1e-5)


@pytest.mark.parametrize("stage", ["reverse", "rewarded", "letters"])
def test_the_last_scores_are_those_of_the_saved_model(scored: tuple[Run, list[str]], stage: str) -> None:
    done = scored[0]
    inputs = read_inputs(Stream.stored(done.path / "stream.yaml"), lambda line: None)
    model = load(done.find(stage).model, device="cpu").model
    last = lines(done, stage)[-1]["scores"]
    sets = [subset(one, 6, 0) for name, one in inputs.evaluation.sets.items() if name in last]
    for name, by in measure(model, inputs.tokenizer, sets).items():
        assert last[name] == pytest.approx({key: result.value for key, result in by.items()}, rel=1e-5, abs=1e-7)


def test_the_matrix_tells_of_the_gap(scored: tuple[Run, list[str]]) -> None:
    done = scored[0]
    base, first, second, third = json.loads((done.path / "matrix.json").read_text())["rows"]
    assert "within" not in base
    assert (third["within"]["every"], third["within"]["rows"], third["within"]["evaluations"]) == (3, 6, 4)
    loss = {name: row["within"]["measures"]["answer_loss"] for name, row in (("a", first), ("b", second), ("c", third))}
    assert loss["a"]["min_acc"]["value"] is None
    own = [line["scores"]["reverse"]["answer_loss"] for line in lines(done, "rewarded")]
    later = [line["scores"]["reverse"]["answer_loss"] for line in lines(done, "letters")]
    assert loss["b"]["min_acc"]["value"] == max(own[1:])  # of a loss the worst is the highest
    rewarded = [line["scores"]["rewarded"]["answer_loss"] for line in lines(done, "letters")]
    worst = (max(own[1:] + later) + max(rewarded[1:])) / 2
    assert loss["c"]["min_acc"]["value"] == pytest.approx(worst)
    letters = lines(done, "letters")[-1]["scores"]["letters"]["answer_loss"]
    assert loss["c"]["wc_acc"]["value"] == pytest.approx((letters + 2 * worst) / 3)
    text = [
        line["scores"]["text"]["bits_per_byte"]
        for s in ("reverse", "rewarded", "letters")
        for line in lines(done, s)[1:]
    ]
    bits = third["within"]["measures"]["bits_per_byte"]
    assert bits["min_general"]["value"] == pytest.approx(max(text), rel=1e-5)
    assert bits["wc_acc"]["reason"] == "stage letters has no test with this measure"


@pytest.mark.parametrize("training", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_the_trainers_precision_and_checkpointing_stay(training: dict[str, bool], tmp_path: Path) -> None:
    done = run(stream(tmp_path / "a", 4, 1, **training), say=lambda line: None)
    assert weights(done) == weights(run(stream(tmp_path / "b", "off", 1, **training), say=lambda line: None))
    inputs = read_inputs(Stream.stored(done.path / "stream.yaml"), lambda line: None)
    sets = [subset(one, 32, 0) for one in inputs.evaluation.sets.values()]
    with torch.autocast("cpu", torch.bfloat16, enabled=training.get("bf16", False)):
        found = measure(load(done.find("reverse").model, device="cpu").model, inputs.tokenizer, sets)
    last = lines(done, "reverse")[-1]["scores"]
    for name, by in found.items():
        assert last[name] == pytest.approx(
            {key: one.value for key, one in by.items()}, rel=1e-3 if "bf16" in training else 1e-5
        )


# ---- killed, and gone on with ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("stream") / "small.yaml"
    made.write_text(yaml.safe_dump(RAW))
    return made


def curves(folder: Path) -> dict[str, str]:
    return {file.parent.name: file.read_text() for file in sorted(folder.glob("runs/small-*/stages/*/within.jsonl"))}


@pytest.fixture(scope="module")
def whole(file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("whole")
    code, printed = cpt(["run", str(file)], folder)
    assert code == 0, printed
    found = curves(folder)
    assert len(found) == 3
    return found


@pytest.mark.parametrize(
    ("point", "number"),
    [
        (sabotage.inside_optimizer_step, 4),  # two calls a step: before the first evaluation after step 0
        (sabotage.inside_optimizer_step, 14),  # beyond the checkpoint of step 4 and the evaluation of step 6
        (sabotage.before_the_seal, 1),
        (sabotage.before_done, 1),
    ],
    ids=["early", "late", "checkpoint", "commit"],
)
def test_a_kill_leaves_neither_gap_nor_double(
    file: Path, whole: dict[str, str], tmp_path: Path, point: Callable[[int], None], number: int
) -> None:
    code, printed = cpt(["run", str(file)], tmp_path, (point, number))
    assert code == -signal.SIGKILL, printed
    code, printed = cpt(["run", str(file)], tmp_path)
    assert code == 0, printed
    assert curves(tmp_path) == whole


def test_another_plan_after_a_kill_begins_a_curve_that_says_so(file: Path, tmp_path: Path) -> None:
    code, printed = cpt(["run", str(file)], tmp_path, (sabotage.before_done, 2))  # from step 4 of the rewarded stage
    assert code == -signal.SIGKILL, printed
    code, printed = cpt(["run", str(file), "evaluation.within.every=2"], tmp_path)
    assert code == 0, printed
    (matrix,) = tmp_path.glob("runs/small-*/matrix.json")
    first, second = json.loads(matrix.read_text())["rows"][1:3]
    assert first["within"]["every"] == 3  # what was finished keeps its curve
    assert second["within"]["every"] == 2
    assert [json.loads(line)["step"] for line in curves(tmp_path)["02_rewarded"].splitlines()[1:]] == [4, 6, 8]
    gap = second["within"]["measures"]["answer_loss"]
    assert gap["wf_10"]["value"] is None
    assert gap["wf_10"]["reason"] == "the scores within stage rewarded do not reach from its first to its last step"
    assert gap["min_acc"]["reason"] == gap["wf_10"]["reason"]


def test_what_was_finished_without_is_kept_and_said(tmp_path: Path) -> None:
    run(stream(tmp_path, "off", 1), say=lambda line: None)
    said: list[str] = []
    done = run(stream(tmp_path, "auto", 1), say=said.append)
    note = "note: reverse was not scored while it trained (evaluation.within is off): it is kept as it is"
    assert note in said
    assert "within" not in json.loads((done.path / "matrix.json").read_text())["rows"][1]


@pytest.mark.distributed
def test_two_ranks_draw_the_same_curve(file: Path, whole: dict[str, str], tmp_path: Path) -> None:
    half = "training.per_device_train_batch_size=4"
    code, printed = finished(TORCHRUN, ["run", str(file), half], tmp_path)
    assert code == 0, printed
    found = curves(tmp_path)
    assert found.keys() == whole.keys()
    one, two = ([json.loads(line) for line in made["01_reverse"].splitlines()] for made in (whole, found))
    assert one[0] == two[0]
    assert [line["step"] for line in one[1:]] == [line["step"] for line in two[1:]]
    for a, b in zip(one[1:], two[1:], strict=True):
        for name, by in a["scores"].items():
            assert b["scores"][name] == pytest.approx(by, rel=2e-3), (a["step"], name)
