"""Self-rewritten answers in a stream: written once before the stage, kept in the run's memory, refused in time."""

import json
from pathlib import Path
from typing import Any

import pytest

from cpt import ConfigError, Run, Stream, run
from cpt.data.memory import Memory
from cpt.writing import Writer

pytestmark = pytest.mark.e2e

REWRITE = {"type": "rewrite", "template": "{question}{answer}", "max_new_tokens": 24, "temperature": 0.7}


def stream(folder: Path, data: dict[str, Any], **method: Any) -> Stream:
    return Stream.parse(
        {
            "name": "own",
            "model": "tiny-world",
            "output_dir": str(folder),
            "training": {"per_device_train_batch_size": 16, "max_steps": 4, "learning_rate": 1e-3},
            "stages": [{"name": "copy", "data": data, "methods": [REWRITE | method]}],
            "evaluation": {"within": "off"},
        }
    )


def weights(done: Run) -> bytes:
    (file,) = done.path.glob("stages/01_copy/model/*.safetensors")
    return file.read_bytes()


def test_a_stage_learns_what_the_model_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, lines = {"task": "tiny_world/copy", "limit": 40}, list[str]()
    done = run(stream(tmp_path / "a", data), say=lines.append)
    facts = json.loads((done.path / "stages/01_copy/DONE").read_text())["facts"]["methods"]["rewrite"]
    assert facts["rewritten"] + sum(facts["stay"].values()) == facts["asked"] == 40
    assert facts["rewritten"] > 20
    assert any(line.strip() == f"rewrite: {facts['note']}" for line in lines)
    (entry,) = Memory(done.path / "memory").entries()
    assert len(entry.rows) == facts["rewritten"]
    assert weights(run(stream(tmp_path / "b", data), say=lambda line: None)) == weights(done)
    assert weights(run(stream(tmp_path / "c", data, share=0.0), say=lambda line: None)) != weights(done)

    def refuse(self: Writer, **how: Any) -> Any:
        raise AssertionError("written again")

    (done.path / "stages/01_copy/DONE").unlink()
    before = weights(done)
    monkeypatch.setattr(Writer, "_part", refuse)
    assert weights(run(stream(tmp_path / "a", data), say=lambda line: None)) == before


def test_conversations_of_several_turns_are_refused_before_anything_trains(tmp_path: Path) -> None:
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")]
    with pytest.raises(ConfigError, match=r"stages\.0\.methods\.0\.type = 'rewrite': row .* is no single question"):
        run(stream(tmp_path, {"rows": [{"messages": turns}]}), say=lambda line: None)
    assert not list(tmp_path.rglob("DONE"))


def test_references_that_nothing_can_agree_with(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stages\.0\.methods\.0\.verify = 'numeric': .*: take another way, or none"):
        run(stream(tmp_path, {"rows": [{"prompt": "a", "completion": "b"}]}, verify="numeric"), say=lambda line: None)
