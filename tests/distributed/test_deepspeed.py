"""DeepSpeed's engine under the seam, on two ranks: what an edit sees and reaches is what it is under DDP.

The first run builds DeepSpeed's shared-memory collective, which takes minutes; it is kept in
~/.cache/torch_extensions, or where TORCH_EXTENSIONS_DIR points.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.deepspeed_worker import EDITED, ODD, STEPS
from tests.distributed.launcher import require_deepspeed, two_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SHARDED = ("zero1", "zero2", "zero3")
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks have left gradients and weights of every run."""
    require_deepspeed()
    folder = tmp_path_factory.mktemp("deepspeed")
    code, printed = two_ranks("deepspeed_worker", folder=folder, timeout=570, DS_ACCELERATOR="cpu")
    assert code == 0, printed[-4000:]
    return folder


def farthest(one: Weights, two: Weights) -> float:
    """Largest difference of any entry of two dicts of the same tensors."""
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


@pytest.mark.parametrize("launcher", [*SHARDED, "zero3_offload"])
def test_training_is_ddps(ranks: Path, launcher: str) -> None:
    weights = load_file(ranks / f"{launcher}_plain.weights")
    assert farthest(weights, load_file(ranks / "ddp_plain.weights")) < 2e-6
    assert farthest(weights, load_file(ranks / "start.weights")) > 1e-2


@pytest.mark.parametrize("launcher", SHARDED)
def test_the_hook_sees_ddps_gradients(ranks: Path, launcher: str) -> None:
    for step in range(STEPS):
        seen = load_file(ranks / f"{launcher}_plain.gradients{step}")
        assert farthest(seen, load_file(ranks / f"ddp_plain.gradients{step}")) < 1e-6
        assert max(float(gradient.abs().max()) for gradient in seen.values()) > 0.05


@pytest.mark.parametrize("launcher", ["ddp", *SHARDED, "loaded"])
def test_a_gradient_mask_leaves_exactly_its_entries_untouched(ranks: Path, launcher: str) -> None:
    before, after = load_file(ranks / "start.weights"), load_file(ranks / f"{launcher}_mask.weights")
    for name in (EDITED, ODD):
        assert torch.equal(after[name][:5], before[name][:5])
        assert bool((after[name][5:] != before[name][5:]).all())
    assert farthest(after, load_file(ranks / "ddp_mask.weights")) < 2e-6
    # Clipping comes after the mask: the other entries are not those of the run without it.
    assert farthest(after, load_file(ranks / "ddp_plain.weights")) > 1e-5


@pytest.mark.parametrize("launcher", ["zero1", "zero2"])
def test_a_weight_edit_reaches_the_master_and_the_model(ranks: Path, launcher: str) -> None:
    held = load_file(ranks / f"{launcher}_weights.held")
    saved = load_file(ranks / f"{launcher}_weights.weights")
    assert torch.equal(held["master"], held["model"])  # after the last step, which no later one repairs
    assert torch.equal(held["model"], saved[EDITED])
    assert not saved[EDITED][:, 3].any()
    # An average of averages: wrong in every later step if one of the two had not been written.
    assert farthest(saved, load_file(ranks / "ddp_weights.weights")) < 2e-6
    assert farthest(saved, load_file(ranks / f"{launcher}_plain.weights")) > 1e-2
