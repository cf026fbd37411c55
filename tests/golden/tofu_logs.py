"""Per-item numbers of TOFU's published evaluation logs; tofu/NOTICE has their source and licence.

    python -m tests.golden.tofu_logs FOLDER     write tofu/*.json again, from a folder of the full logs

A file has, per set and in the log's order of items:

    answer           mean loss of the answer, nats per token (end token included)
    paraphrase       the same of the paraphrased answer; of real_authors and world_facts the answer, scored again
    perturbed        per item, of each wrong answer
    rouge_l_recall   of the greedy continuation
    truth_ratio      the geometric one as logged; of the forget set, in place of the losses it comes from

The forget set of retain95 and retain99 is another one (200 and 40 items); no figure needs it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "tofu"
COMMIT = "bdc209ea7c6cc2e7079ea1afb6468d3ddcc65f8e"
LOGS = {
    "llama2-7b_full": "ft_epoch5_lr1e-05_llama2-7b_full_wd0.01",
    "llama2-7b_retain90": "ft_epoch5_lr1e-05_llama2-7b_retain90_wd0.01",
    "llama2-7b_retain95": "ft_epoch5_lr1e-05_llama2-7b_retain95_wd0.01",
    "llama2-7b_retain99": "ft_epoch5_lr1e-05_llama2-7b_retain99_wd0.01",
    "phi_full": "ft_epoch5_lr2e-05_phi_full_wd0.01",
    "phi_retain90": "ft_epoch5_lr2e-05_phi_retain90_wd0.01",
}
SETS = {
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}


def read(name: str) -> dict[str, Any]:
    """A golden file."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def read_log(folder: Path, name: str) -> dict[str, Any]:
    """A log as published."""
    return json.loads((folder / f"{name}_wd0.01_eval_log_aggregated.json").read_text(encoding="utf-8"))


def trimmed(name: str, log: dict[str, Any]) -> dict[str, Any]:
    """What a golden file keeps of a log."""
    path = f"data/{LOGS[name]}/eval_results/ds_size300/eval_log_aggregated.json"
    kept: dict[str, Any] = {"source": f"https://github.com/locuslab/tofu/blob/{COMMIT}/{path}", "licence": "MIT"}
    for one, task in SETS.items():
        if one != "forget":
            kept[one] = kept_set(log[task])
        elif name.endswith(("full", "retain90")):
            kept[one] = forget_set(log[task])
    return kept


def kept_set(task: dict[str, Any]) -> dict[str, Any]:
    return {
        "answer": rounded(task["avg_gt_loss"].values()),
        "paraphrase": rounded(task["avg_paraphrased_loss"].values()),
        "perturbed": [rounded(losses) for losses in task["average_perturb_loss"].values()],
        "rouge_l_recall": rounded(task["rougeL_recall"].values()),
    }


def forget_set(task: dict[str, Any]) -> dict[str, Any]:
    return {
        "answer": rounded(task["avg_gt_loss"].values()),
        "truth_ratio": rounded(task["truth_ratio"].values()),
        "rouge_l_recall": rounded(task["rougeL_recall"].values()),
    }


def rounded(values: Iterable[float]) -> list[float]:
    """To six significant digits."""
    return [float(f"{value:.6g}") for value in values]


def written(content: dict[str, Any]) -> str:
    """JSON with a line per column."""

    def columns(one: Any) -> str:
        if not isinstance(one, dict):
            return json.dumps(one)
        inner = (f"  {json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in one.items())
        return "{\n" + ",\n".join(inner) + "\n }"

    return "{\n" + ",\n".join(f" {json.dumps(key)}: {columns(value)}" for key, value in content.items()) + "\n}\n"


if __name__ == "__main__":
    for one in LOGS:
        (HERE / f"{one}.json").write_text(written(trimmed(one, read_log(Path(sys.argv[1]), one))), encoding="utf-8")
