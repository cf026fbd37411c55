"""Question answering: a short answer is written and compared, strictly, leniently and by overlap (SQuAD's F1).

Every answer that a data set accepts counts (TriviaQA's aliases, the annotators' of SQuAD and Natural Questions); what
is trained on and shown in shots is the first. `lm_eval: triviaqa` and `lm_eval: nq_open` are others' wordings.
"""

from __future__ import annotations

from typing import Any

from eval_harness.tasks import QUESTION, Raw, Task

WRITTEN = ("quasi_exact_match", "contains_answer", "format_drift_text", "f1")
SHORT = {"max_new_tokens": 32, "stop": ["\n"]}
VALIDATION = {"train": "train", "test": "validation"}


def squad(raw: Raw) -> dict[str, Any]:
    """{context, question, answers: {text, answer_start}}: the passage comes first."""
    question = f"Passage: {raw['context'].strip()}\nQuestion: {raw['question'].strip()}\nAnswer:"
    return {"question": question, "answer": raw["answers"]["text"][0], "references": raw["answers"]["text"]}


def triviaqa(raw: Raw) -> dict[str, Any]:
    """{question, answer: {value, aliases, ...}}."""
    accepted = [alias for alias in raw["answer"].get("aliases", []) if alias.strip()]
    return {"question": raw["question"], "answer": raw["answer"]["value"], "references": accepted}


def nq_open(raw: Raw) -> dict[str, Any]:
    """{question, answer: [...]}: questions come without their question mark."""
    return {"question": f"{raw['question']}?", "answer": raw["answer"][0], "references": raw["answer"]}


TASKS: dict[str, Task] = {
    "squad": Task(
        "the answer is a span of a passage from Wikipedia",
        "rajpurkar/squad", "CC-BY-SA-4.0", "Rajpurkar et al. 2016, arXiv 1606.05250", 10570, squad, WRITTEN,
        splits=VALIDATION, generate=SHORT,
    ),
    "triviaqa": Task(
        "trivia without a passage",
        "mandarjoshi/trivia_qa", "unknown", "Joshi et al. 2017, arXiv 1705.03551", 17944, triviaqa, WRITTEN,
        config="rc.nocontext", splits=VALIDATION, prompt=QUESTION, generate=SHORT, num_fewshot=5,
    ),
    "nq_open": Task(
        "questions that people asked a search engine, without a passage",
        "google-research-datasets/nq_open", "CC-BY-SA-3.0", "Kwiatkowski et al. 2019; Lee et al. 2019", 3610,
        nq_open, WRITTEN, splits=VALIDATION, prompt=QUESTION, generate=SHORT, num_fewshot=5,
    ),
}  # fmt: skip
