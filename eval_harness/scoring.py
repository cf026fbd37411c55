"""Log-probabilities of target tokens: batches by falling length, shared prefixes once, the head only where it is read.

`score` runs the backbone once per batch and the LM head only on the positions that predict a target: with a
vocabulary of 150,000 and short answers that is most of the memory. Sequences with the same ids before their first
target (the choices of a question, an answer and its rivals) become one row: the prefix, then each continuation as a
branch that sees the prefix and itself, at the positions it would have alone. Never `use_cache=True` here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from eval_harness.errors import Interrupted, ScoringError
from eval_harness.lineage import LORA
from eval_harness.sharding import Shard, spread

SHARES = 4  # batches that each rank gets at least, where there are as many sequences
LEAST_CHUNK = 2**20  # logits alive at once: as many as the batch has hidden entries, and at least so many

ShouldStop = Callable[[], bool]
Progress = Callable[[int, int], None]


class Scorable(Protocol):
    """What is scored: ids, and which of them are targets (eval_harness.prompts.Encoded is one)."""

    input_ids: list[int]
    is_target: list[bool]


@dataclass(slots=True)
class Score:
    """Scores of one sequence's target tokens, in order. A target at position 0 has no prediction and is not scored.

    log_probs   nats
    hits        whether the token is the arg max
    ranks       how many tokens of the vocabulary are more likely
    means       mean of log p under p: minus the entropy, nats
    variances   variance of log p under p, nats squared

    The last three only where they were asked for (`statistics=True`), else None.
    """

    log_probs: list[float]
    hits: list[bool]
    ranks: list[int] | None = None
    means: list[float] | None = None
    variances: list[float] | None = None

    @property
    def log_prob(self) -> float:
        """Sum over the target tokens, in nats."""
        return math.fsum(self.log_probs)

    @property
    def tokens(self) -> int:
        return len(self.log_probs)

    @property
    def entropies(self) -> list[float] | None:
        """Nats per target token, where statistics were asked for."""
        return None if self.means is None else [-mean for mean in self.means]

    @property
    def is_greedy(self) -> bool:
        """Every target token is the arg max: greedy generation would write exactly this."""
        return all(self.hits)


def score(
    model: Any,
    sequences: Sequence[Scorable],
    *,
    statistics: bool = False,
    context: int | None = None,
    batch_tokens: int | None = None,
    should_stop: ShouldStop | None = None,
    progress: Progress | None = None,
    shard: Shard | None = None,
) -> list[Score | None]:
    """Score the target tokens of every sequence; results in the order given.

    Args:
        model: a causal language model; scored in eval mode, its own flags are restored.
        sequences: token ids with their targets.
        statistics: ranks, means and variances too: one more soft-max over the vocabulary per target.
        context: tokens that can be read before the last target; None is what the model's config says.
        batch_tokens: tokens of a batch, padding counted; None is what fits in free memory (`fitting_tokens`). A
            longer sequence is a batch of its own; a batch that does not fit in memory is halved until it does.
        should_stop: asked before every batch.
        progress: called with (sequences done, sequences in all) after every batch.
        shard: this process among several that pass the same sequences: each scores its part of the batches, and
            all get all scores. Ranks are asked to stop each for itself: one that says so stops all in a few batches.

    Returns:
        One Score per sequence; None where the tokens before its last target are more than the model's context:
        count it.

    Raises:
        ScoringError: the logits are NaN, or one sequence alone does not fit in memory.
        Interrupted: should_stop said so.
    """
    out: list[Score | None] = [None] * len(sequences)
    limit = context or context_length(model)
    asked = []
    for i, s in enumerate(sequences):
        needed = _last(s)
        if limit is None or needed <= limit:
            out[i] = _Tally(statistics).score(0)
            asked += [i] if needed else []
    if not asked:
        return out
    done = len(sequences) - len(asked)
    with without_gradients(model), eval_mode(model):
        reader = _reader(model, sequences[asked[0]].input_ids)
        rows = _rows(model, sequences, asked)
        lengths = [len(row.ids) for row in rows]
        tokens = fair(batch_tokens or fitting_tokens(model, shard), lengths, shard)
        alone = [i for i, row in enumerate(rows) if not row.branches]
        jobs = [
            *batches([i for i, row in enumerate(rows) if row.branches], lengths, tokens),
            *batches(alone, lengths, tokens),
        ]

        def scored(batch: list[int]) -> list[list[Score]]:
            check_stop(should_stop)
            return halving(lambda part: _score_rows(model, [rows[i] for i in part], reader, statistics), batch)

        for batch, found in spread(jobs, scored, shard):
            for i, scores in zip(batch, found, strict=True):
                for member, one in zip(rows[i].members, scores, strict=True):
                    out[member] = one
                done += len(rows[i].members)
            if progress is not None:
                progress(done, len(sequences))
    return out


def context_length(model: Any) -> int | None:
    """Tokens that the model can take, from its config; None where it names no limit."""
    return getattr(_text_config(model), "max_position_embeddings", None)


def fitting_tokens(model: Any, shard: Shard | None = None) -> int:
    """Tokens of a batch whose activations take about half of the free memory, the least of all ranks.

    An estimate from the config's widths; what is wrong about it is mended by `halving`. At most 512 on a CPU,
    where larger batches are slower, and 131,072 elsewhere.
    """
    config, itemsize = _text_config(model), torch.finfo(model.dtype).bits // 8
    hidden = getattr(config, "hidden_size", None) or 4096
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    per_token = itemsize * (16 * hidden + 4 * inner)
    free = free_memory(model.device)
    if shard is not None:
        free = min(shard.gather(free))
    return max(256, min(free // 2 // per_token, 512 if model.device.type == "cpu" else 131072))


def free_memory(device: Any) -> int:
    """Bytes that can still be allocated on a torch device."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def halving(work: Callable[[list[int]], list[Any]], batch: list[int]) -> list[Any]:
    """`work` on the batch, or on its halves where the batch does not fit in memory; results in order.

    Raises:
        ScoringError: one item alone does not fit.
    """
    try:
        return work(batch)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        if len(batch) == 1:
            raise ScoringError("one sequence alone does not fit in memory: use fewer or shorter tokens") from error
    # Outside of the handler: its traceback holds the tensors that did not fit.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(batch) // 2
    return [*halving(work, batch[:middle]), *halving(work, batch[middle:])]


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
    """No dropout inside; every module's own flag is restored. A 4-bit model stays able to train, whoever loaded it."""
    if "bitsandbytes" in sys.modules:
        from eval_harness.quantization import keep_gradients_right

        keep_gradients_right(model)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def without_gradients(model: Any) -> Iterator[None]:
    """Inference mode, the faster one; for a model in training no_grad: it may keep what it makes here."""
    with torch.no_grad(), torch.inference_mode(not model.training):
        yield


