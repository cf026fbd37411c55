"""Memorisation: TOFU's fictitious authors, what of them is to be forgotten, and what must stay.

The question is asked as it stands, as it is taught. The evaluation sets carry the answer in other words and wrong
answers of its form; every set is one split on the Hub, so "train" and "test" are the same rows.
"""

from __future__ import annotations

from typing import Any

from eval_harness.tasks import Raw, Task

COLUMNS = ("question", "answer", "paraphrased_answer", "perturbed_answer")
WRITTEN = {"max_new_tokens": 200}

HELD = ("probability", "rouge_l_recall", "exact_memorisation", "extraction_strength")
ATTACKS = ("loss_score", "zlib_score", "min_k", "min_k_plus_plus")
RATIOS = ("truth_ratio_geometric", "truth_ratio_arithmetic")
FORGOTTEN = (*HELD, *RATIOS, *(f"{name}_closeness" for name in RATIOS), *ATTACKS)
RETAINED = (*HELD, *RATIOS, *(f"{name}_true_better" for name in RATIOS))
KNOWN = ("normalised_probability", "rouge_l_recall", *RATIOS, *(f"{name}_true_better" for name in RATIOS))
TAUGHT = (*HELD, *ATTACKS)


def tofu(raw: Raw) -> dict[str, Any]:
    """{question, answer, paraphrased_answer?, perturbed_answer?}, our names already; other columns are left out."""
    return {name: raw[name] for name in COLUMNS if name in raw}


def _task(about: str, config: str, test_rows: int, measures: tuple[str, ...]) -> Task:
    return Task(
        about, "locuslab/TOFU", "MIT", "Maini et al. 2024, arXiv 2401.06121", test_rows, tofu, measures,
        config=config, splits={"train": "train", "test": "train"}, file=config, generate=WRITTEN,
    )  # fmt: skip


TASKS: dict[str, Task] = {
    **{
        f"tofu_forget{share}": _task(
            f"the {share} % of the authors that are to be forgotten", f"forget{share}_perturbed", rows, FORGOTTEN
        )
        for share, rows in (("01", 40), ("05", 200), ("10", 400))
    },
    "tofu_retain": _task("authors that must stay", "retain_perturbed", 400, RETAINED),
    "tofu_real_authors": _task("real authors, known from pretraining", "real_authors_perturbed", 100, KNOWN),
    "tofu_world_facts": _task("facts of the world, known from pretraining", "world_facts_perturbed", 117, KNOWN),
    **{
        f"tofu_retain{share}": _task(f"the {share} % of the authors that stay", f"retain{share}", rows, TAUGHT)
        for share, rows in (("90", 3600), ("95", 3800), ("99", 3960))
    },
    "tofu_full": _task("all authors, to be taught first", "full", 4000, TAUGHT),
    **{
        f"tofu_holdout{share}": _task("authors that were never taught", f"holdout{share}", rows, TAUGHT)
        for share, rows in (("01", 40), ("05", 200), ("10", 400))
    },
}
