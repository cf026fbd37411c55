"""The plugged trainer against a loop written from the formula.

loss of a step = sum over learned tokens of w(token) x -log p(token) / number of learned tokens,

over the whole effective batch, w = the replay's weight on replayed rows and 1 elsewhere; AdamW after it. The loop
knows nothing of TRL, of accumulation or of the fused head: full logits, one row at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cpt.data.sampler import MixedSampler
from cpt.data.sources import load_all
from cpt.data.spec import Source
from cpt.data.tokens import TokenSettings, tokenise
from tests.contract.lab import GENERAL_ROWS, TASK_ROWS, TRAINING, Lab, distance

pytestmark = pytest.mark.parity


def by_hand(model: Any, tokenizer: Any, weight: float, quota: int, batch: int, steps: int, decay: float) -> Any:
    """Train row by row; returns the weights."""
    task, general = (
        [
            dict(row)
            for row in tokenise(load_all([Source(rows=rows)], None, "x").rows, tokenizer, TokenSettings(), "x").dataset
        ]
        for rows in (TASK_ROWS, GENERAL_ROWS)
    )
    sizes = {"task": len(task), "replay": len(general)} if quota else {"task": len(task)}
    order = list(MixedSampler(sizes, {"replay": quota} if quota else {}, batch, steps, seed=11))
    optimizer = torch.optim.AdamW(groups(model, decay), lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    model.train()
    for step in range(steps):
        numbers = order[step * batch : (step + 1) * batch]
        picked = [(task[n], 1.0) if n < len(task) else (general[n - len(task)], weight) for n in numbers]
        learned = sum(label != -100 for row, _ in picked for label in row["labels"][1:])
        optimizer.zero_grad()
        for row, factor in picked:
            log_p = model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0].log_softmax(-1)
            for position, label in enumerate(row["labels"][1:]):
                if label != -100:
                    (-factor * log_p[position, label] / learned).backward(retain_graph=True)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def groups(model: Any, decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices, none on norms, as the trainer does."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": matrices, "weight_decay": decay}, {"params": norms, "weight_decay": 0.0}]


@pytest.mark.parametrize(
    ("weight", "quota", "accumulation"), [(1.0, 0, 1), (1.0, 2, 1), (0.3, 2, 1), (0.3, 1, 4)], ids=str
)
def test_the_trainer_computes_the_formula(
    tmp_path: Path, tiny_tokenizer: Any, tiny_llama: Any, weight: float, quota: int, accumulation: int
) -> None:
    lab = Lab(tmp_path, tiny_tokenizer, tiny_llama)
    replay = {"type": "replay", "ratio": quota / 4, "general": {"rows": GENERAL_ROWS}, "weight": weight}
    outcome = lab.stage(
        [replay] if quota else [],
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=3,
    )
    expected = by_hand(lab.model(), tiny_tokenizer, weight, quota, 4, 3, TRAINING["weight_decay"])
    assert distance(outcome.before, outcome.after) > 1e-2
    assert distance(outcome.after, expected) < 3e-5