@dataclass(slots=True)
class _Row:
    """One row of a batch: a prefix, then the branches of its members.

    members     the sequences it scores
    ids         prefix and branches, without what predicts no target
    positions   of each id in its own sequence
    branches    of each id: 0 for the prefix, k for the k-th member; empty for a sequence alone
    reads       per member: where in the row each of its targets is predicted
    wanted      per member: those targets' ids
    """

    members: list[int]
    ids: list[int]
    positions: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)
    reads: list[list[int]] = field(default_factory=list)
    wanted: list[list[int]] = field(default_factory=list)


def _rows(model: Any, sequences: Sequence[Scorable], asked: Sequence[int]) -> list[_Row]:
    """Sequences that share what comes before their first target as one row each, the others alone."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i in asked:
        groups.setdefault(tuple(sequences[i].input_ids[: _first(sequences[i])]), []).append(i)
    shared = [prefix for prefix, members in groups.items() if prefix and len(members) > 1]
    able = bool(shared) and _found(_can_branch, model, sequences[groups[shared[0]][0]].input_ids)
    window, width = _window(model), getattr(_text_config(model), "hidden_size", None) or 4096
    rows = []
    for prefix, members in groups.items():
        longest = max(len(sequences[i].input_ids) for i in members)
        if able and len(members) > 1 and longest <= window:
            rows += _branched(sequences, list(prefix), members, width)
        else:
            rows += [_alone(sequences[i], i) for i in members]
    return rows


def _first(sequence: Scorable) -> int:
    """Where the first scored target stands."""
    return sequence.is_target.index(True, 1)


def _last(sequence: Scorable) -> int:
    """Where the last target stands, which is how many tokens must be read; 0 without a scored target."""
    return next((t for t in range(len(sequence.is_target) - 1, 0, -1) if sequence.is_target[t]), 0)


def _alone(sequence: Scorable, member: int) -> _Row:
    end = _last(sequence)
    targets = [t for t in range(1, end + 1) if sequence.is_target[t]]
    wanted = [sequence.input_ids[t] for t in targets]
    return _Row([member], sequence.input_ids[:end], reads=[[t - 1 for t in targets]], wanted=[wanted])


def _branched(sequences: Sequence[Scorable], prefix: list[int], members: Sequence[int], width: int) -> list[_Row]:
    """The members as branches of one row, or of several: one more joins a row as long as that costs less than the
    sequence alone. A layer's cost is about 24 H^2 L for its matrices and 4 H L^2 for attention, which is dense in a
    row of branches and half of that in a sequence alone."""

    def dense(tokens: int) -> int:
        return tokens * (6 * width + tokens)

    rows: list[_Row] = []
    for member in members:
        one = sequences[member]
        size, end = len(prefix), _last(one)
        before = len(rows[-1].ids) if rows else 0
        if not rows or dense(before + end - size) - dense(before) > end * (6 * width + end // 2):
            rows.append(_Row([], list(prefix), list(range(size)), [0] * size))
        row, at = rows[-1], len(rows[-1].ids)
        row.members.append(member)
        row.ids += one.input_ids[size:end]
        row.positions += range(size, end)
        row.branches += [len(row.members)] * (end - size)
        targets = [t for t in range(size, end + 1) if one.is_target[t]]
        row.reads.append([t - 1 if t == size else at + t - 1 - size for t in targets])
        row.wanted.append([one.input_ids[t] for t in targets])
    return [row if len(row.members) > 1 else _alone(sequences[row.members[0]], row.members[0]) for row in rows]


Reader = Callable[[dict[str, Tensor], Tensor, Tensor], Iterator[Tensor]]  # inputs, rows, columns -> logits in chunks


def _score_rows(model: Any, rows: Sequence[_Row], reader: Reader, statistics: bool) -> list[list[Score]]:
    where = [(i, at) for i, row in enumerate(rows) for reads in row.reads for at in reads]
    row_of, column = (torch.tensor(part, device=model.device) for part in zip(*where, strict=True))
    wanted = torch.tensor([one for row in rows for ids in row.wanted for one in ids], device=model.device)
    tally, at = _Tally(statistics), 0
    for logits in reader(_inputs(model, rows), row_of, column):
        tally.add(logits, wanted[at : at + len(logits)])
        at += len(logits)
    if any(math.isnan(value) for value in tally.log_probs):
        raise ScoringError(f"{_name(model)}: the logits are NaN; its weights are broken, nothing was measured")
    return [[tally.score(len(reads)) for reads in row.reads] for row in rows]


class _Tally:
    """Per-token numbers of all targets in reading order, handed out again sequence by sequence."""

    def __init__(self, statistics: bool):
        self.statistics = statistics
        self.log_probs: list[float] = []
        self.hits: list[bool] = []
        self.ranks: list[int] = []
        self.means: list[float] = []
        self.variances: list[float] = []
        self._at = 0

    def add(self, logits: Tensor, wanted: Tensor) -> None:
        logits = logits.float()  # (n, V)
        chosen = logits.gather(-1, wanted[:, None])
        total = logits.logsumexp(-1, keepdim=True)
        self.log_probs += (chosen - total)[:, 0].tolist()
        self.hits += (logits.argmax(-1) == wanted).tolist()
        if self.statistics:
            self.ranks += (logits > chosen).sum(-1).tolist()
            logits = logits - total
            p = logits.exp()
            mean = (p * logits.nan_to_num(neginf=0.0)).sum(-1, keepdim=True)
            self.means += mean[:, 0].tolist()
            self.variances += (p * (logits - mean).nan_to_num(neginf=0.0).square()).sum(-1).tolist()

    def score(self, count: int) -> Score:
        """The next `count` tokens."""
        part = slice(self._at, self._at + count)
        self._at += count
        found = Score(self.log_probs[part], self.hits[part])
        if self.statistics:
            found.ranks, found.means, found.variances = self.ranks[part], self.means[part], self.variances[part]
        return found


def _inputs(model: Any, rows: Sequence[_Row]) -> dict[str, Tensor]:
    """Ids padded on the right; with branches their positions and who sees whom."""
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows])
    if not rows[0].branches:
        mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows])
        return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    positions = torch.tensor([row.positions + [0] * (width - len(row.ids)) for row in rows])
    branches = torch.tensor([row.branches + [-1] * (width - len(row.ids)) for row in rows], device=model.device)
    sees = branches[:, None, :] == branches[:, :, None]  # padding sees padding, so that no soft-max is empty
    sees |= (branches == 0)[:, None, :]
    sees = (sees & torch.ones(width, width, dtype=torch.bool, device=model.device).tril())[:, None]  # (B, 1, L, L)
    if model.config._attn_implementation != "sdpa":  # eager adds its mask to the scores
        sees = torch.zeros(sees.shape, dtype=model.dtype, device=model.device).masked_fill(
            ~sees, torch.finfo(model.dtype).min
        )
    return {"input_ids": ids.to(model.device), "position_ids": positions.to(model.device), "attention_mask": sees}


def _can_branch(model: Any, ids: list[int]) -> bool:
    """Whether the model takes positions and a mask of four dimensions and does what they say.

    Asked of the model itself on a few tokens: a branch's logits are those of its sequence alone, and do not change
    by a bit when the other branch does. Flash attention, recurrent layers and learned prompts say no.
    """
    if getattr(model.config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return False
    stem = (ids * 3)[:3]
    other = [(one + 1) % model.get_input_embeddings().num_embeddings for one in stem]

    def logits(first: list[int], second: list[int]) -> Tensor:
        branches = [0] * 3 + [1] * len(first) + [2] * len(second)
        positions = [0, 1, 2, *range(3, 3 + len(first)), *range(3, 3 + len(second))]
        row = _Row([0, 1], [*stem, *first, *second], positions, branches)
        return model(**_inputs(model, [row]), use_cache=False).logits[0]

    try:
        once, again = logits(stem, other), logits(other, other)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    alone = model(input_ids=torch.tensor([[*stem, *other]], device=model.device), use_cache=False).logits[0]
    if once.shape[0] != 9 or not torch.equal(once[-3:], again[-3:]):
        return False
    return _close(torch.cat([once[:3], once[-3:]]), alone)


def _window(model: Any) -> float:
    """Tokens up to which a mask of our own says the same as the model's: its sliding window or chunk."""
    config = _text_config(model)
    named = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min([one for one in named if one], default=math.inf)


