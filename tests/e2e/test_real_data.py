"""Real rows and real pretrained models: every form in the research data is recognised, a stage runs on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpt import DataError, Stream, run
from eval_harness.rows import canonical
from eval_harness.sources import read_rows
from tests.evidence import classic_stream

pytestmark = [pytest.mark.e2e, pytest.mark.shared]

# Rows that carry no answer to learn from: verifiable instructions, lists of refusals, tables of other formats.
NO_ANSWER = {"ifeval.test.jsonl"}


def test_every_row_form_is_recognised(shared: Path) -> None:
    """streams, general ability, maths, text, TOFU: each file, each row."""
    folders = [shared / "data" / name for name in ("streams", "general", "math", "text")]
    files = [file for folder in folders for file in sorted(folder.glob("*.jsonl")) if file.name not in NO_ANSWER]
    assert len(files) > 70
    for file in files:
        rows = [canonical(row) for row in read_rows(file=str(file))]
        kinds = {row.kind for row in rows}
        assert kinds == ({"text"} if file.parent.name == "text" else {"completion"}), file.name
    tofu = [canonical(row) for row in read_rows(file=str(shared / "data/unlearning/tofu/full.json"))]
    assert len(tofu) == 4000


def stream(shared: Path, model: str, **changes: Any) -> Stream:
    news = {"hub": "fancyzhx/ag_news", "file": "streams/agnews.{split}.jsonl", "limit": 64}
    stories = {"file": "text/tinystories.{split}.jsonl", "limit": 64}
    raw: dict[str, Any] = {
        "name": "real",
        "model": str(shared / "models" / model),
        "data_root": str(shared / "data"),
        "training": {"max_steps": 4, "per_device_train_batch_size": 8, "max_length": 256, "learning_rate": 1e-3},
        "stages": [
            {"name": "agnews", "data": news, "test": news | {"split": "test", "limit": 20}},
            {"name": "stories", "kind": "pretrain", "data": stories, "training": {"packing": True}},
        ],
        "evaluation": {"general": {"tinystories": stories | {"split": "test", "limit": 10}}},
    }
    replay = {"type": "replay", "ratio": 0.25, "general": stories, "earlier": "all"}
    raw["stages"][1]["methods"] = ["hft", replay]
    return Stream.parse(raw | changes)


def test_a_stream_of_real_rows_on_a_model_that_loses_nothing(shared: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    with pytest.raises(DataError, match=r"pad token '<unk>' is its unknown token.*set tokenizer.pad_token"):
        run(stream(shared, "stories260K"), say=said.append)
    done = run(stream(shared, "stories260K", tokenizer={"pad_token": "</s>"}), say=said.append)
    matrix = json.loads((done.path / "matrix.json").read_text())
    base, agnews, _ = (row["scores"] for row in matrix["rows"])
    assert base["agnews"]["acc"]["note"] == "chance level 0.25"
    assert base["tinystories"]["bits_per_byte"]["value"] == pytest.approx(1.04, abs=0.06)
    assert agnews["agnews"]["answer_loss"]["value"] < base["agnews"]["answer_loss"]["value"]
    assert not [line for line in said if "do not survive" in line]


def test_characters_that_a_tokenizer_loses_are_counted_and_said(shared: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    done = run(stream(shared, "story656K", tokenizer={"pad_token": "<|end_story|>"}), say=said.append)
    assert [line for line in said if "characters do not survive the tokenizer" in line]
    facts = json.loads((done.find("agnews").path / "DONE").read_text())["facts"]
    assert facts["rows"]["task"]["lost_characters"] > 10


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
def test_the_classic_stream_runs_on_its_files(shared: Path, tmp_path: Path) -> None:
    """The recipe with the evidence's settings, a few rows and steps of it: what its table needs is measured."""
    raw = classic_stream.recipe(shared / "data", shared / "models" / "stories260K", tmp_path)
    for stage in raw["stages"]:
        stage["data"] |= {"limit": 32}
        stage["test"] |= {"limit": 8}
    raw["training"] |= {"max_steps": 3, "warmup_steps": 0}
    raw["evaluation"]["general"]["tinystories"] |= {"limit": 4}
    done = run(Stream.parse(classic_stream.streams(raw, seed=0)["hft + replay"]), say=lambda line: None)
    base, *_, last = classic_stream.figures(done)
    for task in ("agnews", "svamp", "dbpedia"):
        assert last[task]["answer_loss"] < base[task]["answer_loss"], task
        assert 0 <= last[task]["accuracy"] <= 1
    assert base["tinystories"]["bits_per_byte"] < 1.3  # a model of stories, on stories
    facts = json.loads((done.find("dbpedia").path / "DONE").read_text())["facts"]
    replayed = {name: facts["methods"][name]["rows_per_batch"] for name in ("general", "earlier")}
    assert replayed == {"general": 2, "earlier": 4}
