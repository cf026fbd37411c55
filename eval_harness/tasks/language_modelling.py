"""Language modelling: bits per byte of plain text, and the bytes that the tokenizer loses.

WikiText is scored as it is stored, blanks around punctuation included; lm-evaluation-harness removes them before
scoring and divides by the bytes from before, so its figure is lower: `lm_eval: wikitext` gives that one.
"""

from __future__ import annotations

from typing import Any

from eval_harness.tasks import Raw, Task

MEASURES = ("bits_per_byte", "lost_bytes_share")
WITH_TEST = {"train": "train", "validation": "validation", "test": "test"}


def page(raw: Raw) -> dict[str, Any]:
    """{page}: a whole article."""
    return {"text": raw["page"].strip()}


def story(raw: Raw) -> dict[str, Any]:
    """{text}."""
    return {"text": raw["text"].strip()}


TASKS: dict[str, Task] = {
    "wikitext2": Task(
        "articles of Wikipedia, one a row",
        "EleutherAI/wikitext_document_level", "CC-BY-SA-3.0", "Merity et al. 2017, arXiv 1609.07843", 62, page,
        MEASURES, config="wikitext-2-raw-v1", splits=WITH_TEST,
    ),
    "tinystories": Task(
        "short stories in the words of a small child",
        "roneneldan/TinyStories", "CDLA-Sharing-1.0", "Eldan and Li 2023, arXiv 2305.07759", 21990, story, MEASURES,
        splits={"train": "train", "test": "validation"},
    ),
}  # fmt: skip
