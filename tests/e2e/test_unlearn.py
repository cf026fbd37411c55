"""A stream that forgets: what its matrix, its ledger and its page say, killed and resumed, and on a later stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpt import Run, Stopped, Stream, TrainingError, run
from cpt.ledger import HEAD_FACT, Ledger
from cpt.report.changes import changes
from cpt.signals import StopRequest

pytestmark = pytest.mark.e2e

TRAINING = {"per_device_train_batch_size": 8, "max_steps": 14, "learning_rate": 2e-3, "logging_steps": 1}


def stream(tmp_path: Path, **forget: Any) -> Stream:
    """Forget ten people, keep others, then learn something else."""
    gone = {
        "name": "gone",
        "kind": "unlearn",
        "data": {"task": "tiny_world/people_forgotten"},
        "test": {"task": "tiny_world/people_forgotten", "limit": 12},
        "retain": {"task": "tiny_world/people_kept", "limit": 40},
        "requested_by": "ticket 7",
        "methods": [{"type": "npo", "beta": 0.5}],
        **forget,
    }
    then = {
        "name": "then",
        "data": {"task": "tiny_world/reverse", "limit": 64},
        "test": {"task": "tiny_world/reverse", "limit": 8},
    }
    raw = {"name": "forgets", "model": "tiny-world", "training": TRAINING, "stages": [gone, then]}
    general = {"kept": {"task": "tiny_world/people_kept", "limit": 12}}
    raw |= {"evaluation": {"general": general, "within": "off"}, "output_dir": str(tmp_path)}
    return Stream.parse(raw)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(stream(tmp_path_factory.mktemp("runs")), say=lambda line: None)


def test_the_matrix_counts_what_is_to_be_forgotten_apart(finished: Run) -> None:
    matrix = json.loads((finished.path / "matrix.json").read_text())
    assert (matrix["tasks"], matrix["forget"], matrix["general"]) == (["then"], ["gone"], ["kept"])
    before, after = (matrix["rows"][i]["scores"]["gone"]["exact_match"]["value"] for i in (0, 1))
    assert before == 1.0
    assert after < 0.7
    said = [str(line) for line in changes(matrix, 1)]
    (line,) = [one for one in said if one.split()[0] == "gone"]
    assert "to forget" in line
    assert "worse" not in line
    assert "better" not in line


def test_the_ledger_says_what_was_done_and_never_the_text(finished: Run) -> None:
    with Ledger.open(finished.path) as ledger:
        (request,) = ledger.requests()
        assert (request.state, request.who, request.stage) == ("applied", "ticket 7", "gone")
        assert len(request.rows) == 80
        events = [entry.event for entry in ledger.entries()]
        assert events == ["opened", "requested", "applied", "reopened"]
        assert ledger.entries()[2].body["method"]["type"] == "npo"
    for name in ("gone", "then"):
        stage = finished.find(name)
        assert stage is not None
        assert stage.done()["facts"][HEAD_FACT]["number"] == (3 if name == "gone" else 4)  # type: ignore[index]
    held = (finished.path / "ledger.sqlite").read_bytes()
    assert b"Goran" not in held  # one of the ten


def test_run_again_nothing_is_asked_twice(finished: Run) -> None:
    again = run(stream(finished.path.parent), say=lambda line: None)
    assert again.path == finished.path
    with Ledger.open(again.path) as ledger:
        assert len(ledger.entries()) == 4


def test_the_page_and_the_comparison_have_the_set(finished: Run) -> None:
    from cpt import write_report

    page = write_report(finished.path)
    assert "to forget" in page.read_text(encoding="utf-8")
    assert "to forget, since the base: gone" in (page.parent / "report.md").read_text(encoding="utf-8")


def test_stopped_and_resumed_it_is_the_same(finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def stop(self: StopRequest) -> bool:
        asked.append(1)
        return 4 < len(asked) < 9

    monkeypatch.setattr(StopRequest, "__call__", stop)
    with pytest.raises(Stopped):
        run(stream(tmp_path), say=lambda line: None)
    monkeypatch.undo()
    with Ledger.open(next(tmp_path.glob("forgets-*"))) as ledger:
        assert [one.state for one in ledger.requests()] == ["requested"]
    done = run(stream(tmp_path), say=lambda line: None)
    for name in ("gone", "then"):
        assert done.find(name).done()["model"] == finished.find(name).done()["model"]  # type: ignore[union-attr, index]
    with Ledger.open(done.path) as ledger:
        assert [entry.event for entry in ledger.entries()] == ["opened", "requested", "applied", "reopened"]


def test_a_request_goes_with_its_stage_and_is_asked_anew(tmp_path: Path) -> None:
    said: list[str] = []
    done = run(stream(tmp_path), say=said.append)
    assert any("request R1 is applied, which does not say that the rows are gone" in line for line in said)
    again = run(stream(tmp_path, methods=["simnpo"]), run_dir=done.path, say=said.append)
    assert any("request R1 is superseded with its stage" in line for line in said)
    with Ledger.open(again.path) as ledger:
        assert [(one.id, one.state) for one in ledger.requests()] == [("R1", "superseded"), ("R2", "applied")]
        assert ledger.verify() == []


def test_what_breaks_off_is_a_request_that_failed(tmp_path: Path) -> None:
    broken = stream(tmp_path, training={"learning_rate": 1e30}, methods=["grad_ascent"])
    with pytest.raises(TrainingError, match="was not a number"):
        run(broken, say=lambda line: None)
    with Ledger.open(next(tmp_path.glob("forgets-*"))) as ledger:
        (request,) = ledger.requests()
        assert request.state == "failed"
        assert not list(ledger.run_dir.glob("stages/01*/DONE"))
