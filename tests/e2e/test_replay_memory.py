"""What replay keeps of earlier stages, chosen and forgotten, in a stream that trains."""

import json
from pathlib import Path
from typing import Any

import pytest

from cpt import ConfigError, DataError, Run, Stream, run
from cpt.data.memory import Memory, read_rows

pytestmark = pytest.mark.e2e

TASKS = ("reverse", "last_letter", "sums")


def stream(folder: Path, **replay: Any) -> Stream:
    def stage(name: str) -> dict[str, Any]:
        method = {"type": "replay", "ratio": 0.25, "earlier": "all", **replay}
        return {"name": name, "data": {"task": f"tiny_world/{name}", "limit": 60}, "methods": [method]}

    training = {"per_device_train_batch_size": 8, "max_steps": 3, "logging_steps": 1}
    about = {"name": "memory", "model": "tiny-world", "output_dir": str(folder), "training": training}
    return Stream.parse(about | {"stages": list(map(stage, TASKS)), "evaluation": {"within": "off"}})


def kept(done: Run, stage: str) -> dict[str, list[str]]:
    """Prompts by source that a stage replayed."""
    entries = [one for one in Memory(done.path / "memory").entries() if one.folder.name.startswith(f"replay-{stage}-")]
    return {one.about["source"]: [str(row.prompt) for row in read_rows(one.folder / "rows.jsonl")] for one in entries}


def test_the_rows_with_the_highest_losses_are_kept(tmp_path: Path) -> None:
    """Ranked here by another path: the harness's own measure on the model that the stage starts from."""
    from transformers import AutoTokenizer

    from cpt.data.sources import load
    from cpt.data.spec import Source
    from cpt.models import open_model
    from eval_harness.prompts import encode
    from eval_harness.scoring import score

    done = run(stream(tmp_path, select="highest_loss", rows_per_stage=5), say=lambda line: None)
    found = kept(done, "sums")
    assert {name: len(rows) for name, rows in found.items()} == {
        "tiny_world/reverse:train": 5,
        "tiny_world/last_letter:train": 5,
    }
    start = done.find("last_letter").path / "model"
    rows = load(Source(task="tiny_world/reverse", limit=60), None, "rows").rows
    tokenizer = AutoTokenizer.from_pretrained(start)
    encoded = [encode(tokenizer, row, "auto") for row in rows]
    model = open_model(start, Stream.stored(done.path / "stream.yaml").model)
    scores = [one for one in score(model, encoded) if one is not None]
    worst = sorted(range(60), key=lambda i: scores[i].log_prob / scores[i].tokens)[:5]
    assert found["tiny_world/reverse:train"] == [rows[i].prompt for i in sorted(worst)]


def test_a_forgotten_row_is_replayed_no_more(tmp_path: Path) -> None:
    done = run(first := stream(tmp_path, rows_per_stage=0.5), say=lambda line: None)
    before = kept(done, "sums")["tiny_world/reverse:train"]
    assert len(before) == 30
    (entry,) = [
        one
        for one in Memory(done.path / "memory").entries()
        if one.folder.name.startswith("replay-sums-") and "reverse" in one.about["source"]
    ]
    gone = read_rows(entry.folder / "rows.jsonl")[7]
    Memory(done.path / "memory").forget([gone.id])
    again = run(first.model_copy(update={"seed": 1}), run_dir=str(done.path), say=lambda line: None)
    for stage in ("last_letter", "sums"):
        assert gone.prompt not in kept(again, stage).get("tiny_world/reverse:train", [])
    files = [file for file in (again.path / "memory").rglob("*") if file.is_file()]
    assert not [file for file in files if gone.id in file.read_text(errors="replace")]
    assert not [file for file in files if f'"{gone.prompt}"' in file.read_text(errors="replace")]


def test_a_memory_that_holds_a_forgotten_row_stops_the_run(tmp_path: Path) -> None:
    done = run(first := stream(tmp_path, rows_in_all=20, select="reservoir"), say=lambda line: None)
    memory = Memory(done.path / "memory")
    entry = next(one for one in memory.entries() if one.folder.name.startswith("replay-sums-"))
    (memory.folder / "forgotten.json").write_text(json.dumps({"digests": []}))
    memory._remember({entry.rows[0]})
    with pytest.raises(DataError, match="holds 1 forgotten rows; remove the folder"):
        run(first.model_copy(update={"seed": 1}), run_dir=str(done.path), say=lambda line: None)


def test_a_budget_over_all_stages_is_shared_out(tmp_path: Path) -> None:
    done = run(stream(tmp_path, rows_in_all=11, select="balanced"), say=lambda line: None)
    assert sorted(map(len, kept(done, "sums").values())) == [5, 6]
    assert [len(rows) for rows in kept(done, "last_letter").values()] == [11]


@pytest.mark.parametrize(
    ("replay", "problem"),
    [
        ({"select": "reservoir"}, "rows_in_all.*shares out a budget"),
        ({"select": "balanced", "rows_in_all": 5, "rows_per_stage": 2}, "rows_per_stage.*leave it out"),
        ({"rows_in_all": 5}, "rows_in_all.*reservoir or balanced"),
        ({"rows_per_stage": 2.5}, "rows_per_stage.*whole number, or a share below 1"),
        ({"select": "lowest_loss", "earlier": None, "general": {"rows": [{"text": "a b"}]}}, "select.*earlier: all"),
    ],
)
def test_budgets_that_do_not_go_together_are_refused(tmp_path: Path, replay: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"methods\.0\.{problem}"):
        stream(tmp_path, **replay)
