"""Greedy and sampled continuations, in batches of left-padded prompts with the same room.

A sampled token is the arg max of the warped logits plus Gumbel noise of a generator seeded by (seed, prompt, step),
and by a number of the draw where a prompt is continued more than once, so that a prompt's continuation does not depend
on its neighbours, the batch size or the number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from eval_harness.errors import ScoringError

if TYPE_CHECKING:
    from torch import Tensor

    from eval_harness.scoring import Progress, ShouldStop
    from eval_harness.sharding import Shard


@dataclass(frozen=True, slots=True)
class Generation:
    """How a continuation is written.

    max_new_tokens   None is as many as the row's own answer needs, for exact match alone
    stop             strings that end it; the text before the first of them is the answer
    temperature      0 is greedy; else logits are divided by it
    top_p, top_k     as in transformers: the smallest set of that mass; the k most likely; off by default
    seed             of the noise; equal seeds give equal texts
    """

    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def definition(self) -> str:
        """Every setting that is not its default, e.g. "new=32,stop=1:9e1a": part of a measure's id."""
        said = {key: value for key, value in asdict(self).items() if value != getattr(Generation(), key)}
        names = {"max_new_tokens": "new", "temperature": "t"}
        said |= {key: f"{said[key]:g}" for key in ("temperature", "top_p") if key in said}  # 1 and 1.0 are one setting
        if "stop" in said:
            digest = hashlib.sha256("\0".join(self.stop).encode()).hexdigest()[:4]
            said["stop"] = f"{len(self.stop)}:{digest}"
        return ",".join(f"{names.get(key, key)}={value}" for key, value in said.items()) or "greedy"

    def limited_to(self, max_new_tokens: int) -> Generation:
        """The same with another bound."""
        return replace(self, max_new_tokens=max_new_tokens)

    def problems(self) -> Iterator[str]:
        """Every field whose value cannot be, as `field = value: what is allowed`."""
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            yield f"max_new_tokens = {self.max_new_tokens!r}: must be a whole number of at least 1"
        if not all(self.stop):
            yield f"stop = {list(self.stop)!r}: must be strings that are not empty"
        if not 0 <= self.temperature < float("inf"):
            yield f"temperature = {self.temperature!r}: must be 0 (greedy) or a positive number"
        if not 0 < self.top_p <= 1:
            yield f"top_p = {self.top_p!r}: must be above 0 and at most 1"
        if self.top_k < 0:
            yield f"top_k = {self.top_k!r}: must be 0 (off) or a positive whole number"
        if not self.temperature and (self.top_p != 1 or self.top_k):
            yield "top_p and top_k need a temperature above 0: greedy generation ignores them"


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    how: Generation | int,
    *,
    batch_tokens: int | None = None,
    should_stop: ShouldStop | None = None,
    progress: Progress | None = None,
    shard: Shard | None = None,
    draws: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue every prompt; results in the order given.

    Args:
        prompts: token ids; padding is masked, its id is irrelevant.
        how: how to write, or a number of new tokens to write greedily; fewer where the model's context ends before.
        draws: a number for each prompt: where it differs, equal prompts are sampled differently.
        batch_tokens, should_stop, progress, shard: as in `eval_harness.scoring.score`.

    Returns:
        The new ids, up to and including the first end token (the tokenizer's eos, those that the model's generation
        config names, stop strings that are special tokens) or the token that completes a stop string. The generation
        config's other settings (sampling, penalties) are not used.

    Raises:
        ScoringError: an empty prompt, one that fills the model's context, or logits that are NaN.
        Interrupted: should_stop said so.
        ValueError: no max_new_tokens.
    """
    from eval_harness.scoring import check_stop, context_length, eval_mode, fitting_tokens, halving, without_gradients
    from eval_harness.sharding import spread

    how = Generation(max_new_tokens=how) if isinstance(how, int) else how
    if how.max_new_tokens is None:
        raise ValueError("generate needs max_new_tokens")
    limit = context_length(model)
    room = [how.max_new_tokens if limit is None else min(how.max_new_tokens, limit - len(prompt)) for prompt in prompts]
    for position, prompt in enumerate(prompts):
        if not prompt or room[position] < 1:
            raise ScoringError(
                f"prompts[{position}] has {len(prompt)} tokens: must have at least 1 and leave room in the "
                f"context of {limit} tokens"
            )
    out: list[list[int]] = [[] for _ in prompts]
    keys = [_number(str([how.seed, *prompt])) for prompt in prompts]
    if draws is not None:
        keys = [_number(f"{key}/{draw}") for key, draw in zip(keys, draws, strict=True)]
    ends = end_ids(model, tokenizer, how.stop)
    done = 0
    with without_gradients(model), eval_mode(model):

        def decoded(job: tuple[int, list[int]]) -> list[list[int]]:
            check_stop(should_stop)
            new_tokens, batch = job
            return halving(
                lambda part: _generate_batch(
                    model, tokenizer, [prompts[i] for i in part], [keys[i] for i in part], new_tokens, ends, how
                ),
                batch,
            )

        jobs = list(_by_room(prompts, room, batch_tokens or fitting_tokens(model, shard), shard))
        for (_, batch), texts in spread(jobs, decoded, shard):
            for i, ids in zip(batch, texts, strict=True):
                out[i] = ids
            done += len(batch)
            if progress is not None:
                progress(done, len(prompts))
    return out


def end_ids(model: Any, tokenizer: Any, stop: Sequence[str] = ()) -> list[int]:
    """Ids that end an answer: the tokenizer's eos, the generation config's, and stop strings that are special tokens,
    which stand in no text."""
    special = [tokenizer.convert_tokens_to_ids(one) for one in stop if one in tokenizer.all_special_tokens]
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return sorted({i for i in [tokenizer.eos_token_id, *listed, *special] if i is not None})


def _by_room(
    prompts: Sequence[list[int]], room: Sequence[int], batch_tokens: int, shard: Shard | None
) -> Iterator[tuple[int, list[int]]]:
    """Batches of prompts with the same room, so that what a row gets never depends on its neighbours."""
    from eval_harness.scoring import batches, fair

    lengths = [len(prompt) + left for prompt, left in zip(prompts, room, strict=True)]
    tokens = fair(batch_tokens, lengths, shard)
    for new_tokens in sorted(set(room)):
        alike = [i for i, left in enumerate(room) if left == new_tokens]
        yield from ((new_tokens, batch) for batch in batches(alike, lengths, tokens))


def _generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    keys: Sequence[int],
    new_tokens: int,
    ends: list[int],
    how: Generation,
) -> list[list[int]]:
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    extra: dict[str, Any] = {"logits_processor": [_refuse_nan]}
    if how.stop:
        extra["stopping_criteria"] = [_Stops(tokenizer, how.stop, width)]
    if how.temperature:
        extra["logits_processor"].append(_Noise(keys, how, width))
    with _greedy(model, new_tokens, ends):
        out = model.generate(input_ids=ids, attention_mask=mask, **extra)
    texts = [_until(row, ends) for row in out[:, width:].tolist()]
    return [_until_stop(tokenizer, row, how.stop) for row in texts] if how.stop else texts


@contextmanager
def _greedy(model: Any, new_tokens: int, ends: list[int]) -> Iterator[None]:
    """A generation config of our own for a moment: `generate` fills what a passed one leaves open from the
    model's (Qwen ships a repetition penalty), and then it is no longer the arg max."""
    from transformers import GenerationConfig

    causal = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's wrapper may hold its own
    owners = [one for one in (model, causal) if "generation_config" in vars(one)]
    before = [one.generation_config for one in owners]
    pad = ends[0] if ends else 0
    ours = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, num_beams=1, eos_token_id=ends or None, pad_token_id=pad
    )
    for one in owners:
        one.generation_config = ours
    try:
        yield
    finally:
        for one, own in zip(owners, before, strict=True):
            one.generation_config = own