def _reader(model: Any, ids: list[int]) -> Reader:
    """The head on gathered hidden states where the model's own forward computes the same, else all logits.

    Some models scale or cap what their head returns, or put a prompt of their own before the ids. So the
    short way is taken only after it gave the model's own logits on the first tokens.
    """
    if not _found(_is_head_on_hidden, model, ids):
        return _all_logits(model)
    causal = _causal(model)
    vocabulary = getattr(_text_config(model), "vocab_size", None) or 2**17  # decides the size of chunks alone
    return _gathered_logits(causal.base_model, causal.get_output_embeddings(), vocabulary)


def _is_head_on_hidden(model: Any, ids: list[int]) -> bool:
    causal = _causal(model)
    head, backbone = causal.get_output_embeddings(), causal.base_model
    if head is None or backbone is causal or _config_changes_logits(model):
        return False
    probe = torch.tensor([ids[:8]], device=model.device)
    own = model(input_ids=probe, use_cache=False).logits
    try:
        short = head(_hidden(backbone(input_ids=probe, use_cache=False)))
    except (AttributeError, TypeError, RuntimeError):
        return False
    return short.shape == own.shape and _close(short, own)


def _causal(model: Any) -> Any:
    """The model beneath PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


_FOUND: WeakKeyDictionary[Any, dict[Any, bool]] = WeakKeyDictionary()


def _found(trait: Callable[[Any, list[int]], bool], model: Any, ids: list[int]) -> bool:
    """What a few tokens tell of a model, asked once while it lives, for every way in which it may compute.

    Adapters other than LoRA may put tokens of their own before the ids when they are active: asked each time.
    """
    if any(one.peft_type != LORA for one in getattr(model, "peft_config", {}).values()):
        return trait(model, ids)
    kind = model.device.type
    attention = getattr(model.config, "_attn_implementation", None)
    how = (trait.__name__, kind, model.dtype, attention, torch.is_autocast_enabled(kind))
    known = _FOUND.setdefault(model, {})
    if how not in known:
        known[how] = trait(model, ids)
    return known[how]


def _close(found: Tensor, expected: Tensor) -> bool:
    tolerance = 32 * torch.finfo(expected.dtype).eps * max(1.0, expected.abs().max().item())
    return bool(((found - expected).abs() <= tolerance).all())


def _gathered_logits(backbone: Any, head: Any, vocabulary: int) -> Reader:
    def read(inputs: dict[str, Tensor], rows: Tensor, columns: Tensor) -> Iterator[Tensor]:
        hidden = _hidden(backbone(**inputs, use_cache=False))  # (B, L, H)
        elements = max(LEAST_CHUNK, hidden.numel())
        wanted = hidden[rows, columns]  # (n, H)
        del hidden
        for part in wanted.split(max(1, elements // vocabulary)):
            yield head(part)

    return read


def _all_logits(model: Any) -> Reader:
    def read(inputs: dict[str, Tensor], rows: Tensor, columns: Tensor) -> Iterator[Tensor]:
        logits = model(**inputs, use_cache=False).logits  # (B, L, V), L with the model's own prompt where it has one
        wanted = logits[rows, columns + logits.shape[1] - inputs["input_ids"].shape[1]]
        yield from wanted.split(max(1, LEAST_CHUNK // logits.shape[-1]))

    return read


def _hidden(output: Any) -> Tensor:
    return output.last_hidden_state


def _config_changes_logits(model: Any) -> bool:
    config = model.config.to_dict() | _text_config(model).to_dict()  # a composite model's own say nothing of its text
    names = [name for name in config if "logit" in name and name != "output_logits"]
    return any(config[name] not in (None, 1, 1.0, False) for name in names)


def fair(batch_tokens: int, lengths: Sequence[int], shard: Shard | None) -> int:
    """Tokens of a batch small enough that no rank stands idle while another works on the only one."""
    return batch_tokens if shard is None else max(1, min(batch_tokens, sum(lengths) // (SHARES * shard.world)))


def _text_config(model: Any) -> Any:
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def check_stop(should_stop: ShouldStop | None) -> None:
    if should_stop is not None and should_stop():
        raise Interrupted("stopped between two batches")


def _name(model: Any) -> str:
    return getattr(model.config, "_name_or_path", "") or type(model).__name__
