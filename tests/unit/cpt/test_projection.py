"""Projection: what a stage may not see, it cannot change; and what it may, it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cpt import ConfigError, Run, Stream, run
from cpt.config import ModelSpec
from cpt.data import subspace
from cpt.data.subspace import input_subspaces
from cpt.losses.projection import cleared, energies, without
from cpt.models import base_tokenizer, open_model
from cpt.trainers.session import read_metrics
from tests.contract.lab import GENERAL_ROWS, Lab

GENERAL = {"task": "tiny_world/general", "limit": 60}
METHOD = {"type": "projection", "general": GENERAL}


def stream(folder: Path, name: str, methods: list[dict[str, Any]], **stage: Any) -> Stream:
    """A stage of 60 steps on a new task beside an adapter of rank 8, under AdamW with weight decay."""
    training = {"per_device_train_batch_size": 16, "learning_rate": 3e-3, "weight_decay": 0.1, "max_steps": 60}
    training |= {"logging_steps": 10, "lr_scheduler_type": "constant"}
    about = {"name": name, "model": "tiny-world", "output_dir": str(folder), "training": training}
    own = {"name": "reverse", "data": {"task": "tiny_world/reverse"}, "adapter": "new", "methods": methods, **stage}
    return Stream.parse(about | {"stages": [own], "evaluation": {"within": "off"}})


def test_a_weight_clear_of_a_subspace_gives_nothing_for_it() -> None:
    make = torch.Generator().manual_seed(0)
    weight, x = torch.randn(5, 12, generator=make), torch.randn(7, 12, generator=make)
    u = torch.linalg.qr(torch.randn(12, 4, generator=make))[0]
    inside, outside = x @ u @ u.T, x - x @ u @ u.T
    torch.testing.assert_close(inside @ cleared(weight, u).T, torch.zeros(7, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(outside @ cleared(weight, u).T, outside @ weight.T)
    layer = torch.nn.Linear(12, 5, bias=False)
    torch.testing.assert_close(without(layer, x, layer(x), u), outside @ layer.weight.T)
    up = torch.randn(9, 5, generator=make)
    part, whole = energies(weight, up, u)
    update = (up @ weight).double()
    assert part == pytest.approx(float((update @ u.double()).square().sum()))
    assert whole == pytest.approx(float(update.square().sum()))


def test_the_subspace_is_that_of_the_rows_singular_vectors(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: the inputs of one layer stacked, their singular vectors; and a sketch finds the same."""
    model, rows = lab.model(lora=True), dataset(lab)
    name, layer = next((n, m) for n, m in model.named_modules() if n.endswith("mlp.down_proj"))
    read: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: read.append(args[0][0]))
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row["input_ids"]]))
    handle.remove()
    x = torch.cat(read)
    x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
    _, sizes, vectors = torch.linalg.svd(x.double(), full_matrices=False)
    share = sizes.square().cumsum(0) / sizes.square().sum()
    rank = 1 + int((share < 0.9).sum())
    (found,) = input_subspaces(model, {name: layer}, rows, 0.9, lambda width: width, 0).values()
    assert found.shape == (x.shape[1], rank)
    wanted = vectors[:rank].T @ vectors[:rank]
    torch.testing.assert_close((found @ found.T).double(), wanted, atol=1e-4, rtol=0)
    monkeypatch.setattr(subspace, "WIDE", 8)
    monkeypatch.setattr(subspace, "SKETCH", x.shape[1] - 2)
    (sketched,) = input_subspaces(model, {name: layer}, rows, 0.9, lambda width: width, 0).values()
    assert sketched.shape == found.shape
    overlap = torch.linalg.svdvals(found.T @ sketched)
    assert overlap.min() > 0.99


def test_layers_that_read_one_tensor_share_a_subspace(lab: Lab) -> None:
    model = lab.model(lora=True)
    layers = {n: m for n, m in model.named_modules() if n.endswith("_proj")}
    found = input_subspaces(model, layers, dataset(lab), 0.9, lambda width: 3, 0)
    shared = {frozenset(name.rpartition(".")[2] for name in names.split(",")) for names in found}
    assert {frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"gate_proj", "up_proj"})} < shared
    assert all(u.shape[1] <= 3 for u in found.values())
    assert len(found) == 2 * 4


