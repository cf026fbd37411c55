"""A-GEM: the formula by hand, the gradient against autograd's, and steps that no longer work against what was."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from pydantic import PrivateAttr

from cpt import ConfigError, Method, Stream, run
from cpt.data.gradient import gradient
from cpt.data.tokens import IGNORED
from cpt.losses.conflict import against
from cpt.methods.base import StageInfo
from cpt.methods.step import Tensors
from tests.contract.cases import CASES
from tests.contract.lab import GENERAL_ROWS, Lab, configured

METHOD = CASES["a_gem"].settings


@pytest.fixture
def lab(tmp_path: Path, tiny_tokenizer: Any, tiny_llama: Any) -> Lab:
    return Lab(tmp_path, tiny_tokenizer, tiny_llama)


def test_by_hand() -> None:
    """g = (1, -2, 0 | 1), r = (2, 1, 0 | -1): g.r = -1, r.r = 6, g.g = 6; g + r / 6 is at a right angle to r."""
    g = [torch.tensor([1.0, -2.0, 0.0]), torch.tensor([1.0])]
    r = [torch.tensor([2.0, 1.0, 0.0]), torch.tensor([-1.0])]
    coefficient, cosine = against(zip(g, r, strict=True))
    assert float(coefficient) == pytest.approx(-1 / 6)
    assert float(cosine) == pytest.approx(-1 / 6)
    turned = [a - coefficient * b for a, b in zip(g, r, strict=True)]
    assert float(sum((a * b).sum() for a, b in zip(turned, r, strict=True))) == pytest.approx(0.0, abs=1e-6)


def test_what_agrees_or_is_nothing_is_left_alone() -> None:
    g = torch.tensor([1.0, 2.0])
    assert against([(g, torch.tensor([1.0, 0.0]))])[0] == 0
    assert [float(x) for x in against([(g, torch.zeros(2))])] == [0.0, 0.0]
    assert [float(x) for x in against([(torch.zeros(2), g)])] == [0.0, 0.0]


@pytest.mark.parametrize("packed", [False, True])
def test_the_gradient_is_that_of_the_mean_token_loss(lab: Lab, packed: bool) -> None:
    """Row by row through autograd, on a copy; gradients that are there already stay."""
    from cpt.data.spec import Source

    training = {"packing": True, "max_length": 24} if packed else {}
    rows = lab.data(configured([], "sft", {}), training).load([Source(rows=GENERAL_ROWS)], "rows", None).dataset
    model, slow = lab.model(), lab.model()
    numbers, loss, count = list(range(1, len(rows))), torch.zeros(()), 0
    for number in numbers:
        ids, labels = torch.tensor(rows[number]["input_ids"]), torch.tensor(rows[number]["labels"])
        lengths = rows[number].get("seq_lengths", [len(ids)])
        for part, wanted in zip(ids.split(lengths), labels.split(lengths), strict=True):
            learned = wanted[1:] != IGNORED
            log_probs = slow(part.unsqueeze(0)).logits[0, :-1].log_softmax(1)
            loss = loss - log_probs[learned].gather(1, wanted[1:][learned].long().unsqueeze(1)).sum()
            count += int(learned.sum())
    (loss / count).backward()
    own = dict(model.named_parameters())
    for p in own.values():
        p.grad = torch.ones_like(p)
    state = torch.random.get_rng_state()
    found = gradient(model, rows, numbers, own)
    assert torch.random.get_rng_state().equal(state)
    for name, p in slow.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-5)
        assert own[name].grad.equal(torch.ones_like(p))


class After(Method):
    """Looks at the gradient after A-GEM has had it."""

    type: Literal["after"] = "after"
    order: ClassVar[str] = "mask"

    _seen: list[float] = PrivateAttr(default_factory=list)
    _method: Any = PrivateAttr(None)

    def edit_gradients(self, gradients: Tensors, stage: StageInfo) -> None:
        """Its product with the gradient of all rows of the memory."""
        rows, model = self._method._rows.dataset, self._method._model
        found = gradient(model, rows, range(len(rows)), {name: gradients.parameter(name) for name, _ in gradients})
        self._seen.append(float(sum((tensor * found[name]).sum() for name, tensor in gradients)))


def test_after_it_no_step_works_against_the_memory(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from cpt import train_stage

    kept: list[Any] = []
    real = train_stage.fresh_methods

    def fresh(stage: Any) -> list[Any]:
        kept[:] = real(stage)
        after._method = kept[0] if kept else None
        return kept

    after = After()
    monkeypatch.setattr(train_stage, "fresh_methods", fresh)
    ten = METHOD | {"rows": 10}  # every row, in every step
    outcome = lab.stage([ten], extra=[after], max_grad_norm=0.0, max_steps=6)
    assert len(after._seen) == 6
    assert min(after._seen) >= -1e-6
    turned = outcome.facts["methods"]["a_gem"]["turned"]
    assert 0 < turned <= 1
    assert sum(line["a_gem/cosine"] < 0 for line in outcome.lines if "a_gem/cosine" in line) == round(6 * turned)


def test_it_keeps_more_of_the_memory_than_training_without(lab: Lab) -> None:
    from cpt.data.spec import Source

    rows = lab.data(configured([], "sft", {}), {}).load([Source(**METHOD["general"])], "rows", None).dataset

    def loss(weights: dict[str, torch.Tensor]) -> float:
        model = lab.model()
        model.load_state_dict(weights, strict=False)
        values = []
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]]).long()
            values.append(float(model(ids, labels=labels).loss))
        return sum(values) / len(values)

    plain, kept = lab.stage([], max_steps=12), lab.stage([METHOD | {"rows": 10}], max_steps=12)
    assert loss(kept.after) < loss(plain.after)


def test_refused_in_words(tmp_path: Path) -> None:
    def stream(*methods: Any) -> Stream:
        stages = [{"name": "one", "data": {"task": "tiny_world/reverse"}, "methods": list(methods)}]
        return Stream.parse({"name": "s", "model": "tiny-world", "output_dir": str(tmp_path), "stages": stages})

    with pytest.raises(ConfigError, match="nothing to remember: give `earlier: all`"):
        stream({"type": "a_gem"})
    with pytest.raises(ConfigError, match="'two' is no earlier stage"):
        stream({"type": "a_gem", "earlier": ["two"]})


@pytest.mark.e2e
def test_in_the_first_stage_there_is_nothing_to_remember(tmp_path: Path) -> None:
    training = {"per_device_train_batch_size": 4, "max_steps": 2}
    stages = [
        {
            "name": name,
            "data": {"task": f"tiny_world/{name}", "limit": 20},
            "methods": [{"type": "a_gem", "earlier": "all"}],
        }
        for name in ("reverse", "sums")
    ]
    about = {"name": "s", "model": "tiny-world", "output_dir": str(tmp_path), "training": training, "stages": stages}
    done = run(Stream.parse(about | {"evaluation": {"within": "off"}}), say=lambda line: None)
    first, second = (done.find(name).done()["facts"]["methods"]["a_gem"] for name in ("reverse", "sums"))  # type: ignore[index]
    assert first == {"note": "no earlier stage to remember"}
    assert second["rows"] == 20
