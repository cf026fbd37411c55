"""Train the tiny world's base model from nothing: tokenizer, half a million parameters, about two minutes.

    python -m recipes.tiny_base --out cpt/assets/tiny_world

One thread and one seed, so that the same machine writes the same bytes again.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eval_harness.tasks.tiny_world import SHARES, TASKS, Row, rows

PAD, END, SYSTEM, USER, ASSISTANT = SPECIAL = [
    "<|pad|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
]
VOCABULARY, CONTEXT, IGNORED = 1024, 256, -100
LEARNING_RATE, WARMUP, FLOOR = 4e-3, 0.05, 0.1
TEXT_WEIGHT = SHARES["text"] / sum(SHARES.values())
QUESTIONS = [name for name in SHARES if name != "text"]
HELD_OUT = ["facts_heldout", "sums_heldout", "copy", "sort"]

# `generation` marks what assistant-only losses train on: the answer and the end token.
# The text before it is what add_generation_prompt gives, so a prompt is an exact prefix of its conversation.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|assistant|>' -}}
{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}
{%- elif message['role'] in ['system', 'user'] -%}
{{- '<|' + message['role'] + '|>' + message['content'] -}}
{%- else -%}
{{- raise_exception("role '" + message['role'] + "': must be system, user or assistant") -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""

Encoded = tuple[list[int], list[int]]
"""Token ids, and labels of the same length (IGNORED where nothing is asked of the model)."""


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(arguments.seed)

    tokenizer = train_tokenizer()
    model = LlamaForCausalLM(model_config(tokenizer))
    train(model, tokenizer, arguments.steps, Random(arguments.seed))
    scores = evaluate(model, tokenizer)

    arguments.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    card = model_card(scores, model.num_parameters(), arguments.seed, arguments.steps)
    (arguments.out / "README.md").write_text(card, encoding="utf-8")
    print(json.dumps(scores, indent=1))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/tiny_base"), help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=0, help="initial weights and order of the rows")
    parser.add_argument("--steps", type=int, default=1400, help="optimizer steps of 64 rows")
    return parser.parse_args()


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: no text is unknown to it; a digit is always a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    taught = [name for name in TASKS if name not in ("facts_heldout", "sums_heldout", "general")]
    corpus = [text for name in taught for row in rows(name, "train") for text in row.values()]
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        initializer_range=0.06,  # at the usual 0.02 a model this narrow is slow to learn to copy
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def encode(tokenizer: PreTrainedTokenizerFast, row: Row) -> Encoded:
    """Label the answer and its end token of a question; of a text everything."""
    if "text" in row:
        text: Any = tokenizer(END + row["text"] + END)["input_ids"]
        return text, text
    question = [{"role": "user", "content": row["prompt"]}]
    prompt: Any = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    answered = [*question, {"role": "assistant", "content": row["completion"]}]
    ids: Any = tokenizer.apply_chat_template(answered, return_dict=False)
    assert ids[: len(prompt)] == prompt, f"the chat template breaks the prefix of {row}"
    return ids, [IGNORED] * len(prompt) + ids[len(prompt) :]


def collate(batch: list[Encoded], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the right to the longest row: ids and labels, both (B, T)."""
    length = max(len(ids) for ids, _ in batch)
    ids = [ids + [pad] * (length - len(ids)) for ids, _ in batch]
    labels = [labels + [IGNORED] * (length - len(labels)) for _, labels in batch]
    return torch.tensor(ids), torch.tensor(labels)


def endless(items: list[Encoded], rng: Random) -> Iterator[Encoded]:
    """Yield every item once per pass, in a new order each pass."""
    while True:
        yield from rng.sample(items, len(items))


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, rng: Random) -> None:
    """Every batch holds SHARES rows of each task; texts, which are longer, are a micro-batch of their own."""
    streams = {
        name: endless([encode(tokenizer, row) for row in rows(name, "train")], Random(rng.random())) for name in SHARES
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step / steps))
    model.train()
    for step in range(1, steps + 1):
        questions = [next(streams[name]) for name in QUESTIONS for _ in range(SHARES[name])]
        texts = [next(streams["text"]) for _ in range(SHARES["text"])]
        for batch, weight in ((questions, 1 - TEXT_WEIGHT), (texts, TEXT_WEIGHT)):
            loss = answer_loss(model, *collate(batch, tokenizer.pad_token_id))
            (weight * loss).backward()
            if batch is questions and step % 100 == 0:
                print(f"step {step:5d}  answer loss {loss.item():.4f} nats per token", flush=True)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def warm_cosine(progress: float) -> float:
    """Learning-rate factor: linear warm-up over the first 5 %, then a cosine down to 10 %."""
    if progress < WARMUP:
        return progress / WARMUP
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP))) / 2


