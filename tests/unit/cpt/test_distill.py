"""Distillation: nothing at the start, the formula afterwards, and the same wherever the reference comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cpt import ConfigError, Stream
from cpt.methods.base import StageInfo
from cpt.methods.distill import Distill
from cpt.methods.step import Tensors
from tests.contract.lab import TASK_ROWS, Lab, distance

KL = {"type": "distill", "weight": 1.0, "top_k": 4096}  # all tokens: nothing is cut off


@pytest.fixture
def lab(tmp_path: Path, tiny_tokenizer: Any, tiny_llama: Any) -> Lab:
    return Lab(tmp_path, tiny_tokenizer, tiny_llama)


def logged(outcome: Any, name: str = "distill") -> list[float]:
    return [line[f"{name}/kl"] for line in outcome.lines if f"{name}/kl" in line]


@pytest.mark.parametrize("how", [{}, {"reference": "weights"}, {"to": "average"}, {"direction": "reverse"}], ids=str)
def test_at_the_start_nothing_is_lost(lab: Lab, how: dict[str, Any]) -> None:
    found = logged(lab.stage([KL | how]))
    assert abs(found[0]) < 1e-6
    assert found[-1] > 1e-4


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_likely_tokens_do_what_the_weights_do(lab: Lab, direction: str, temperature: float) -> None:
    about = KL | {"direction": direction, "temperature": temperature}
    cached, whole = lab.stage([about]), lab.stage([about | {"reference": "weights"}])
    assert (cached.facts["methods"]["distill"]["reference"], whole.facts["methods"]["distill"]["reference"]) == (
        "cached",
        "weights",
    )
    assert distance(cached.after, whole.after) < 5e-4
    assert logged(cached) == pytest.approx(logged(whole), rel=2e-2, abs=2e-5)


def test_under_lora_the_base_is_the_model_without_its_adapter(lab: Lab) -> None:
    switched, cached = lab.stage([KL], lora=True), lab.stage([KL | {"reference": "cached"}], lora=True)
    assert switched.facts["methods"]["distill"]["reference"] == "adapter"
    assert distance(switched.after, cached.after) < 5e-4
    assert all("lora_" in name for name in switched.moved())


def test_the_logged_divergence_is_the_formula(lab: Lab) -> None:
    """After one step of plain SGD without the term's own weight: KL between the two models, on the rows of step two."""
    sgd = {"optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0, "max_steps": 2, "learning_rate": 0.5}
    faint = lab.stage([KL | {"weight": 1e-30}], **sgd)
    first = lab.stage(**(sgd | {"max_steps": 1}))
    start, moved = lab.model(), lab.model()
    moved.load_state_dict(first.after, strict=False)
    rows = lab.batch(1)
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            p, q = (model(input_ids=ids).logits[0, :-1].log_softmax(1) for model in (start, moved))
        learned = labels[1:] != -100
        total += float((p.exp() * (p - q)).sum(1)[learned].sum())
        count += int(learned.sum())
    assert logged(faint)[1] == pytest.approx(total / count, rel=1e-3)


def test_a_stronger_weight_keeps_the_model_nearer(lab: Lab) -> None:
    ends = [logged(lab.stage([KL | {"weight": weight}], max_steps=12))[-1] for weight in (1e-6, 1.0, 10.0)]
    assert ends[0] > ends[1] > ends[2]


def test_an_average_follows(lab: Lab) -> None:
    """With a quick average the reference is the model of a step ago, and the divergence stays small."""
    start, quick = (
        logged(lab.stage([KL | {"weight": 1e-6, **how}], max_steps=12))[-1]
        for how in ({"to": "start", "reference": "weights"}, {"to": "average", "decay": 0.01})
    )
    assert quick < start / 4


def test_two_averages_are_two(lab: Lab) -> None:
    """Each is held against its own: what one logs beside the other is what it logs alone."""
    faint = KL | {"weight": 1e-30, "to": "average"}
    slow, quick = (faint | {"decay": decay, "name": name} for decay, name in ((0.9999, "slow"), (0.01, "quick")))
    both = lab.stage([quick, slow])
    for one in (slow, quick):
        alone = logged(lab.stage([one]), one["name"])
        assert logged(both, one["name"]) == pytest.approx(alone, rel=1e-3, abs=1e-6)
    assert logged(both, "slow")[-1] > 2 * logged(both, "quick")[-1] > 0


class Bfloat16(Lab):
    """Its weights are bfloat16."""

    def model(self, lora: bool = False, **config: Any) -> Any:
        return super().model(lora, **config).to(torch.bfloat16)


def test_an_average_of_bfloat16_weights_moves(lab: Lab) -> None:
    """A step of 1 - decay is below what bfloat16 tells apart; the passes are of its values in the model's own type."""
    stage = StageInfo(index=1, name="lab", kind="sft", seed=1, batch_rows=4)
    model = torch.nn.Linear(2, 2, bias=False).bfloat16()
    torch.nn.init.constant_(model.weight, 1.0)
    method = Distill(type="distill", to="average", decay=0.999)
    method.prepare_model(model, stage)
    torch.nn.init.constant_(model.weight, 1.0625)
    weights = Tensors(dict(model.named_parameters()), gradients=False)
    for _ in range(100):
        method.edit_weights(weights, stage)
    expected = 1.0625 - 0.0625 * 0.999**100
    assert method.state_dict()["weight"].flatten().tolist() == pytest.approx([expected] * 4, rel=1e-5)
    outcome = Bfloat16(lab.folder, lab.tokenizer, lab.llama).stage([KL | {"to": "average"}])
    assert all(tensor.dtype == torch.bfloat16 for tensor in outcome.after.values())


def test_what_cannot_be_recorded_is_refused() -> None:
    raw = {"name": "s", "model": "tiny-world", "stages": [{"name": "a", "data": {"rows": TASK_ROWS}}]}
    raw["stages"][0]["methods"] = [{"type": "distill", "to": "average", "reference": "cached"}]  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"methods\.0\.reference = 'cached': a moving average moves"):
        Stream.parse(raw)
