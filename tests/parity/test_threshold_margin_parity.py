"""GeRe's threshold margin on a pretrained model: states, thresholds, loss and gradient, each entry by the formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpt.data.activations import record_regions
from cpt.data.recording import Recorder
from cpt.losses.threshold_margin import margins

pytestmark = pytest.mark.parity

TEXTS = [
    "Once upon a time there was a little girl who loved to play outside.",
    "The dog ran to the big tree and sat down.",
    "Tim had a red ball. He lost it in the park.",
    "One day, a bird saw a shiny stone and took it home.",
]


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "models" / "stories260K"


@pytest.fixture(scope="module")
def rows(folder: Path) -> datasets.Dataset:
    """The texts, every token but the first learned, and two left out of the loss in the second."""
    ids = [AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for text in TEXTS]
    labels = [list(one) for one in ids]
    labels[1][3] = labels[1][4] = -100
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})


def states(model: Any, rows: datasets.Dataset) -> torch.Tensor:
    """(N, H) what the head reads where a learned token is predicted, row by row, alone and without padding."""
    found = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        found += [hidden[t] for t in range(ids.shape[1] - 1) if row["labels"][t + 1] != -100]
    return torch.stack(found)


def test_regions_and_the_margin_of_a_moved_model(folder: Path, rows: datasets.Dataset, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    recorded = record_regions(Recorder(base, rows, tmp_path / "kept"), {"rows": []})
    low, high, noise = recorded.thresholds("cpu")
    codes = recorded.regions(range(len(rows)), "cpu")
    with torch.no_grad():
        before = states(base, rows).double()
    count, dimensions = before.shape
    assert codes.shape == before.shape

    mean = [sum(before[:, d].tolist()) / count for d in range(dimensions)]
    spread = [
        (sum((value - mean[d]) ** 2 for value in before[:, d].tolist()) / count) ** 0.5 for d in range(dimensions)
    ]
    torch.testing.assert_close(
        low.double(), torch.tensor(mean).double() - torch.tensor(spread).double(), atol=1e-6, rtol=1e-6
    )
    torch.testing.assert_close(
        high.double(), torch.tensor(mean).double() + torch.tensor(spread).double(), atol=1e-6, rtol=1e-6
    )
    for n in range(count):
        for d in range(dimensions):
            value, where = float(before[n, d]), int(codes[n, d])
            at = min(abs(value - float(low[d])), abs(value - float(high[d])))
            if at > 1e-5:  # nearer than rounding it may lie on either side
                assert where == (0 if value <= float(low[d]) else 2 if value >= float(high[d]) else 1)

    moved = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        for p in moved.parameters():
            p.add_(0.05 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))))
    hidden = states(moved, rows).detach().requires_grad_()
    loss = margins(hidden, codes, low, high).mean()
    loss.backward()
    total, slope = 0.0, torch.zeros(count, dimensions)
    for n in range(count):
        for d in range(dimensions):
            p, a, b = float(hidden[n, d]), float(low[d]), float(high[d])
            over, under = {0: (p - a, 0.0), 1: (p - b, a - p), 2: (0.0, b - p)}[int(codes[n, d])]
            total += max(over, 0.0) + max(under, 0.0)
            slope[n, d] = (over > 0) * 1.0 - (under > 0) * 1.0
    assert total > 0
    assert float(loss) == pytest.approx(total / (count * dimensions), rel=1e-6)
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, slope / (count * dimensions), atol=1e-9, rtol=1e-6)
    quiet = margins(states(base, rows).detach(), codes, low, high, noise)
    assert float(quiet.sum()) == 0.0
