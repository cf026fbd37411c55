"""DER++: three means of their own, the log-probabilities that a stage ended with, found again by later stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cpt import ConfigError, Run, Stream, run
from cpt.data.memory import Memory, read_rows
from cpt.data.tokens import TokenRows
from cpt.losses.distances import mean_square
from cpt.methods.base import StageInfo
from cpt.methods.der import DER
from tests.contract.lab import Lab, distance

METHOD = {"type": "der", "ratio": 0.5, "alpha": 1.0, "beta": 0.7, "top_k": 5}
SGD = {"optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0, "learning_rate": 0.5}


@pytest.fixture
def lab(tmp_path: Path, tiny_tokenizer: Any, tiny_llama: Any) -> Lab:
    return Lab(tmp_path, tiny_tokenizer, tiny_llama)


def log_probs(model: Any, row: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, V) log-probabilities at the learned tokens of one row alone, and (N,) what was to be said."""
    labels = torch.tensor(row["labels"])[1:]
    found = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1].log_softmax(1)
    return found[labels != -100], labels[labels != -100]


def logged(outcome: Any) -> list[float]:
    return [line["der/logits"] for line in outcome.lines if "der/logits" in line]


# ---- the formula --------------------------------------------------------------------------------------


def test_the_distance_by_hand() -> None:
    student = torch.tensor([[-1.0, -3.0], [-2.0, -2.0]], requires_grad=True)
    found = mean_square(student, torch.tensor([[-2.0, -1.0], [-2.0, -2.0]]))
    assert found.tolist() == [2.5, 0.0]
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert gradient.tolist() == [[1.0, -2.0], [0.0, 0.0]]


def test_the_losses_are_three_means_of_their_own(lab: Lab) -> None:
    """One step of plain SGD is the gradient of mean task loss + beta x mean replayed loss; at the start the distance
    and its gradient are zero."""
    found, batch = lab.stage([METHOD], max_steps=1, **SGD), lab.batch(0, [METHOD])
    assert [row["origin"] for row in batch].count(1) == 2
    model, losses, counts = lab.model(), [torch.zeros(()), torch.zeros(())], [0, 0]
    for row in batch:
        said, label = log_probs(model, row)
        losses[row["origin"]] = losses[row["origin"]] - said.gather(1, label.unsqueeze(1)).sum()
        counts[row["origin"]] += len(label)
    assert counts[0] != counts[1]
    (losses[0] / counts[0] + 0.7 * losses[1] / counts[1]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found.after[name], parameter.detach() - 0.5 * parameter.grad, atol=2e-5, rtol=1e-4)
    assert logged(found)[0] == pytest.approx(0.0, abs=1e-9)


def test_the_logged_distance_is_the_formula(lab: Lab) -> None:
    """In the second step of plain SGD, on full logits row by row, over the likely tokens of the start."""
    about = METHOD | {"alpha": 1e-12}
    two, one = (lab.stage([about], max_steps=steps, **SGD) for steps in (2, 1))
    start, moved = lab.model(), lab.model()
    moved.load_state_dict(one.after, strict=False)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in lab.batch(1, [about]):
            if row["origin"] == 1:
                kept = log_probs(start, row)[0].topk(5)
                now = log_probs(moved, row)[0].gather(1, kept.indices)
                total += float((now - kept.values).square().mean(1).sum())
                count += len(now)
    assert count > 0
    assert logged(two)[1] == pytest.approx(1e-12 * total / count, rel=1e-3)


def test_a_larger_alpha_keeps_the_logits_nearer(lab: Lab) -> None:
    """Without the replayed rows' own loss, which pulls away from what the start said."""
    alphas, how = (1e-6, 0.1, 1.0), {"max_steps": 24, "learning_rate": 2e-3}
    runs = [logged(lab.stage([METHOD | {"alpha": alpha, "beta": 0.0}], **how))[-4:] for alpha in alphas]
    ends = [sum(found) / alpha for found, alpha in zip(runs, alphas, strict=True)]
    assert ends[0] > 1.5 * ends[1] > 1.5 * 1.5 * ends[2]


