"""Penalties around an anchor: the Fisher information against closed forms, the edit against autograd, the chain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cpt import ConfigError, Stream, run
from cpt.data.memory import Memory
from cpt.losses.penalties import fisher_diagonal, pull
from tests.contract.lab import GENERAL_ROWS, Lab, distance

EWC = {"type": "ewc", "strength": 50.0, "general": {"rows": GENERAL_ROWS}}


@pytest.fixture
def lab(tmp_path: Path, tiny_tokenizer: Any, tiny_llama: Any) -> Lab:
    return Lab(tmp_path, tiny_tokenizer, tiny_llama)


def test_the_fisher_of_logistic_regression_is_the_closed_form() -> None:
    """sum x^2 p (1 - p) / n, for labels drawn from the model; the rows' own give (y - p)^2 x^2."""
    make = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=make)
    weight = torch.tensor([0.7, -1.2, 0.3], requires_grad=True)
    p = torch.sigmoid(x @ weight.detach())

    def log_likelihood(row: torch.Tensor, label: float) -> tuple[torch.Tensor, int]:
        z = row @ weight
        return (label * z - torch.nn.functional.softplus(z)), 1

    draws = 3000
    labels = torch.bernoulli(p.repeat(draws, 1), generator=make)
    both = ((x[i], float(labels[d, i])) for d in range(draws // 10) for i in range(40))
    total, count = fisher_diagonal({"w": weight}, (lambda one=one: log_likelihood(*one) for one in both))
    closed = (x.square() * (p * (1 - p)).unsqueeze(1)).mean(0)
    torch.testing.assert_close(total["w"] / count, closed, rtol=0.05, atol=0.0)
    y = labels[0]
    own, n = fisher_diagonal({"w": weight}, (lambda i=i: log_likelihood(x[i], float(y[i])) for i in range(40)))
    torch.testing.assert_close(own["w"] / n, (x.square() * (y - p).square().unsqueeze(1)).mean(0))


def test_ewc_on_logistic_regression_ends_where_the_quadratic_says() -> None:
    """The minimum of new loss's quadratic + penalty, reached by gradient steps with the edit."""
    curvature, new_best = torch.tensor([2.0, 0.5, 1.0]), torch.tensor([1.0, -2.0, 0.5])
    start, fisher, strength = torch.tensor([0.2, 0.3, -0.4]), torch.tensor([0.1, 3.0, 0.0]), 1.5
    weight = start.clone()
    for _ in range(3000):
        gradient, _ = pull(curvature * (weight - new_best), weight, start, strength, fisher)
        weight = weight - 0.05 * gradient
    closed = (curvature * new_best + strength * fisher * start) / (curvature + strength * fisher)
    torch.testing.assert_close(weight, closed, atol=1e-5, rtol=1e-5)


def test_the_edit_is_the_gradient_of_the_penalty() -> None:
    make = torch.Generator().manual_seed(1)
    weight, anchor, fisher, task = (torch.rand(4, 5, generator=make) for _ in range(4))
    weight.requires_grad_()
    value = 0.5 * 3.0 * (fisher * (weight - anchor).square()).sum()
    (wanted,) = torch.autograd.grad(value, weight)
    gradient, penalty = pull(task, weight.detach(), anchor, 3.0, fisher)
    torch.testing.assert_close(gradient, task + wanted)
    torch.testing.assert_close(penalty, value.detach())


def test_the_fisher_of_a_model_is_that_of_its_own_labels(lab: Lab) -> None:
    """Many draws of the true Fisher come near each other, and differ from the empirical one."""
    from cpt.data.fisher import fisher

    model = lab.model()
    rows = lab.data(_stage(), {}).load([_source()], "rows", None).dataset

    def of(**how: Any) -> torch.Tensor:
        found = fisher(model, rows, **how)
        return torch.cat([one.flatten() for one in found.values()])

    one, two, own = of(sampled=True, seed=1), of(sampled=True, seed=1000), of(sampled=False, seed=1)
    assert torch.equal(one, of(sampled=True, seed=1))
    assert torch.nn.functional.cosine_similarity(one, two, dim=0) > 0.5
    assert not torch.allclose(one, own)
    assert (one >= 0).all()


def _stage() -> Any:
    from tests.contract.lab import configured

    return configured([], "sft", {})


def _source() -> Any:
    from cpt.data.spec import Source

    return Source(rows=GENERAL_ROWS)


def test_a_stronger_penalty_keeps_the_weights_nearer(lab: Lab) -> None:
    ends = [lab.stage([EWC | {"strength": strength}], max_steps=10) for strength in (1e-6, 1e2, 1e5)]
    far = [distance(one.before, one.after) for one in ends]
    assert far[0] > far[2]
    assert all("ewc/penalty" in one.lines[0] for one in ends)
    assert ends[0].lines[0]["ewc/penalty"] == 0.0
    assert ends[1].lines[3]["ewc/penalty"] > 0.0


def stream(folder: Path, **method: Any) -> Stream:
    """Three tiny stages; EWC on what came before."""

    def stage(name: str) -> dict[str, Any]:
        ewc = {"type": "ewc", "earlier": "all", "rows": 20, **method}
        return {"name": name, "data": {"task": f"tiny_world/{name}", "limit": 40}, "methods": [ewc]}

    training = {"per_device_train_batch_size": 8, "max_steps": 2, "logging_steps": 1}
    about = {"name": "held", "model": "tiny-world", "output_dir": str(folder), "training": training}
    stages = [stage(name) for name in ("reverse", "last_letter", "sums")]
    return Stream.parse(about | {"stages": stages, "evaluation": {"within": "off"}})


def test_online_carries_what_the_stage_before_held(tmp_path: Path) -> None:
    done = run(stream(tmp_path, online=0.5), say=lambda line: None)
    by_stage = {one.about["stage"]: one for one in Memory(done.path / "memory").entries()}
    assert sorted(by_stage) == ["last_letter", "sums"]  # before the first stage there is nothing to hold
    first, second = (load_file(by_stage[name].folder / "tensors.safetensors") for name in ("last_letter", "sums"))
    alone = run(stream(tmp_path / "alone"), say=lambda line: None)
    entries = {one.about["stage"]: one for one in Memory(alone.path / "memory").entries()}
    assert len(entries["sums"].rows) == 40  # of both stages, at the weights of now
    assert len(by_stage["sums"].rows) == 40  # its own, and what is carried of the stage before's
    for name, tensor in second.items():
        assert (tensor >= 0.5 * first[name] - 1e-12).all()
    facts = [done.find(name).done()["facts"]["methods"]["ewc"] for name in ("reverse", "last_letter", "sums")]  # type: ignore[index]
    assert facts[0] == {"note": "no earlier stage to hold"}
    assert [one["carried"] for one in facts[1:]] == [False, True]


def test_online_carries_under_a_schedule_that_goes_on(tmp_path: Path) -> None:
    """A stage then starts from before the anneal of the one before, not from its finished model."""
    asked = stream(tmp_path, online=0.5).model_dump(mode="json", exclude_unset=True)
    for stage in asked["stages"]:
        stage["schedule"] = "infinite"
    done = run(Stream.parse(asked), say=lambda line: None)
    facts = [done.find(name).done()["facts"]["methods"]["ewc"] for name in ("last_letter", "sums")]  # type: ignore[index]
    assert [one["carried"] for one in facts] == [False, True]
    assert facts[1]["rows"] == 20  # the stage before's own


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ({"type": "ewc"}, "general.*no rows for the Fisher information"),
        ({"type": "ewc", "general": {"rows": GENERAL_ROWS}, "online": 0.9}, "online = 0.9.*goes from stage to stage"),
        ({"type": "ewc", "earlier": ["revers"]}, "earlier = .*no earlier stage"),
        ({"type": "ewc", "general": {"rows": GENERAL_ROWS}, "strength": -1}, "strength = -1"),
    ],
)
def test_a_fisher_without_data_is_refused(method: dict[str, Any], problem: str) -> None:
    raw = {"name": "s", "model": "tiny-world", "stages": [{"name": "a", "data": {"rows": GENERAL_ROWS}}]}
    raw["stages"][0]["methods"] = [method]  # type: ignore[index]
    with pytest.raises(ConfigError, match=rf"methods\.0\.{problem}"):
        Stream.parse(raw)


def test_l2_sp_pulls_to_the_start_and_to_the_base(lab: Lab) -> None:
    near = lab.stage([{"type": "l2_sp", "strength": 1e3}], max_steps=10)
    free = lab.stage([{"type": "l2_sp", "strength": 1e-9}], max_steps=10)
    assert distance(near.before, near.after) < distance(free.before, free.after)
    start, base = (lab.stage([{"type": "l2_sp", "strength": 5.0, "to": to}]) for to in ("start", "base"))
    assert distance(start.after, base.after) == 0.0  # the lab starts at its base
