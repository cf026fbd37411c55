"""Drift against a loop over tokens: whole logits and hidden states of one sequence at a time, in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eval_harness.drift import _forward_kl, drift, token_drift
from eval_harness.prompts import encode
from eval_harness.rows import canonical
from eval_harness.weights import weight_distance

pytestmark = pytest.mark.parity

ANSWERS = ["dcba", "a", "the end of it"]
ROWS = [canonical({"prompt": f"say {i * 37} backwards", "completion": ANSWERS[i % 3]}) for i in range(9)]
ROWS += [canonical({"text": "nothing but a text, every token of which is read"})]


def whole(model: Any, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Logits (L, V) and last hidden states (L, H) of one sequence, unpadded."""
    with torch.no_grad():
        out = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    return out.logits[0].double().numpy(), out.hidden_states[-1][0].double().numpy()


def slow_kl(base: np.ndarray, model: np.ndarray) -> float:
    """Sum over the vocabulary of p (log p - log q), one word at a time."""
    log_p = base - base.max() - np.log(np.exp(base - base.max()).sum())
    log_q = model - model.max() - np.log(np.exp(model - model.max()).sum())
    total = 0.0
    for word in range(len(base)):
        total += np.exp(log_p[word]) * (log_p[word] - log_q[word])
    return total


def slow(model: Any, base: Any, ids: list[int], is_target: list[bool]) -> dict[str, list[float]]:
    (q, h), (p, h0) = whole(model, ids), whole(base, ids)
    found: dict[str, list[float]] = {"kl": [], "shift": [], "cosine_distance": []}
    for token in range(1, len(ids)):
        if is_target[token]:
            a, b = h[token - 1], h0[token - 1]
            found["kl"].append(slow_kl(p[token - 1], q[token - 1]))
            found["shift"].append(np.sqrt(((a - b) ** 2).sum()) / np.sqrt((b**2).sum()))
            found["cosine_distance"].append(1 - (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))
    return found


@pytest.mark.parametrize("adapted", [False, True])
def test_per_token_and_per_row(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, adapted: bool) -> None:
    from peft import LoraConfig, get_peft_model

    base, model = (tiny_llama(seed=seed, initializer_range=0.4).eval() for seed in (0, 1))
    given_base: Any = base
    if adapted:
        torch.manual_seed(2)
        lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model, given_base = get_peft_model(tiny_llama(seed=0, initializer_range=0.4), lora).eval(), None
    sequences = [encode(tiny_tokenizer, row) for row in ROWS]
    expected = [slow(model, base, one.input_ids, one.is_target) for one in sequences]
    for found, wanted in zip(token_drift(model, given_base, sequences, batch_tokens=50), expected, strict=True):
        assert found is not None
        for name, values in wanted.items():
            assert getattr(found, name) == pytest.approx(values, rel=1e-5)
            assert min(values) > 1e-4
    results = drift(model, given_base, tiny_tokenizer, ROWS)
    for result, name in zip(results.values(), ("kl", "shift", "cosine_distance"), strict=True):
        tokens = [value for one in expected for value in one[name]]
        assert result.value == pytest.approx(np.mean(tokens), rel=1e-5)
        assert list(result.per_item.values()) == pytest.approx([np.mean(one[name]) for one in expected], rel=1e-5)


@given(
    pair=st.integers(2, 6).flatmap(
        lambda n: st.tuples(*[st.lists(st.floats(-80, 80, allow_nan=False), min_size=n, max_size=n)] * 2)
    )
)
def test_kl_of_any_logits(pair: tuple[list[float], list[float]]) -> None:
    model, base = (torch.tensor([one], dtype=torch.float64) for one in pair)
    found = _forward_kl(model, base).item()
    assert found == pytest.approx(max(0.0, slow_kl(base[0].numpy(), model[0].numpy())), rel=1e-9, abs=1e-12)
    assert _forward_kl(base, base).item() == 0.0
    assert _forward_kl(model + 5.0, base).item() == pytest.approx(found, rel=1e-9, abs=1e-12)


def test_distances_of_weights(tiny_llama: Callable[..., Any]) -> None:
    base, model = tiny_llama(seed=0), tiny_llama(seed=1)
    found = weight_distance(model, base)
    before = {name: tensor.detach().double().numpy() for name, tensor in base.named_parameters()}
    assert set(found) == {name.removesuffix(".weight") for name in before}
    for name, tensor in model.named_parameters():
        moved = tensor.detach().double().numpy() - before[name]
        one = found[name.removesuffix(".weight")]
        assert one.l2 == pytest.approx(np.sqrt((moved**2).sum()), rel=1e-12)
        assert one.relative == pytest.approx(np.sqrt((moved**2).sum() / (before[name] ** 2).sum()), rel=1e-12)
