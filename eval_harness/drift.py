"""How far a model has moved from its base in what it says and in what its last layer holds, on fixed rows.

    forward_kl               KL(base || model) over the whole vocabulary, nats
    hidden_shift             ||h - h0|| / ||h0||
    hidden_cosine_distance   1 - cos(h, h0)

Each at the positions that predict the rows' target tokens; h is what the LM head reads, after the final norm. Forward
KL on the data of a new task is the quantity by which RL's Razor (arXiv 2509.04259) predicts what is forgotten.

Cost: one forward of either model per row. Memory: the base's weights, none where the base is the same model with its
adapters off; beside one batch's activations two tensors (targets, hidden) and one chunk of logits of either model.
How far the weights moved: `eval_harness.weights`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eval_harness.errors import ScoringError
from eval_harness.items import NO_TARGET, TOO_LONG
from eval_harness.measures.base import ratio
from eval_harness.prompts import Prompting, encode
from eval_harness.results import Result
from eval_harness.rows import Row

if TYPE_CHECKING:
    from torch import Tensor

    from eval_harness.scoring import Progress, Scorable, ShouldStop
    from eval_harness.sharding import Shard

LEAST_CHUNK = 2**20  # logits of either model alive at once: a quarter of the batch's hidden entries, and at least these
INFINITE_KL = "the_model_rules_out_what_the_base_may_write"
ZERO_HIDDEN = "zero_hidden_state_of_the_base"


class DriftError(ValueError):
    """Two models that cannot be compared; says why and what to give instead."""


@dataclass(slots=True)
class TokenDrift:
    """Of one sequence, per target token in order; the first token of a sequence is predicted by nothing.

    kl               KL(base || model) in nats; inf where the model gives no probability to what the base may write
    shift            ||h - h0|| / ||h0||; inf or NaN where h0 is zero
    cosine_distance  1 - cos(h, h0); NaN where either is zero
    """

    kl: list[float] = field(default_factory=list)
    shift: list[float] = field(default_factory=list)
    cosine_distance: list[float] = field(default_factory=list)


def drift(
    model: Any,
    base: Any | None,
    tokenizer: Any,
    rows: Sequence[Row],
    prompting: Prompting | None = None,
    *,
    shots: Sequence[Row] = (),
    base_name: str = "base",
    batch_tokens: int | None = None,
    should_stop: ShouldStop | None = None,
    progress: Progress | None = None,
    shard: Shard | None = None,
) -> dict[str, Result]:
    """Measure how far a model is from its base on the target tokens of rows.

    Args:
        model: a causal language model.
        base: another one with the same vocabulary and hidden size; None is `model` with its PEFT adapters off.
        rows: what is read by both; a text longer than the context is left out and counted.
        prompting: how rows become prompts; shots: solved rows put before each.
        base_name: stands in the definition, so that drift from different bases does not compare.
        batch_tokens, should_stop, progress, shard: as in `eval_harness.scoring.score`.

    Returns:
        forward_kl, hidden_shift, hidden_cosine_distance: means over all target tokens, their standard errors over
        rows (a ratio of sums), per item the row's own mean.

    Raises:
        DriftError: no rows, vocabularies or hidden sizes that differ, no adapters to switch off.
        PromptError: a row that the tokenizer cannot render.
        ScoringError: NaN logits.
        Interrupted: should_stop said so.
    """
    if not rows:
        raise DriftError("rows is empty: drift is measured on at least one row")
    how = prompting or Prompting()
    sequences = [encode(tokenizer, row, how.chat_template, system=how.system, shots=shots) for row in rows]
    found = token_drift(
        model, base, sequences, batch_tokens=batch_tokens, should_stop=should_stop, progress=progress, shard=shard
    )
    said = f"{base_name},full_vocabulary,{how.definition(tokenizer, shots)}"
    return {
        "forward_kl": _mean(rows, found, "kl", f"forward_kl@1(nats_per_token,{said})", INFINITE_KL),
        "hidden_shift": _mean(rows, found, "shift", f"hidden_shift@1(relative_l2_per_token,{said})", ZERO_HIDDEN),
        "hidden_cosine_distance": _mean(
            rows, found, "cosine_distance", f"hidden_cosine_distance@1(per_token,{said})", ZERO_HIDDEN
        ),
    }


def _mean(rows: Sequence[Row], found: Sequence[TokenDrift | None], name: str, definition: str, why: str) -> Result:
    """Mean over tokens; a row of which one token has no finite value is left out and counted."""
    excluded: Counter[str] = Counter()
    kept = []
    for row, one in zip(rows, found, strict=True):
        values = getattr(one, name) if one is not None else []
        reason = TOO_LONG if one is None else NO_TARGET if not values else None
        if reason is None and not all(map(math.isfinite, values)):
            reason = why
        if reason is None:
            kept.append((row.id, math.fsum(values), len(values)))
        else:
            excluded[reason] += 1
    return ratio(kept, definition, excluded, None)


def token_drift(
    model: Any,
    base: Any | None,
    sequences: Sequence[Scorable],
    *,
    batch_tokens: int | None = None,
    should_stop: ShouldStop | None = None,
    progress: Progress | None = None,
    shard: Shard | None = None,
) -> list[TokenDrift | None]:
    """As `drift`, of encoded sequences and token by token; None for one that is longer than either context.

    Both models are read in eval mode; their flags, and which adapter tensors are trained, are restored.
    """
    from eval_harness.scoring import (
        batches,
        check_stop,
        context_length,
        eval_mode,
        fair,
        fitting_tokens,
        halving,
        without_gradients,
    )
    from eval_harness.sharding import spread

    readers = _readers(model, base)
    limit = min((known for r in readers if (known := context_length(r.model)) is not None), default=math.inf)
    out = [TokenDrift() if len(s.input_ids) <= limit else None for s in sequences]
    asked = [i for i, s in enumerate(sequences) if out[i] is not None and any(s.is_target[1:])]
    lengths = [len(s.input_ids) for s in sequences]
    done = len(sequences) - len(asked)
    with without_gradients(readers[0].model), eval_mode(readers[0].model), eval_mode(readers[1].model):
        tokens = fair(batch_tokens or fitting_tokens(model, shard), [lengths[i] for i in asked], shard)

        def compared(batch: list[int]) -> list[TokenDrift]:
            check_stop(should_stop)
            return halving(lambda part: _compare(*readers, [sequences[i] for i in part]), batch)

        for batch, found in spread(list(batches(asked, lengths, tokens)), compared, shard):
            for i, one in zip(batch, found, strict=True):
                out[i] = one
            done += len(batch)
            if progress is not None:
                progress(done, len(sequences))
    return out


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """A PeftModel without its adapters for a moment.

    PEFT's own way makes every active adapter's tensors trainable when it ends; here they are what they were.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def refuse_without_own_base(model: Any) -> None:
    """Raise DriftError unless a model with its adapters off is what they were put on."""
    if not hasattr(model, "disable_adapter"):
        raise DriftError(f"base = None means adapters switched off, and {type(model).__name__} has none: give the base")
    trained = [name for name, config in model.peft_config.items() if getattr(config, "bias", "none") != "none"]
    if trained:
        raise DriftError(f"adapter {trained[0]!r} trained biases of its base, so off is not the base: give the base")