def test_without_alpha_nothing_is_recorded(lab: Lab) -> None:
    assert DER(alpha=0.0).needs == frozenset()
    plain = lab.stage([METHOD | {"alpha": 0.0}])
    assert [entry.about["of"] for entry in Memory(lab.memory).entries()] == ["rows"]
    assert logged(plain) == []
    assert "logits_of" not in plain.facts["methods"]["der"]
    assert distance(plain.after, lab.stage([METHOD]).after) > 1e-4


# ---- whose logits ------------------------------------------------------------------------------------


def asked(done: Sequence[str], name: str, parent: str = "id2") -> tuple[list[tuple[str, bool]], str]:
    """What a made-up run's memory is asked for, in order, as (model, may be made); and after which stage it was."""
    asks: list[tuple[str, bool]] = []

    def record(model: Any, rows: Any, name: str, *, key: str, make: bool, **how: Any) -> str | None:
        asks.append((key, make))
        return key if make or key in done else None

    info = StageInfo(4, "four", "sft", seed=1, batch_rows=4, record=record, parent=parent)
    object.__setattr__(info, "identities", {"zero": "id0", "one": "id1", "two": "id2"})
    method = DER()
    method._parts[name] = TokenRows([])  # type: ignore[arg-type]
    at, found = method._recorded(None, name, info)  # type: ignore[arg-type]
    assert found == asks[-1][0]
    return asks, at


def test_the_first_model_since_the_stages_end_is_taken() -> None:
    assert asked([], "two") == ([("id2", True)], "two")
    assert asked(["id0", "id1"], "zero") == ([("id0", False)], "zero")
    assert asked(["id1"], "zero") == ([("id0", False), ("id1", False)], "one")
    assert asked([], "zero") == ([("id0", False), ("id1", False), ("id2", True)], "two")


def test_a_schedule_that_goes_on_starts_from_another_state() -> None:
    assert asked([], "two", parent="id2/state") == ([("id2", False), ("id2/state", True)], "two/state")
    keys = [("id0", False), ("id0/state", False)]
    assert asked(["id0/state"], "zero", parent="id2/state") == (keys, "zero/state")