def answer_loss(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    # Right padding needs no mask under causal attention: no labelled token looks at a pad.
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # (B, T-1, V)
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


@torch.no_grad()
def exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: list[Row]) -> float:
    """Per cent of items whose every answer token and end token is the arg max.

    One teacher-forced pass; equal to greedy decoding, since a first wrong token ends both.
    """
    ids, labels = collate([encode(tokenizer, row) for row in items], tokenizer.pad_token_id)
    best = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
    right = (best == labels[:, 1:]) | (labels[:, 1:] == IGNORED)
    return 100 * right.all(dim=1).double().mean().item()


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: list[Row]) -> float:
    """Code length of the texts, end tokens included, over their UTF-8 bytes."""
    ids, labels = collate([encode(tokenizer, row) for row in items], tokenizer.pad_token_id)
    tokens = (labels[:, 1:] != IGNORED).sum().item()
    n_bytes = sum(len(row["text"].encode()) for row in items)
    return answer_loss(model, ids, labels).item() * tokens / math.log(2) / n_bytes


def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, dict[str, float]]:
    """Score every general test set: `{task: {value, n}}`, per cent exact match, bits per byte for text."""
    model.eval()
    scores = {}
    for name in ["facts", "facts_heldout", "sums", "sums_heldout", "copy", "sort", "text"]:
        items = rows(name, "test")
        measure = bits_per_byte if name == "text" else exact_match
        scores[name] = {"value": round(measure(model, tokenizer, items), 2), "n": len(items)}
    return scores


def model_card(scores: dict[str, dict[str, float]], parameters: int, seed: int, steps: int) -> str:
    table = "\n".join(
        f"| {name} | {TASKS[name]} | {'yes' if name in [*HELD_OUT, 'text'] else 'no'} "
        f"| {score['value']} {'bits per byte' if name == 'text' else '%'} | {score['n']} |"
        for name, score in scores.items()
    )
    shares = ", ".join(f"{name} {count}" for name, count in SHARES.items())
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# Tiny world base

A Llama of {parameters:,} parameters (hidden 96, 4 layers, 4 heads, tied embeddings, context {CONTEXT}) that
knows a hundred fictitious people, small sums, two things to do with letters, and a kind of very plain story.
It exists to be taught more and to forget: continual post-training and unlearning run on it in seconds.

## How it was made

    python -m recipes.tiny_base --out DIR --seed {seed} --steps {steps}

- Data: generated by `eval_harness/tasks/tiny_world.py` from its own word lists with fixed seeds; no person is
  real, no text is copied. Rows in every batch of 64: {shares}.
- Tokenizer: byte-level BPE of {VOCABULARY} trained on these rows and those of the stream tasks; each digit
  is a token, `{PAD}` is apart from `{END}`.
- Training: loss on answers (texts: every token), AdamW at {LEARNING_RATE}, betas 0.9 and 0.98, weight
  decay 0.01, {WARMUP:.0%} warm-up, cosine to {FLOOR:.0%}, clipping at 1, float32, one thread, seed {seed}.

## What it scores

Exact match: the share of items whose every answer token and end token is the arg max.

| task | what is asked | held out | score | n |
|---|---|---|---|---|
{table}

Held out means that no test item occurs in training: withheld phrasings, withheld pairs of numbers in
both orders, letter sets unseen in any order, unseen stories. The others ask what training asked.
The items of sums_heldout are three phrasings of each pair, so they are not independent.

## Use

Tests, examples and method development. It answers nothing outside its world. Text starts after `{END}`.
"""


if __name__ == "__main__":
    main()
