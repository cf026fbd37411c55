"""Our figures from the per-item numbers of TOFU's published logs, to the digits that are known of them.

A log keeps an answer's mean loss, not its tokens: an answer of one token with that loss has the same mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from scipy.stats import ks_2samp

from eval_harness.metrics import forgetting as f
from tests.golden import tofu_logs

RATIOS = {"geometric": f.truth_ratio_geometric, "arithmetic": f.truth_ratio_arithmetic}


@cache
def golden(name: str) -> dict[str, Any]:
    return tofu_logs.read(name)


def rows(one: dict[str, Any]) -> Iterator[tuple[list[float], list[float], list[list[float]]]]:
    """(answer, paraphrase, wrong answers), each as log-probabilities."""
    for answer, paraphrase, wrong in zip(one["answer"], one["paraphrase"], one["perturbed"], strict=True):
        yield [-answer], [-paraphrase], [[-loss] for loss in wrong]


def scores(name: str, ratio: str) -> dict[str, dict[str, float | None]]:
    found: dict[str, dict[str, float | None]] = {}
    for one in f.UTILITY_SETS:
        items = list(rows(golden(name)[one]))
        if one == "retain":
            likely = [f.probability(answer) for answer, _, _ in items]
        else:
            likely = [f.choice_probability(answer, wrong) for answer, _, wrong in items]
        ratios = [RATIOS[ratio](paraphrase, wrong) for _, paraphrase, wrong in items]
        found[one] = {
            "probability": fmean(likely),
            "rouge_l_recall": fmean(golden(name)[one]["rouge_l_recall"]),
            "truth_ratio": f.aggregate(ratios, "true_better").value,
        }
    return found


@pytest.mark.parametrize(
    ("name", "ratio", "utility"),
    [
        ("llama2-7b_full", "geometric", 0.6227),
        ("llama2-7b_retain90", "geometric", 0.6137),
        ("llama2-7b_retain95", "geometric", 0.6006),
        ("llama2-7b_retain99", "geometric", 0.6207),
        ("phi_full", "geometric", 0.5221),
        ("phi_retain90", "geometric", 0.5320),
        ("llama2-7b_full", "arithmetic", 0.5859),
        ("llama2-7b_retain90", "arithmetic", 0.5752),
        ("llama2-7b_retain95", "arithmetic", 0.5613),
        ("llama2-7b_retain99", "arithmetic", 0.5812),
        ("phi_full", "arithmetic", 0.5034),
        ("phi_retain90", "arithmetic", 0.5130),
    ],
)
def test_model_utility(name: str, ratio: Any, utility: float) -> None:
    summary = f.model_utility(scores(name, ratio), truth_ratio=ratio)
    assert summary.value is not None
    assert round(summary.value, 4) == utility
    assert (summary.n, summary.reason) == (9, None)
    assert ratio in summary.formula


@pytest.mark.parametrize(
    ("model", "distance", "p", "asymptotic"),
    [("llama2-7b", 0.396667, 1.834066e-21, 8.4967e-22), ("phi", 0.346667, 2.194274e-16, 1.3080e-16)],
)
def test_forget_quality_of_the_full_model(model: str, distance: float, p: float, asymptotic: float) -> None:
    full, retain = (golden(f"{model}_{of}")["forget"]["truth_ratio"] for of in ("full", "retain90"))
    quality = f.forget_quality(full, retain)
    assert quality.statistic == pytest.approx(distance, abs=5e-7)
    assert math.isclose(quality.p or 0, p, rel_tol=1e-6)  # approx would allow 1e-12 either way: more than p
    assert (quality.n, quality.n_ref, quality.left_out, quality.method) == (300, 300, 0, "exact")
    assert f.forget_quality([1 / r for r in full], [1 / r for r in retain]).p == quality.p
    assert math.isclose(ks_2samp(full, retain, method="asymp").pvalue, asymptotic, rel_tol=1e-4)


@pytest.mark.parametrize(
    ("name", "probability", "rouge", "closeness"),
    [("llama2-7b_full", 0.9909, 0.9854, 0.5160), ("llama2-7b_retain90", 0.1476, 0.4082, 0.6740)],
)
def test_forget_set(name: str, probability: float, rouge: float, closeness: float) -> None:
    forget = golden(name)["forget"]
    assert round(fmean(f.probability([-loss]) for loss in forget["answer"]), 4) == probability
    assert round(fmean(forget["rouge_l_recall"]), 4) == rouge
    summary = f.aggregate(forget["truth_ratio"], "closeness")
    assert summary.value is not None
    assert round(summary.value, 4) == closeness
    assert (summary.n, summary.left_out) == (300, 0)


def test_sizes() -> None:
    for name in tofu_logs.LOGS:
        sizes = {one: len(golden(name)[one]["answer"]) for one in f.UTILITY_SETS}
        assert sizes == {"retain": 300, "real_authors": 100, "world_facts": 117}


@pytest.mark.shared
@pytest.mark.parametrize("name", tofu_logs.LOGS)
def test_the_files_are_what_the_logs_say(shared: Path, name: str) -> None:
    log = tofu_logs.read_log(shared / "data" / "unlearning" / "tofu_eval_logs", name)
    assert golden(name) == tofu_logs.trimmed(name, log)
    # What the logs call truth_ratio is the geometric one, in every set: their losses are in single precision.
    for task in tofu_logs.SETS.values():
        of = log[task]
        for item, logged in of["truth_ratio"].items():
            wrong = [[-loss] for loss in of["average_perturb_loss"][item]]
            ours = f.truth_ratio_geometric([-of["avg_paraphrased_loss"][item]], wrong)
            assert math.isclose(ours, logged, rel_tol=2e-6)
