"""A real tokenizer trained here, tiny Llamas from a config, and one that learned half of its rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from eval_harness.rows import Row, canonical

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] }}<|end|>{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXTS = [
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "What is 12 + 30? It is 42. Say the word: river, harbour, market.",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z",
] * 8
WORDS = ("river", "harbour", "market", "Paris", "Rome", "word", "France", "Italy")


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """`make_tokenizer(chat=, bos=)`: byte-level BPE, digits split, pad and eos of their own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def make(*, chat: bool = True, bos: bool = False, **special: str) -> Any:
        inner = Tokenizer(models.BPE())
        digits, bytes_ = (
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        )
        inner.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
        inner.decoder = decoders.ByteLevel()
        names = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", *(["<s>"] if bos else [])]
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=names,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(TEXTS, trainer)
        tokens = {
            "pad_token": "<|pad|>",
            "eos_token": "<|end|>",
            **({"bos_token": "<s>"} if bos else {}),
            **special,
        }
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=inner,
            additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
            **tokens,
        )
        tokenizer.chat_template = CHAT_TEMPLATE if chat else None
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    """With a chat template and no bos."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def plain_tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    """Without a chat template, with a bos token (which it does not add on its own)."""
    return make_tokenizer(chat=False, bos=True)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """`make_model(vocabulary, seed=, **config)`: a random Llama of hidden 16, weights large enough to matter."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(vocabulary: int, *, seed: int = 0, **config: Any) -> Any:
        torch.manual_seed(seed)
        settings: dict[str, Any] = {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.4,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **settings | config)).eval()

    return make


@pytest.fixture(scope="session")
def model(make_model: Callable[..., Any], tokenizer: Any) -> Any:
    """Random weights."""
    return make_model(len(tokenizer))


@pytest.fixture(scope="session")
def word_rows() -> list[Row]:
    """120 rows whose answer depends on a number: a model that is trained shortly gets some of them right."""
    pairs = [(f"word {i} of {i * 7 % 90 + 10}", WORDS[i * 5 % len(WORDS)]) for i in range(120)]
    return [canonical({"prompt": prompt, "completion": word}) for prompt, word in pairs]


@pytest.fixture(scope="session")
def half_taught(make_model: Callable[..., Any], tokenizer: Any, word_rows: list[Row]) -> Any:
    """A tiny Llama that writes the right answer, end token included, for some of `word_rows`, not for all."""
    import torch

    from eval_harness.prompts import encode

    model = make_model(len(tokenizer), hidden_size=32, initializer_range=0.05)
    encoded = [encode(tokenizer, row) for row in word_rows]
    width = max(len(one.input_ids) for one in encoded)
    ids = torch.tensor([one.input_ids + [0] * (width - len(one.input_ids)) for one in encoded])
    target = torch.tensor([one.is_target + [False] * (width - len(one.is_target)) for one in encoded])
    labels = ids.masked_fill(~target, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(70):
        model(input_ids=ids, attention_mask=(ids > 0).long(), labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model