def stream(folder: Path, *stages: str, name: str = "dark", **method: Any) -> Stream:
    """Three tiny stages; those named replay what came before."""

    def stage(task: str) -> dict[str, Any]:
        der = {"type": "der", "rows_per_stage": 20, "top_k": 4, **method}
        methods = [der] if task in stages else []
        return {"name": task, "data": {"task": f"tiny_world/{task}", "limit": 40}, "methods": methods}

    training = {"per_device_train_batch_size": 8, "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-3}
    about = {"name": name, "model": "tiny-world", "output_dir": str(folder), "training": training}
    return Stream.parse(about | {"stages": list(map(stage, TASKS)), "evaluation": {"within": "off"}})


TASKS = ("reverse", "last_letter", "sums")


def facts(done: Run, stage: str) -> dict[str, Any]:
    record = done.find(stage).done()
    assert record is not None
    found: dict[str, Any] = record["facts"]["methods"]["der"]
    return found


def recordings(done: Run) -> dict[str, list[str]]:
    """Identities of the models that were recorded, by the stage whose rows they are."""
    entries = [one for one in Memory(done.path / "memory").entries() if one.about["of"] == "top_k"]
    found: dict[str, list[str]] = {}
    for one in entries:
        found.setdefault(one.folder.name.split("-")[1], []).append(one.about["model"])
    return found


def identity(done: Run, stage: str) -> str:
    record = done.find(stage).done()
    assert record is not None
    return str(record["identity"])


@pytest.mark.e2e
def test_a_stage_finds_what_the_ones_before_it_recorded(tmp_path: Path) -> None:
    done = run(stream(tmp_path, *TASKS), say=lambda line: None)
    assert facts(done, "reverse") == {"note": "no earlier stage to replay"}
    own = {"reverse": "reverse", "last_letter": "last_letter"}
    assert facts(done, "sums") == {"rows": 40, "rows_per_batch": 2, "logits_of": own}
    assert facts(done, "last_letter")["logits_of"] == {"reverse": "reverse"}
    assert recordings(done) == {name: [identity(done, name)] for name in own}  # once each, under the model of its end


@pytest.mark.e2e
def test_what_is_kept_is_what_the_finished_stage_says(tmp_path: Path) -> None:
    """Read from the stage's saved model by another path."""
    from transformers import AutoTokenizer

    from cpt.data.activations import TopK
    from cpt.data.tokens import TokenSettings, tokenise
    from cpt.models import open_model

    done = run(stream(tmp_path, "last_letter"), say=lambda line: None)
    held = {one.about["of"]: one.folder for one in Memory(done.path / "memory").entries()}
    start = done.find("reverse").path / "model"
    rows = read_rows(held["rows"] / "rows.jsonl")
    tokens = tokenise(rows, AutoTokenizer.from_pretrained(start), TokenSettings(), "rows").dataset
    assert len(tokens) == 20
    model = open_model(start, Stream.stored(done.path / "stream.yaml").model)
    with torch.no_grad():
        for number in (0, 7, 19):
            wanted = log_probs(model, tokens[number])[0].topk(4)
            found, values = TopK(held["top_k"]).top_k([number], "cpu")
            torch.testing.assert_close(values, wanted.values, atol=1e-4, rtol=1e-4)
            assert (found == wanted.indices).float().mean() > 0.9  # ties aside


@pytest.mark.e2e
def test_what_nobody_recorded_is_recorded_late_and_told(tmp_path: Path) -> None:
    said: list[str] = []
    done = run(stream(tmp_path, "sums"), say=said.append)
    found = facts(done, "sums")
    assert found["logits_of"] == {"reverse": "last_letter", "last_letter": "last_letter"}
    text = "no logits were recorded when these stages ended: reverse (those after last_letter are kept)"
    assert found["note"] == text
    assert f"  der: {text}" in said
    assert recordings(done) == {name: [identity(done, "last_letter")] for name in ("reverse", "last_letter")}


@pytest.mark.e2e
def test_a_forgotten_row_leaves_rows_and_recordings(tmp_path: Path) -> None:
    done = run(first := stream(tmp_path, *TASKS), say=lambda line: None)
    memory = Memory(done.path / "memory")
    (rows,) = [one for one in memory.entries() if one.about["of"] == "rows" and "reverse" in one.about["source"]]
    gone = read_rows(rows.folder / "rows.jsonl")[3]
    assert len(memory.forget([gone.id])) == 2
    assert list(recordings(done)) == ["last_letter"]
    again = run(first.model_copy(update={"seed": 1}), run_dir=str(done.path), say=lambda line: None)
    assert facts(again, "sums")["rows"] == 40
    held = [one for one in Memory(again.path / "memory").entries() if gone.id in one.rows]
    assert held == []


# ---- refused before training -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ratio": 0.3}, r"ratio = 0\.3: of 8 rows is 2\.4 rows"),
        ({"earlier": ["revers"]}, "earlier = .*no earlier stage"),
        ({"rows_per_stage": 1.5}, "rows_per_stage"),
        ({"alpha": -1.0}, "alpha = -1.0"),
    ],
    ids=str,
)
def test_refused(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        stream(tmp_path, "sums", **given)


def test_packing_is_refused_before_anything_trains(tmp_path: Path) -> None:
    raw = stream(tmp_path, "sums").model_dump(mode="json", exclude_unset=True)
    raw["training"] |= {"packing": True, "max_length": 64}
    with pytest.raises(ConfigError, match="packing = true: der knows what the base computed of each row alone"):
        run(Stream.parse(raw), say=lambda line: None)
