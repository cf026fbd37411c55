"""What makes a stage another stage, what does not, and that scores and replayed rows belong to what was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cpt import Run, RunDirError, Stream, run
from cpt.config import ModelSpec
from cpt.data.stage_data import StageData
from cpt.inputs import read_inputs
from cpt.methods.hft import HFT
from cpt.models import base_identity
from cpt.resources import model_path
from cpt.stream import measure_again

pytestmark = pytest.mark.e2e

ROWS = [{"q": f"Say {word}", "a": word} for word in ["ab", "cd", "ef", "gh", "ij", "kl"]]


def stream(**changes: Any) -> Stream:
    fields = {"prompt": "q", "completion": "a"}
    one = {"name": "one", "data": {"rows": ROWS, "fields": fields}, "methods": ["hft"]}
    training = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    evaluation = {"general": {"sums": {"task": "tiny_world/sums", "limit": 20}}}
    raw = {"name": "s", "model": "tiny-world", "training": training, "stages": [one], "evaluation": evaluation}
    return Stream.parse(raw | changes)


def with_stage(**changes: Any) -> Stream:
    """The stream with its stage changed."""
    raw = stream().model_dump(mode="json")
    raw["stages"][0] |= changes
    return Stream.parse(raw)


def identity(of: Stream) -> str:
    return read_inputs(of, lambda line: None).stages[-1].identity


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"rows": ROWS, "fields": {"prompt": "a", "completion": "q"}}},
        {"data": {"rows": ROWS[:-1], "fields": {"prompt": "q", "completion": "a"}}},
        {"methods": [{"type": "hft", "ratio": 0.25}]},
        {"methods": []},
        {"training": {"learning_rate": 1e-4}},
        {"name": "other"},
    ],
    ids=str,
)
def test_what_makes_another_stage(changes: dict[str, Any]) -> None:
    assert identity(with_stage(**changes)) != identity(stream())


@pytest.mark.parametrize(
    "changes",
    [
        {
            "data": {
                "rows": [row | {"unused": i} for i, row in enumerate(ROWS)],
                "fields": stream().stages[0].data[0].fields,
            }
        },
        {"methods": ["hft", {"type": "replay", "ratio": 0}]},
        {"training": {"gradient_accumulation_steps": 1, "logging_steps": 3, "save_steps": 7}},
        {"test": {"rows": [{"prompt": "x", "completion": "y"}]}},
    ],
    ids=["an unused column", "an absent method", "a default and what only watches", "what is measured"],
)
def test_what_does_not(changes: dict[str, Any]) -> None:
    assert identity(with_stage(**changes)) == identity(stream())


def test_a_copied_file_is_the_same_data(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, ROWS)))
    found = [
        identity(
            with_stage(
                data={"file": name, "fields": {"prompt": "q", "completion": "a"}},
                methods=[{"type": "replay", "general": {"file": name, "fields": {"prompt": "q", "completion": "a"}}}],
            )
        )
        for name in ("a.jsonl", "b.jsonl")
    ]
    assert found[0] == found[1]


def test_a_folder_called_snapshots_is_known_by_its_bytes(tmp_path: Path) -> None:
    base = tmp_path / "snapshots" / "step1"
    shutil.copytree(model_path("tiny-world"), base)
    before = base_identity(stream(model=ModelSpec(path=str(base)).model_dump()))
    weights = base / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert base_identity(stream(model=ModelSpec(path=str(base)).model_dump())) != before


def test_scores_belong_to_weights_not_to_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method's code changed: `new` trains other weights, and their scores are measured, not remembered."""
    first = run(stream(), say=lambda line: None)
    again = run(stream(), new=True, say=lambda line: None)
    measured = [json.loads((r.find("one").eval / "DONE").read_text())["facts"]["measured"] for r in (first, again)]
    assert measured == [["sums"], []]  # equal weights
    monkeypatch.setattr(HFT, "prepare_model", lambda self, model, stage: model)
    other = run(stream(), new=True, say=lambda line: None)
    assert json.loads((other.find("one").eval / "DONE").read_text())["facts"]["measured"] == ["sums"]


def test_replay_of_an_earlier_stage_takes_the_rows_it_was_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    many = [{"prompt": f"Say {i}", "completion": str(i)} for i in range(200)]
    one = {"name": "one", "data": {"rows": many, "limit": 8, "shuffle": True}}
    two = {"name": "two", "data": {"rows": many[:20]}, "methods": [{"type": "replay", "ratio": 0.5, "earlier": "all"}]}
    wanted = stream(stages=[one, two])
    trained = read_inputs(wanted, lambda line: None).stages[0].rows.rows
    seen: list[Any] = []
    real = StageData.add

    def add(self: StageData, name: str, rows: Any, rows_per_batch: int) -> None:
        seen.extend(rows.dataset["input_ids"])
        real(self, name, rows, rows_per_batch)

    monkeypatch.setattr(StageData, "add", add)
    done = run(wanted, say=lambda line: None)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path("tiny-world"))
    replayed = [tokenizer.decode(ids) for ids in seen]
    assert len(replayed) == 8
    assert all(any(f"{row.prompt}<" in text for text in replayed) for row in trained)
    assert done.find("two").done() is not None


def test_another_streams_plan_is_refused_before_anything_is_written() -> None:
    done = run(stream(), say=lambda line: None)
    before = (done.path / "stream.yaml").read_text()
    for other in (stream(name="other"), with_stage(name="renamed")):
        with pytest.raises(RunDirError, match=r"is a run of stream|another version of the stream"):
            measure_again(done, other)
    assert (done.path / "stream.yaml").read_text() == before


def test_a_stream_that_keeps_only_its_last_weights_still_grows_and_refuses_in_time() -> None:
    last = {"retention": {"models": "last"}}
    two = stream().stages[0].model_dump(mode="json") | {"name": "two"}
    base = stream(**last, stages=[stream().stages[0].model_dump(mode="json"), two])
    done = run(base, say=lambda line: None)
    assert not done.find("one").model.exists()
    three = two | {"name": "three", "test": {"task": "tiny_world/copy", "limit": 10}}
    said: list[str] = []
    grown = run(
        base.model_copy(
            update={"stages": [*base.stages, Stream.parse({"name": "x", "model": "m", "stages": [three]}).stages[0]]}
        ),
        say=said.append,
    )
    matrix = json.loads((grown.path / "matrix.json").read_text())
    assert ["three" in row["scores"] for row in matrix["rows"]] == [True, False, True, True]
    assert any("01_one were not kept" in line for line in said)
    before = sorted(path.name for path in (grown.path / "stages").iterdir())
    changed = two | {"training": {"learning_rate": 1e-5}}
    with pytest.raises(RunDirError, match="which were not kept"):
        run(stream(**last, stages=[stream().stages[0].model_dump(mode="json"), changed]), say=lambda line: None)
    assert sorted(path.name for path in (grown.path / "stages").iterdir()) == before
    assert Run(grown.path).find("two").done() is not None