@pytest.mark.e2e
def test_nothing_leaks_while_the_task_is_learned(tmp_path: Path) -> None:
    """Under AdamW with weight decay; the task's loss falls at least half as far as without."""
    ends = {name: run(stream(tmp_path, name, ms), say=quiet) for name, ms in (("plain", []), ("clear", [METHOD]))}
    falls = {name: fallen(end) for name, end in ends.items()}
    assert falls["plain"] > 0.5
    assert falls["clear"] > falls["plain"] / 2
    facts = method_facts(ends["clear"])
    assert 0 < facts["leak"] < 1e-5
    assert all(0 < rank <= 0.5 for rank in facts["saturation"].values())
    assert len(facts["saturation"]) == 4 * 7


@pytest.mark.e2e
def test_protected_rows_give_what_they_gave_and_the_folded_adapter_merges(tmp_path: Path) -> None:
    method = METHOD | {"energy": 0.99, "max_rank": 256}
    ends = {name: run(stream(tmp_path, name, ms), say=quiet) for name, ms in (("plain", []), ("clear", [method]))}
    spec = ModelSpec(path="tiny-world")
    base, rows, moved = open_model(None, spec), protected_rows(), {}
    with torch.no_grad():
        for name, end in ends.items():
            model = open_model(end.find("reverse").model, spec)
            moved[name] = sum(divergence(base(row).logits, model(row).logits) for row in rows) / len(rows)
            seen = model(rows[0]).logits
            torch.testing.assert_close(model.merge_and_unload()(rows[0]).logits, seen, atol=1e-4, rtol=1e-4)
    assert moved["plain"] > 0.5
    assert moved["clear"] < moved["plain"] / 10


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"adapter": None}, "needs a new adapter beside the weights: give the stage adapter: new"),
        ({"adapter": {"mode": "new", "lora": {"use_dora": True}}}, "leave adapter.lora.use_dora out"),
        ({"adapter": {"mode": "new", "lora": {"init_lora_weights": False}}}, "leave adapter.lora.init_lora_weights"),
        ({"methods": [{"type": "projection"}]}, "no rows to protect"),
        ({"methods": [{"type": "projection", "earlier": ["revrse"]}]}, "is no earlier stage"),
    ],
)
def test_refused_before_training(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        stream(tmp_path, "refused", **{"methods": [METHOD], **given})


def test_the_first_stage_of_a_stream_has_nothing_earlier(tmp_path: Path) -> None:
    one = {"type": "projection", "earlier": "all"}
    parts = stream(tmp_path, "first", [one]).model_dump(mode="json")
    parts["stages"][0]["training"] = {"max_steps": 2}
    done = run(Stream.parse(parts), say=quiet)
    assert method_facts(done) == {"note": "no earlier stage to protect"}


# ---- helpers ----------------------------------------------------------------------------------------


@pytest.fixture
def lab(tmp_path: Path, tiny_tokenizer: Any, tiny_llama: Any) -> Lab:
    return Lab(tmp_path, tiny_tokenizer, tiny_llama)


def quiet(line: str) -> None:
    """Say nothing."""


def dataset(lab: Lab) -> Any:
    from cpt.data.spec import Source
    from tests.contract.lab import configured

    return lab.data(configured([], "sft", {}), {}).load([Source(rows=GENERAL_ROWS)], "rows", None).dataset


def method_facts(end: Run) -> dict[str, Any]:
    done = end.find("reverse").done()
    assert done is not None
    found: dict[str, Any] = done["facts"]["methods"]["projection"]
    return found


def fallen(end: Run) -> float:
    """How far the loss fell from its first logged value to its last."""
    losses = [line["loss"] for line in read_metrics(end.find("reverse").path / "metrics.jsonl") if "loss" in line]
    return float(losses[0] - losses[-1])


def divergence(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL over the tokens of a row, in nats."""
    p, q = one.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def protected_rows() -> list[torch.Tensor]:
    """(1, T) token ids of the rows whose inputs are protected."""
    from cpt.data.sources import load_all
    from cpt.data.spec import Source
    from cpt.data.tokens import TokenSettings, tokenise

    tokenizer = base_tokenizer(Stream.parse({"name": "a", "model": "tiny-world"}))
    rows = load_all([Source.model_validate(GENERAL)], None, "general").rows
    found = tokenise(rows, tokenizer, TokenSettings(), "general").dataset
    return [torch.tensor(row["input_ids"]).unsqueeze(0) for row in found]
