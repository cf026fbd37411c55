"""Log-probabilities and greedy generation, in batches sorted by length.

`score` runs the backbone once per batch and the LM head only where a target stands: with a vocabulary
of 150,000 and short answers that is most of the memory. Never `use_cache=True` in a scoring pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from eval_harness.errors import Interrupted, ScoringError
from eval_harness.sharding import Shard, spread

CHUNK_ELEMENTS = 2**25  # float32 logits alive at once: 128 MiB
SHARES = 4  # batches that each rank gets at least, where there are as many sequences

ShouldStop = Callable[[], bool]
Progress = Callable[[int, int], None]


class Scorable(Protocol):
    """What is scored: ids, and which of them are targets (eval_harness.prompts.Encoded is one)."""

    input_ids: list[int]
    is_target: list[bool]


@dataclass(slots=True)
class Score:
    """Scores of one sequence's target tokens. A target at position 0 has no prediction and is not scored.

    log_probs       nats, one per target token, in order
    greedy_tokens   how many of the first target tokens are the arg max, counted up to the first miss
    """

    log_probs: list[float]
    greedy_tokens: int

    @property
    def log_prob(self) -> float:
        """Sum over the target tokens, in nats."""
        return math.fsum(self.log_probs)

    @property
    def tokens(self) -> int:
        return len(self.log_probs)

    @property
    def is_greedy(self) -> bool:
        """Every target token is the arg max: greedy generation would write exactly this."""
        return self.greedy_tokens == self.tokens


def score(
    model: Any,
    sequences: Sequence[Scorable],
    *,
    batch_tokens: int = 8192,
    should_stop: ShouldStop | None = None,
    progress: Progress | None = None,
    shard: Shard | None = None,
) -> list[Score | None]:
    """Score the target tokens of every sequence; results in the order given.

    Args:
        model: a causal language model; scored in eval mode, its own flags are restored.
        sequences: token ids with their targets.
        batch_tokens: tokens of a batch, padding counted; a longer sequence is a batch of its own.
        should_stop: asked before every batch.
        progress: called with (sequences done, sequences in all) after every batch.
        shard: this process among several that pass the same sequences: each scores its part of the batches, and
            all get all scores. Ranks are asked to stop each for itself: one that says so stops all in a few batches.

    Returns:
        One Score per sequence; None where the sequence is longer than the model's context: count it.

    Raises:
        ScoringError: the logits are NaN.
        Interrupted: should_stop said so.
    """
    out: list[Score | None] = [None] * len(sequences)
    limit = context_length(model)
    fitting = [i for i, s in enumerate(sequences) if limit is None or len(s.input_ids) <= limit]
    if not fitting:
        return out
    done = len(sequences) - len(fitting)
    with torch.inference_mode(), eval_mode(model):
        logits_at = _logits_function(model, sequences[fitting[0]].input_ids)

        def scored(batch: list[int]) -> list[Score]:
            _check_stop(should_stop)
            return _score_batch(model, [sequences[i] for i in batch], logits_at)

        lengths = [len(s.input_ids) for s in sequences]
        jobs = list(batches(fitting, lengths, _fair(batch_tokens, [lengths[i] for i in fitting], shard)))
        for batch, scores in spread(jobs, scored, shard):
            for i, result in zip(batch, scores, strict=True):
                out[i] = result
            done += len(batch)
            if progress is not None:
                progress(done, len(sequences))
    return out


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    *,
    batch_tokens: int = 8192,
    should_stop: ShouldStop | None = None,
    shard: Shard | None = None,
) -> list[list[int]]:
    """Greedy continuations, batched with left padding; results in the order given.

    Args:
        prompts: token ids; padding is masked, its id is irrelevant.
        max_new_tokens: at most; fewer where the model's context ends before.
        shard: as in `score`.

    Returns:
        The new ids, up to and including the first end token (the tokenizer's eos, and those that the
        model's generation config names). Its other settings (sampling, penalties) are not used.

    Raises:
        ScoringError: an empty prompt, or one that fills the model's context.
        Interrupted: should_stop said so.
    """
    limit = context_length(model)
    room = [max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt)) for prompt in prompts]
    for position, prompt in enumerate(prompts):
        if not prompt or room[position] < 1:
            raise ScoringError(
                f"prompts[{position}] has {len(prompt)} tokens: must have at least 1 and leave room in the "
                f"context of {limit} tokens"
            )
    out: list[list[int]] = [[] for _ in prompts]
    ends = end_ids(model, tokenizer)
    with torch.inference_mode(), eval_mode(model):

        def decoded(job: tuple[int, list[int]]) -> list[list[int]]:
            _check_stop(should_stop)
            new_tokens, batch = job
            return _generate_batch(model, [prompts[i] for i in batch], new_tokens, ends)

        jobs = list(_by_room(prompts, room, batch_tokens, shard))
        for (_, batch), texts in spread(jobs, decoded, shard):
            for i, ids in zip(batch, texts, strict=True):
                out[i] = ids
    return out


def context_length(model: Any) -> int | None:
    """Tokens that the model can take, from its config; None where it names no limit."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return getattr(config, "max_position_embeddings", None)


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the tokenizer's eos and the generation config's."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return sorted({i for i in [tokenizer.eos_token_id, *listed] if i is not None})


def batches(items: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices by falling length, in batches of at most `batch_tokens` padded tokens (or of one item).

    The longest come first: what does not fit in memory fails at once.
    """
    batch: list[int] = []
    for i in sorted(items, key=lambda i: (-lengths[i], i)):
        if batch and lengths[batch[0]] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """No dropout inside; every module's own flag is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


LogitsAt = Callable[[Tensor, Tensor, Tensor], Iterator[Tensor]]


def _score_batch(model: Any, batch: Sequence[Scorable], logits_at: LogitsAt) -> list[Score]:
    width = max(len(s.input_ids) for s in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask, target = torch.zeros_like(ids), torch.zeros(len(batch), width, dtype=torch.bool)
    for i, s in enumerate(batch):
        ids[i, : len(s.input_ids)] = torch.tensor(s.input_ids)
        mask[i, : len(s.input_ids)] = 1
        target[i, : len(s.input_ids)] = torch.tensor(s.is_target, dtype=torch.bool)
    predicts = target[:, 1:]  # (B, L-1): position t predicts token t+1
    device = model.device
    wanted = ids[:, 1:][predicts].to(device)
    log_probs, hits, at = [], [], 0
    for logits in logits_at(ids.to(device), mask.to(device), predicts.to(device)):
        part = wanted[at : at + len(logits)]
        at += len(logits)
        chosen = logits.float().log_softmax(-1).gather(-1, part[:, None])[:, 0]
        log_probs += chosen.tolist()
        hits += (logits.argmax(-1) == part).tolist()
    if any(math.isnan(value) for value in log_probs):
        raise ScoringError(f"{_name(model)}: the logits are NaN; its weights are broken, nothing was measured")
    return list(_split(log_probs, hits, predicts.sum(1).tolist()))


def _split(log_probs: list[float], hits: list[bool], counts: list[int]) -> Iterator[Score]:
    at = 0
    for count in counts:
        row = hits[at : at + count]
        yield Score(log_probs[at : at + count], row.index(False) if False in row else count)
        at += count


def _by_room(
    prompts: Sequence[list[int]], room: Sequence[int], batch_tokens: int, shard: Shard | None
) -> Iterator[tuple[int, list[int]]]:
    """Batches of prompts with the same room, so that what a row gets never depends on its neighbours."""
    lengths = [len(prompt) + left for prompt, left in zip(prompts, room, strict=True)]
    tokens = _fair(batch_tokens, lengths, shard)
    for new_tokens in sorted(set(room)):
        alike = [i for i, left in enumerate(room) if left == new_tokens]
        yield from ((new_tokens, batch) for batch in batches(alike, lengths, tokens))


def _fair(batch_tokens: int, lengths: Sequence[int], shard: Shard | None) -> int:
    """Tokens of a batch small enough that no rank stands idle while another works on the only one."""
    return batch_tokens if shard is None else max(1, min(batch_tokens, sum(lengths) // (SHARES * shard.world)))


def _logits_function(model: Any, ids: list[int]) -> LogitsAt:
    """The head on gathered hidden states where the model's own forward computes the same, else all logits.

    Some models scale or cap what their head returns, or put a prompt of their own before the ids. So the
    short way is taken only after it gave the model's own logits on the first tokens.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's wrapper
    head, backbone = causal.get_output_embeddings(), causal.base_model
    if head is None or backbone is causal or _config_changes_logits(model):
        return _all_logits(model)
    probe = torch.tensor([ids[:8]], device=model.device)
    own = model(input_ids=probe, use_cache=False).logits
    try:
        short = head(_hidden(backbone(input_ids=probe, use_cache=False)))
    except (AttributeError, TypeError, RuntimeError):
        return _all_logits(model)
    tolerance = 32 * torch.finfo(own.dtype).eps * max(1.0, own.abs().max().item())
    if short.shape != own.shape or not bool(((short - own).abs() <= tolerance).all()):
        return _all_logits(model)
    return _gathered_logits(backbone, head, own.shape[-1])


def _gathered_logits(backbone: Any, head: Any, vocabulary: int) -> LogitsAt:
    def logits_at(ids: Tensor, mask: Tensor, predicts: Tensor) -> Iterator[Tensor]:
        hidden = _hidden(backbone(input_ids=ids, attention_mask=mask, use_cache=False))  # (B, L, H)
        for part in hidden[:, :-1][predicts].split(max(1, CHUNK_ELEMENTS // vocabulary)):
            yield head(part)

    return logits_at


def _all_logits(model: Any) -> LogitsAt:
    def logits_at(ids: Tensor, mask: Tensor, predicts: Tensor) -> Iterator[Tensor]:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (B, L, V)
        wanted = logits[:, :-1][predicts]
        yield from wanted.split(max(1, CHUNK_ELEMENTS // logits.shape[-1]))

    return logits_at


def _hidden(output: Any) -> Tensor:
    return output.last_hidden_state


def _config_changes_logits(model: Any) -> bool:
    config = model.config.to_dict()
    names = [name for name in config if "logit" in name and name != "output_logits"]
    return any(config[name] not in (None, 1, 1.0, False) for name in names)


def _generate_batch(model: Any, prompts: Sequence[list[int]], new_tokens: int, ends: list[int]) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with _greedy(model, new_tokens, ends):
        out = model.generate(input_ids=ids, attention_mask=mask)
    return [_until(row, ends) for row in out[:, width:].tolist()]


@contextmanager
def _greedy(model: Any, new_tokens: int, ends: list[int]) -> Iterator[None]:
    """A generation config of our own for a moment: `generate` fills what a passed one leaves open from the
    model's (Qwen ships a repetition penalty), and then it is no longer the arg max."""
    from transformers import GenerationConfig

    own = model.generation_config
    pad = ends[0] if ends else 0
    model.generation_config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, num_beams=1, eos_token_id=ends or None, pad_token_id=pad
    )
    try:
        yield
    finally:
        model.generation_config = own


def _until(ids: list[int], ends: list[int]) -> list[int]:
    first = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: first + 1]


def _check_stop(should_stop: ShouldStop | None) -> None:
    if should_stop is not None and should_stop():
        raise Interrupted("stopped between two batches")


def _name(model: Any) -> str:
    return getattr(model.config, "_name_or_path", "") or type(model).__name__
