"""Cloze: the one word, or few, that complete a text. No chat template: a text is continued, nobody is asked."""

from __future__ import annotations

from typing import Any

from eval_harness.tasks import Raw, Task

MEASURES = ("cloze_accuracy", "cloze_perplexity")


def last_word(raw: Raw) -> dict[str, Any]:
    """{text}: its last word is the answer."""
    before, _, word = raw["text"].strip().rpartition(" ")
    return {"question": before, "answer": word}


def completed(raw: Raw) -> dict[str, Any]:
    """{inputs, targets: [...]} of BIG-bench: the first target is the answer."""
    return {"question": raw["inputs"].strip(), "answer": raw["targets"][0].strip()}


TASKS: dict[str, Task] = {
    "lambada": Task(
        "the last word of a passage that only the whole passage tells",
        "EleutherAI/lambada_openai", "CC-BY-4.0", "Paperno et al. 2016, arXiv 1606.06031", 5153, last_word, MEASURES,
        config="default", splits={"test": "test"}, chat_template="none",
    ),
    "wikidata_facts": Task(
        "the object of a fact of Wikidata; of BIG-bench, never to be trained on",
        "hails/bigbench", "Apache-2.0", "Srivastava et al. 2022, arXiv 2206.04615", 20321, completed, MEASURES,
        config="qa_wikidata_zero_shot", splits={"test": "default"}, chat_template="none",
    ),
}  # fmt: skip