def _refuse_nan(input_ids: Tensor, scores: Tensor) -> Tensor:
    """The arg max of NaN is a token like any other: nothing would be noticed."""
    if bool(scores.isnan().any()):
        raise ScoringError("the logits are NaN; the model's weights are broken, nothing was measured")
    return scores


class _Stops:
    """Which rows hold a stop string among their last new tokens; transformers calls it after every token."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], width: int):
        self.tokenizer, self.stop, self.width = tokenizer, stop, width
        # A character takes at most four tokens (bytes); one token may end a string that began tokens earlier.
        self.tail = 4 * max(map(len, stop)) + 4

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        import torch

        tails = input_ids[:, self.width :][:, -self.tail :].tolist()
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=True)
        held = [any(one in text for one in self.stop) for text in texts]
        return torch.tensor(held, device=input_ids.device)


class _Noise:
    """Logits warped by temperature, top-k and top-p, plus Gumbel noise of each prompt: the arg max is a sample."""

    def __init__(self, keys: Sequence[int], how: Generation, width: int):
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self.keys, self.width = keys, width
        self.warpers: list[Any] = [TemperatureLogitsWarper(float(how.temperature))]
        self.warpers += [TopKLogitsWarper(how.top_k)] if how.top_k else []
        self.warpers += [TopPLogitsWarper(how.top_p)] if how.top_p < 1 else []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        import torch

        step = input_ids.shape[1] - self.width
        scores = scores.float()
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        noise = torch.empty(scores.shape, dtype=torch.float32)  # drawn on the CPU: the same on every device
        for row, key in enumerate(self.keys):
            noise[row].exponential_(generator=torch.Generator().manual_seed(_number(f"{key}:{step}")))
        return scores - noise.log_().to(scores.device)  # -log of an exponential variable is Gumbel's


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _until(ids: list[int], ends: list[int]) -> list[int]:
    first = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: first + 1]


def _until_stop(tokenizer: Any, ids: list[int], stop: Sequence[str]) -> list[int]:
    """Up to and including the token that completes a stop string: what follows is another row's time."""

    def holds(count: int) -> bool:
        text = tokenizer.decode(ids[:count], skip_special_tokens=True)
        return any(one in text for one in stop)

    if not holds(len(ids)):
        return ids
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return ids[:low]
