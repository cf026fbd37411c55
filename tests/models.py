"""Random models small enough for every test."""

from __future__ import annotations

from typing import Any


def llama(tokenizer: Any, seed: int = 0, vocab_size: int | None = None, **config: object) -> Any:
    """A new random Llama: 2 layers, hidden 16, 4 heads, 2 key-value heads, float32, no dropout by default.

    Without `vocab_size` it fits the tokenizer. The global random state stays as it was.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if vocab_size is None:
        vocab_size = len(tokenizer)
        config = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id} | config
    shape: dict[str, object] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **(shape | config)))


def logits(model: Any) -> Any:
    """Logits (1, 8, vocabulary) of eight fixed tokens, without dropout, gradients or a cache."""
    import torch

    with torch.no_grad():
        return model.eval()(torch.arange(5, 13)[None], use_cache=False).logits
