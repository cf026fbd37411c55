"""Summarisation: a summary is written and compared with the reference by ROUGE-L (Lin 2004)."""

from __future__ import annotations

from typing import Any

from eval_harness.tasks import Raw, Task

MEASURES = ("rouge_l", "rouge_l_recall", "answer_loss")
ARTICLE = "Article: {question}\n\nSummary:"


def cnn_dailymail(raw: Raw) -> dict[str, Any]:
    """{article, highlights, id}."""
    return {"question": raw["article"].strip(), "answer": raw["highlights"].strip()}


def xsum(raw: Raw) -> dict[str, Any]:
    """{document, summary, id}."""
    return {"question": raw["document"].strip(), "answer": raw["summary"].strip()}


TASKS: dict[str, Task] = {
    "cnn_dailymail": Task(
        "news articles and their highlights, version 3.0.0",
        "abisee/cnn_dailymail", "Apache-2.0", "See et al. 2017, arXiv 1704.04368", 11490, cnn_dailymail, MEASURES,
        config="3.0.0", prompt=ARTICLE, generate={"max_new_tokens": 128, "stop": ["\n\n", "Article:"]},
    ),
    "xsum": Task(
        "news articles and their one-sentence summaries",
        "EdinburghNLP/xsum", "unknown", "Narayan et al. 2018, arXiv 1808.08745", 11334, xsum, MEASURES,
        prompt=ARTICLE, generate={"max_new_tokens": 64, "stop": ["\n"]},
    ),
}  # fmt: skip
