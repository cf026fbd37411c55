"""The memory plan against tensors: what a model, its gradients, its optimizer and autograd really hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cpt.errors import ConfigError
from cpt.memory_plan import activation_bytes, training_bytes
from tests.models import llama


def held(tensors: Any) -> int:
    """Bytes of tensors, each memory counted once, single numbers such as step counts left out."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors if t.numel() > 1}.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("half", [False, True], ids=["whole", "half_frozen"])
def test_a_step_holds_what_is_planned(tiny_tokenizer: Any, precision: str, half: bool) -> None:
    model = llama(tiny_tokenizer, vocab_size=64).to(getattr(torch, precision))
    for parameter in list(model.parameters())[::2] if half else []:
        parameter.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    ids = torch.arange(16)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    whole = sum(p.numel() for p in model.parameters())
    share = sum(p.numel() for p in trained) / whole
    assert training_bytes(whole, share, precision) == pytest.approx(
        {
            "weights": held(model.parameters()),
            "gradients": held(p.grad for p in trained),
            "optimizer": held(t for state in optimizer.state.values() for t in state.values()),
        }
    )


def test_autocast_holds_a_16_bit_copy_of_each_weight() -> None:
    """Four layers: their 16-bit copies are kept for the backward pass beside the float32 weights."""
    model = torch.nn.Sequential(*[torch.nn.Linear(32, 32, bias=False) for _ in range(4)])
    copies: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.bfloat16 and tensor.shape == (32, 32):
            copies[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model(torch.ones(2, 32))
    weights = sum(p.numel() for p in model.parameters())
    planned = training_bytes(weights, precision="mixed")
    assert planned["gradients"] == 4 * weights
    # The first layer's input needs no gradient, so its weight is not read again.
    assert held(copies.values()) == pytest.approx((planned["weights"] - 4 * weights) * 3 / 4)


SHAPES = [(64, 176, 4, 1), (64, 160, 4, 2), (64, 256, 4, 4)]  # hidden, intermediate, heads, key heads


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("hidden", "intermediate", "heads", "key_heads"), SHAPES)
def test_autograd_saves_what_is_planned(
    tiny_tokenizer: Any, hidden: int, intermediate: int, heads: int, key_heads: int, checkpointing: bool
) -> None:
    """Per layer, as the difference of four layers to two: what a forward pass leaves for the backward pass."""
    tokens = 32

    def saved(layers: int) -> int:
        model = llama(
            tiny_tokenizer,
            vocab_size=64,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            num_hidden_layers=layers,
        ).to(torch.bfloat16)
        if checkpointing:
            model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found: dict[int, torch.Tensor] = {}  # alive, so that no memory is used twice

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                found[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hold = model.model(input_ids=torch.arange(tokens)[None], use_cache=False)
        assert hold is not None
        return sum(t.untyped_storage().nbytes() for t in found.values())

    def planned(layers: int) -> float:
        width = hidden // heads * key_heads
        return activation_bytes(tokens, hidden, intermediate, width, layers, checkpointing)

    assert saved(4) - saved(2) == pytest.approx(planned(4) - planned(2), rel=0.03)


def test_zero_spreads_one_part_per_stage() -> None:
    """ZeRO, arXiv 1910.02054, figure 1: 7.5 billion parameters on 64 devices, in units of 10^9 bytes."""
    found = [sum(training_bytes(7.5e9, zero_stage=stage, world=64).values()) / 1e9 for stage in (1, 2, 3)]
    assert found == pytest.approx([31.4, 16.6, 1.9], abs=0.05)
    assert sum(training_bytes(7.5e9, zero_stage=1).values()) == 120e9


@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_moved_is_counted_on_the_host(stage: int) -> None:
    about = {"zero_stage": stage, "offload": ["optimizer"], "world": 8}
    device, host = (training_bytes(8e9, on=on, **about) for on in ("device", "host"))
    assert device == {"weights": 2 * 8e9 / (8 if stage == 3 else 1), "gradients": 0.0, "optimizer": 0.0}
    assert host == {"weights": 0.0, "gradients": 4 * 1e9, "optimizer": 12 * 1e9}


@pytest.mark.parametrize(
    ("optimizer", "bytes_each"),
    [
        ("adamw_torch", 4),
        ("paged_adamw_32bit", 8),
        ("adamw_8bit", 2 * (1 + 4 / 256)),
        ("adamw_torch_4bit", 2 * (0.5 + 4 / 256)),
        ("lion_8bit", 1 + 4 / 256),
        ("adagrad", 2),
        ("sgd", 0),
        ("adafactor", 0),
    ],
)
def test_an_optimizer_keeps_its_moments(optimizer: str, bytes_each: float) -> None:
    assert training_bytes(100, optimizer=optimizer)["optimizer"] == pytest.approx(100 * bytes_each)


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"precision": "int8"}, "precision = 'int8': must be one of float32, mixed, bfloat16, float16"),
        ({"zero_stage": 4}, "zero_stage = 4: must be one of 0, 1, 2, 3"),
        ({"offload": ["model"]}, "offload = 'model': must be one of optimizer, weights"),
        ({"offload": ["weights"], "zero_stage": 2}, "needs zero_stage 3, not 2"),
        ({"offload": ["optimizer"]}, "needs zero_stage 1, 2 or 3"),
        ({"optimizer": "galore_adamw"}, "galore_adamw.*not known here"),
        ({"on": "disk"}, "on = 'disk'"),
    ],
)
def test_what_is_not_known_is_refused(about: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        training_bytes(1e9, **about)
