"""Was this text trained on? Scores of one text, the area under their ROC curve, and PrivLeak.

One direction for every score: LOW means "seen in training", as a loss is low there. Token log-probabilities are in
nats, one per token of the text, in order; an empty text has no score, which is None and never 0 (a score of 0 would
be the most member-like of all).

Two directions for the area, and each has its name. `Auc.value` is the attack's success: P(a member scores lower), 1
where every member is recognised, as the membership literature has it. `Auc.muse` = 1 - value is MUSE's: P(a member
scores higher), near 0 for a memorised forget set. PrivLeak is defined on the second.

Sources: Yeom et al. 2018 (arXiv 1709.01604: LOSS), Carlini et al. 2021 (arXiv 2012.07805: zlib, reference), Shi et
al. 2024 (arXiv 2310.16789: Min-K%), Zhang et al. 2024 (arXiv 2404.02936: Min-K%++), Shi et al. 2025 (arXiv 2407.06460:
MUSE, PrivLeak).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from zlib import compress

LogProbs = Sequence[float]

K = 0.4  # share of tokens; MUSE's
MIN_VARIANCE = 1e-6  # nats squared: a distribution on one token has none
ROUNDING = 1e-3  # above 0, in nats: what half-precision kernels leave of log 1

NEWCOMBE = "score interval of Newcombe 2006 (method 5) on the variance of Hanley and McNeil 1982"


@dataclass(frozen=True, slots=True)
class Auc:
    """Area under the ROC curve of a membership score.

    value        P(member scores lower than non-member) + 1/2 P(tie): the attack's success, .5 for none
    members, nonmembers   how many of each
    stderr       standard error; None where it is not known: at areas 0 and 1, and of one text a side
    low, high    interval of `level`; None for one text on each side, of which nothing follows
    method       of the interval
    """

    value: float
    members: int
    nonmembers: int
    stderr: float | None
    low: float | None
    high: float | None
    level: float
    method: str = NEWCOMBE

    @property
    def muse(self) -> float:
        """P(member scores higher): MUSE's direction, near 0 for a memorised forget set."""
        return 1 - self.value


@dataclass(frozen=True, slots=True)
class PrivLeak:
    """PrivLeak in per cent, with the two areas in MUSE's direction that it is made of.

    value           0: like the reference. Negative: members still recognised (under-unlearning), -100 at its lowest.
                    Positive: members less likely than unseen text (over-unlearning), without a bound: read the areas
    auc             P(forget scores higher than holdout) of the model
    auc_reference   the same of a model that never saw the forget set
    reason          why the value is None
    """

    value: float | None
    auc: float
    auc_reference: float
    reason: str | None = None


# ---- scores of one text ------------------------------------------------------------------------------


def loss(log_probs: LogProbs) -> float | None:
    """-1/n sum log p, in nats per token (LOSS); None for an empty text.

    Raises:
        ValueError: a log-probability is NaN or above 0.
    """
    _check(log_probs, "log_probs")
    return -math.fsum(log_probs) / len(log_probs) if len(log_probs) else None


def zlib(log_probs: LogProbs, text: str) -> float | None:
    """`loss` over the bytes of the UTF-8 text after zlib at its default level: what is likely beyond being regular.

    The mean loss, as MUSE and open-unlearning have it, and not the sum.

    Args:
        log_probs: nats per token of `text`.
        text: the text itself; the compressed form of any text has at least 8 bytes.

    Raises:
        ValueError: a log-probability is NaN or above 0.
    """
    mean = loss(log_probs)
    return None if mean is None else mean / len(compress(text.encode("utf-8", "surrogatepass")))


def min_k(log_probs: LogProbs, k: float = K) -> float | None:
    """Minus the mean of the max(1, int(k n)) lowest log-probabilities, in nats (Min-K%); None for an empty text.

    Args:
        log_probs: nats per token.
        k: share of the tokens, above 0 and at most 1. The number of tokens is rounded down, and so k n is computed in
            floating point: .29 of 100 tokens are 28.

    Raises:
        ValueError: k is out of range, or a log-probability is NaN or above 0.
    """
    _check(log_probs, "log_probs")
    return _mean_of_lowest(log_probs, k)


def min_k_plus_plus(
    log_probs: LogProbs, means: Sequence[float], variances: Sequence[float], k: float = K
) -> float | None:
    """Min-K% of z_t = (log p(x_t) - mu_t) / sigma_t (Min-K%++); None for an empty text.

    mu_t = sum_v p(v) log p(v), sigma_t^2 = sum_v p(v) (log p(v))^2 - mu_t^2, of the distribution at the position of
    token t; sigma_t^2 is raised to 1e-6 where it is below (rounding can take it under 0).

    Args:
        log_probs: nats per token.
        means: mu_t, nats.
        variances: sigma_t^2, nats squared.
        k: share of the tokens, as in `min_k`.

    Raises:
        ValueError: unlike lengths, k out of range, NaN, or a log-probability above 0.
    """
    if not len(log_probs) == len(means) == len(variances):
        raise ValueError(
            f"{len(log_probs)} log-probabilities, {len(means)} means, {len(variances)} variances: "
            "must be one of each per token (score with statistics)"
        )
    _check(log_probs, "log_probs")
    _check(means, "means")  # minus an entropy
    for position, variance in enumerate(variances):
        if math.isnan(variance):
            raise ValueError(f"variances[{position}] is NaN: must be a number of nats squared")
    pairs = zip(log_probs, means, variances, strict=True)
    z = [(log_p - mean) / math.sqrt(max(variance, MIN_VARIANCE)) for log_p, mean, variance in pairs]
    return _mean_of_lowest(z, k)


