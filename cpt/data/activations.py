"""What is kept of a model at the learned tokens of rows: regions or values of its last hidden states, likely tokens.

A region (low, middle, high; `cpt.losses.threshold_margin`) takes two bits an entry: 1,000 texts of 563 tokens of an 8B
model are 0.58 GB, in float32 they would be 9.2. The values themselves take 16 or 32 bits an entry, the k most likely
next tokens 8 bytes each.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from cpt.data.recording import Recorder, Recording, offsets, record
from cpt.data.tokens import IGNORED
from cpt.losses.divergences import Head, log_probs_of, top_k_divergence
from cpt.losses.threshold_margin import Moments, margins, pack, regions, unpack

SAMPLE = 16  # rows on which the noise of batch shapes is measured
SAFETY = 4.0  # times the noise that was seen
ROUNDING = 16 * torch.finfo(torch.float32).eps  # of a dimension's largest entry: noise that a sample may have missed
MOMENTS = ("count", "total", "squares", "largest")


class Regions(Recording):
    """In which region of its dimension each entry of the last hidden states lies."""

    @cached_property
    def _thresholds(self) -> dict[str, Tensor]:
        return load_file(self.folder / "thresholds.safetensors")

    def thresholds(self, device: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(H,) each: lower and upper threshold, and the noise below which nothing lies outside of its region."""
        low, high, noise = (self._thresholds[name].to(device) for name in ("low", "high", "noise"))
        return low, high, noise

    def regions(self, rows: Sequence[int], device: Any) -> Tensor:
        """(N, H) uint8: the regions of the learned tokens of these rows, row after row."""
        return unpack(self.read("regions", "regions", rows).to(device), len(self._thresholds["low"]))

    def apart(self, rows: Sequence[int], hidden: Tensor, head: Head | None) -> Tensor:
        """(N, H) how far hidden states of these rows lie outside of their regions."""
        return margins(hidden, self.regions(rows, hidden.device), *self.thresholds(hidden.device))


class Features(Recording):
    """The last hidden states themselves, in the precision that the model computed in."""

    def features(self, rows: Sequence[int], device: Any) -> Tensor:
        """(N, H) float32 of the learned tokens of these rows, row after row."""
        return self.read("features", "features", rows).to(device).float()

    def apart(self, rows: Sequence[int], hidden: Tensor, head: Head | None) -> Tensor:
        """(N, H) distance of hidden states of these rows from what is kept."""
        return (hidden.float() - self.features(rows, hidden.device)).abs()


class TopK(Recording):
    """The k most likely next tokens and their log-probabilities."""

    @cached_property
    def _temperature(self) -> float:
        return float(self.about.get("temperature", 1.0))

    def top_k(self, rows: Sequence[int], device: Any) -> tuple[Tensor, Tensor]:
        """(N, k) int64 token ids and (N, k) float32 log-probabilities of the learned tokens of these rows."""
        tokens, log_probs = (self.read("top_k", name, rows).to(device) for name in ("tokens", "log_probs"))
        return tokens.long(), log_probs

    def apart(self, rows: Sequence[int], hidden: Tensor, head: Head | None) -> Tensor:
        """(N, 1) divergence of the distributions that hidden states of these rows give, at the kept temperature."""
        assert head is not None
        tokens, log_probs = self.top_k(rows, hidden.device)
        mine = log_probs_of(head, hidden, tokens, self._temperature)
        return top_k_divergence(mine, log_probs).unsqueeze(1)


class Answers(Recording):
    """How likely every row's answer is."""

    def summed(self, rows: Sequence[int], device: Any) -> Tensor:
        """(N,) float32: the sum of the log-probabilities of each row's learned tokens."""
        return self.read("answers", "summed", rows).to(device)


def record_regions(recorder: Recorder, about: dict[str, Any], passes: int = 2, **how: Any) -> Regions:
    """Record the rows' regions; `how` as `record` takes it.

    Thresholds need the statistics of all tokens first: two passes over the rows, or one pass that keeps the
    activations in scratch files for the while, as the model computed them (`scratch_bytes`).
    """

    def twice(at: Recorder) -> None:
        at.each("moments", lambda part: _moments(list(at.hidden(part))))
        _classify(at, "moments", at.hidden)

    def once(at: Recorder) -> None:
        at.each("features", lambda part: _features(values := list(at.hidden(part))) | _moments(values))
        kept = Features(at.folder)
        _classify(at, "features", lambda part: (kept.features([row], at.model.device) for row in part))

    record(recorder, about, once if passes == 1 else twice, scratch=("moments", "features"), **how)
    return Regions(recorder.folder)