@dataclass(frozen=True, slots=True)
class _Reader:
    """What a model's head reads, and what the model makes of it; is_off: with its adapters off.

    Both go through the model's own forward with the head's input replaced, so whatever it does to its logits
    (caps, scales) is done, and no logits arise at positions that are not read.
    """

    model: Any
    is_off: bool = False

    def hidden(self, inputs: dict[str, Tensor], rows: Tensor, columns: Tensor) -> Tensor:
        """(n, H) of a padded batch (B, L); a prompt that the model puts in front is passed over."""
        held: list[Tensor] = []
        width = inputs["input_ids"].shape[1]

        def keep(hidden: Tensor) -> Tensor:  # (B, L, H)
            held.append(hidden[rows, columns + hidden.shape[1] - width])
            return hidden[:1, :1]

        self._forward(inputs, keep)
        if not held:
            raise DriftError(f"{type(self.model).__name__}: its forward never calls its output embeddings")
        return held[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, H) -> (n, V), at the price of one token through the layers below."""
        import torch

        token = torch.zeros((1, 1), dtype=torch.long, device=hidden.device)
        return self._forward({"input_ids": token}, lambda _: hidden[None])[0]

    def _forward(self, inputs: dict[str, Tensor], edit: Callable[[Tensor], Tensor]) -> Tensor:
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, args: (edit(args[0]), *args[1:]))
        try:
            with adapters_off(self.model) if self.is_off else nullcontext():
                return self.model(**inputs, use_cache=False).logits
        finally:
            hook.remove()


def _readers(model: Any, base: Any | None) -> tuple[_Reader, _Reader]:
    if base is None:
        refuse_without_own_base(model)
    pair = _Reader(model), _Reader(model if base is None else base, is_off=base is None)
    for reader in pair:
        if reader.model.get_output_embeddings() is None:
            raise DriftError(f"{type(reader.model).__name__}: has no output embeddings; give a causal language model")
    return pair


def _compare(ours: _Reader, base: _Reader, sequences: Sequence[Scorable]) -> list[TokenDrift]:
    import torch

    where = [(i, t - 1) for i, s in enumerate(sequences) for t in range(1, len(s.input_ids)) if s.is_target[t]]
    device = ours.model.device
    h, h0 = (reader.hidden(*_batch(sequences, where, reader.model.device)) for reader in (ours, base))
    if h.shape != h0.shape:
        raise DriftError(f"the hidden size is {h.shape[1]} and the base's {h0.shape[1]}: give the base it was made of")
    size = _chunk(ours.model, h, sum(len(s.input_ids) for s in sequences))
    parts = zip(h.split(size), h0.split(size), strict=True)
    kl = torch.cat([_forward_kl(ours.logits(part), base.logits(part0).to(device)) for part, part0 in parts])
    if kl.isnan().any():
        raise ScoringError("the logits of the model or of its base are NaN; its weights are broken, no drift measured")
    counts = Counter(i for i, _ in where)
    sizes = [counts[i] for i in range(len(sequences))]
    split = [[part.tolist() for part in one.split(sizes)] for one in (kl, *_hidden_drift(h, h0.to(device)))]
    return [TokenDrift(*columns) for columns in zip(*split, strict=True)]


def _batch(sequences: Sequence[Scorable], where: Sequence[tuple[int, int]], device: Any) -> tuple[Any, Tensor, Tensor]:
    """Ids (B, L) padded on the right with their mask, and rows and columns (n) of the positions to read."""
    import torch

    width = max(len(s.input_ids) for s in sequences)
    ids = [list(s.input_ids) + [0] * (width - len(s.input_ids)) for s in sequences]
    mask = [[1] * len(s.input_ids) + [0] * (width - len(s.input_ids)) for s in sequences]
    inputs = {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}
    rows, columns = (torch.tensor(part, device=device) for part in zip(*where, strict=True))
    return inputs, rows, columns


def _chunk(model: Any, hidden: Tensor, tokens: int) -> int:
    """Positions whose logits are alive at once."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return max(1, max(LEAST_CHUNK, tokens * hidden.shape[1] // 4) // vocabulary)


def _forward_kl(logits: Tensor, base: Tensor) -> Tensor:
    """KL(base || model) per position in nats: (n, V), (n, V) -> (n,). In float64: near zero its terms cancel."""
    if logits.shape != base.shape:
        raise DriftError(
            f"the vocabulary has {logits.shape[1]} tokens and the base's {base.shape[1]}: KL needs one vocabulary"
        )
    log_q, log_p = logits.double().log_softmax(-1), base.double().log_softmax(-1)
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(-1).clamp_min(0.0)


def _hidden_drift(h: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """Relative L2 and cosine distance per position, (n, H) -> (n,). 1 - cos is half the squared chord: exact at 0."""
    h, h0 = h.double(), h0.double()
    norm, norm0 = h.norm(dim=-1, keepdim=True), h0.norm(dim=-1, keepdim=True)
    shift = (h - h0).norm(dim=-1) / norm0[:, 0]
    return shift, (h / norm - h0 / norm0).square().sum(-1) / 2