def reference_ratio(log_probs: LogProbs, reference_log_probs: LogProbs) -> float | None:
    """loss - loss of a reference model on the same tokens: log of the ratio of perplexities, in nats per token.

    Args:
        log_probs: nats per token.
        reference_log_probs: the same tokens under the reference.

    Returns:
        None for an empty text, or where both losses are infinite.

    Raises:
        ValueError: unlike lengths (another tokenizer: means per token do not compare), NaN, or above 0.
    """
    if len(log_probs) != len(reference_log_probs):
        raise ValueError(
            f"{len(log_probs)} tokens, {len(reference_log_probs)} under the reference: must be the same tokens; "
            "take a reference with the same tokenizer"
        )
    own, other = loss(log_probs), loss(reference_log_probs)
    if own is None or other is None or own == other == math.inf:
        return None
    return own - other


# ---- over two sets of texts --------------------------------------------------------------------------


def auc(members: Sequence[float], nonmembers: Sequence[float], *, level: float = 0.95) -> Auc | None:
    """P(member scores lower) + 1/2 P(tie), over all pairs, by ranks: the Mann-Whitney statistic over m n.

    The interval needs no resampling: all areas theta that are within z standard errors of the estimate, the standard
    error being theta's own, so that it stays in [0, 1] and has a width at areas 0 and 1 (Newcombe 2006, method 5). The
    variance is that of exponential scores (Hanley and McNeil 1982), both sides' sizes averaged; where one side spreads
    three times as far, 95 % intervals were seen to cover 90 to 95 % of the time at equal sizes, and always at 10 to
    200. Texts are taken as independent. Cost O((m + n) log n).

    Args:
        members: scores of this module (low: member) of texts trained on; inf is allowed.
        nonmembers: the same of texts of the same kind that were not. A shift of topic or date between the two shows
            as "membership": compare with the area of a model that saw neither.
        level: of the interval, between 0 and 1.

    Returns:
        None where a side is empty.

    Raises:
        ValueError: a score is NaN, or the level is out of range.
    """
    if not 0 < level < 1:
        raise ValueError(f"level = {level}: must be between 0 and 1")
    for name, scores in (("members", members), ("nonmembers", nonmembers)):
        for position, score in enumerate(scores):
            if math.isnan(score):
                raise ValueError(f"{name}[{position}] is NaN: leave texts without a score out, and count them")
    m, n = len(members), len(nonmembers)
    if not m or not n:
        return None
    ranked = sorted(nonmembers)
    halves = sum(2 * n - bisect_left(ranked, one) - bisect_right(ranked, one) for one in members)
    value = halves / (2 * m * n)
    if m == n == 1:
        return Auc(value, 1, 1, None, None, None, level)
    low, high = _interval(value, m, n, NormalDist().inv_cdf((1 + level) / 2))
    stderr = math.sqrt(_variance(value, m, n)) if 0 < value < 1 else None
    return Auc(value, m, n, stderr, low, high, level)


def privleak(area: Auc | float, reference: Auc | float) -> PrivLeak:
    """100 (AUC - AUC_ref) / AUC_ref, areas in MUSE's direction, of forget set against holdout.

    Args:
        area: of the unlearned model. An `Auc` turns itself; a bare number is read as MUSE publishes it, P(forget
            scores higher than holdout).
        reference: the same of a model retrained without the forget set (MUSE: .4772 on News, .5393 on Books). Codes
            that take .5 where they have no such model report another quantity.

    Returns:
        PrivLeak; its value is None where the reference's area is 0. A small reference area inflates it.

    Raises:
        ValueError: an area outside [0, 1].
    """
    own, other = (one.muse if isinstance(one, Auc) else float(one) for one in (area, reference))
    for name, value in (("area", own), ("reference", other)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} = {value}: must be an area from 0 to 1 (not in per cent)")
    if other == 0:
        return PrivLeak(None, own, other, "the reference's area is 0: nothing is relative to it; compare the areas")
    return PrivLeak(100 * (own - other) / other, own, other)


# ---- what they stand on ------------------------------------------------------------------------------


def _check(log_probs: Sequence[float], name: str) -> None:
    for position, value in enumerate(log_probs):
        if not value <= ROUNDING:  # NaN too
            raise ValueError(
                f"{name}[{position}] = {value}: must be nats, at most 0 "
                "(a loss has the opposite sign; a NaN comes from NaN logits)"
            )


def _mean_of_lowest(values: Sequence[float], k: float) -> float | None:
    if not 0 < k <= 1:
        raise ValueError(f"k = {k}: must be a share of the tokens, above 0 and at most 1 (0.4 in MUSE)")
    if not len(values):
        return None
    lowest = sorted(values)[: max(1, int(k * len(values)))]
    return -math.fsum(lowest) / len(lowest)


def _variance(area: float, m: int, n: int) -> float:
    star = (m + n) / 2 - 1
    spread = 1 + star * (1 - area) / (2 - area) + star * area / (1 + area)
    return area * (1 - area) * spread / (m * n)


def _interval(value: float, m: int, n: int, z: float) -> tuple[float, float]:
    """The two areas whose own standard error is 1/z of their distance to the estimate."""

    def end(outside: float) -> float:
        inside = value
        for _ in range(60):
            middle = (inside + outside) / 2
            if (middle - value) ** 2 > z * z * _variance(middle, m, n):
                outside = middle
            else:
                inside = middle
        return inside

    return end(0.0), end(1.0)