def record_features(recorder: Recorder, about: dict[str, Any], **how: Any) -> Features:
    """Record the rows' last hidden states, in one pass; `how` as `record` takes it."""
    record(recorder, about, lambda at: at.each("features", lambda part: _features(list(at.hidden(part)))), **how)
    return Features(recorder.folder)


def record_top_k(recorder: Recorder, about: dict[str, Any], k: int, temperature: float = 1.0, **how: Any) -> TopK:
    """Record the k most likely next tokens at every learned token, in one pass; `how` as `record` takes it.

    temperature: divides the logits; of another temperature the k tokens alone could not tell the rest's share.
    """
    record(recorder, about, lambda at: at.each("top_k", lambda part: _top_k(at.logits(part), k, temperature)), **how)
    return TopK(recorder.folder)


def record_answers(recorder: Recorder, about: dict[str, Any], **how: Any) -> Answers:
    """Record how likely every row's learned tokens are, in one pass; `how` as `record` takes it."""
    record(recorder, about, lambda at: at.each("answers", lambda part: _answers(at, part)), **how)
    return Answers(recorder.folder)


def scratch_bytes(rows: Any, model: Any) -> int:
    """What one pass keeps for the while: an entry for every learned token and hidden dimension."""
    tokens = sum(label != IGNORED for labels in rows["labels"] for label in labels[1:])
    return int(tokens * model.config.get_text_config().hidden_size * model.dtype.itemsize)


def _answers(at: Recorder, part: Sequence[int]) -> dict[str, Tensor]:
    """A sum for each row: in the form of other recordings, with one value a row."""
    sums = []
    for row, logits in zip(part, at.logits(part), strict=True):
        labels = torch.tensor([label for label in at.rows[row]["labels"][1:] if label != IGNORED], device=logits.device)
        sums.append(logits.float().log_softmax(1).gather(1, labels[:, None]).sum().cpu())
    return {"summed": torch.stack(sums), "offsets": torch.arange(len(sums) + 1)}


def _moments(values: Sequence[Tensor]) -> dict[str, Tensor]:
    made = Moments.of(values[0].shape[1])
    for hidden in values:
        made.add(hidden.cpu())
    largest = torch.stack([hidden.float().abs().amax(0).cpu() for hidden in values if len(hidden)]).amax(0)
    return {"count": torch.tensor(made.count), "total": made.total, "squares": made.squares, "largest": largest}


def _features(values: Sequence[Tensor]) -> dict[str, Tensor]:
    return {"features": torch.cat(list(values)).cpu(), "offsets": offsets(values)}


def _top_k(logits: Iterable[Tensor], k: int, temperature: float) -> dict[str, Tensor]:
    likely = [(one.float() / temperature).log_softmax(1).topk(min(k, one.shape[1])) for one in logits]
    tokens, log_probs = torch.cat([one.indices for one in likely]), torch.cat([one.values for one in likely])
    return {
        "tokens": tokens.int().cpu(),
        "log_probs": log_probs.cpu(),
        "offsets": offsets([one.values for one in likely]),
    }


def _classify(at: Recorder, moments: str, read: Callable[[range], Iterable[Tensor]]) -> None:
    """Thresholds from the moments of all parts, then each part's regions."""
    at.once("thresholds", lambda: _thresholds(at, moments))
    low, high, _ = Regions(at.folder).thresholds(at.model.device)
    at.each("regions", lambda part: _regions([regions(one.float(), low, high) for one in read(part)]))


def _thresholds(at: Recorder, moments: str) -> dict[str, Tensor]:
    """Thresholds, and the noise: what other batches of the same rows differ by."""
    files = [at.folder / f"{moments}-{number:05d}.safetensors" for number in range(at.parts)]
    kept = [_some(file, MOMENTS) for file in files]
    count = sum(int(one["count"]) for one in kept)
    total, squares = (torch.stack([one[name] for one in kept]).sum(0) for name in ("total", "squares"))
    low, high = Moments(count, total, squares).thresholds()
    largest = torch.stack([one["largest"] for one in kept]).amax(0)
    sample = range(min(SAMPLE, len(at.rows)))
    seen = torch.zeros_like(largest)
    for once, again in zip(at.hidden(sample), at.hidden(sample, at_once=3, pad=5), strict=True):
        seen = torch.maximum(seen, (once.float() - again.float()).abs().amax(0).cpu())
    return {"low": low, "high": high, "noise": SAFETY * seen + ROUNDING * largest}


def _some(file: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Tensors of a file that holds more."""
    with safe_open(file, "pt") as read:
        return {name: read.get_tensor(name) for name in names}


def _regions(codes: Sequence[Tensor]) -> dict[str, Tensor]:
    return {"regions": torch.cat([pack(one) for one in codes]).cpu(), "offsets": offsets(codes)}
