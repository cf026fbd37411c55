"""Multiple choice: which of the given answers is the most likely continuation of the question.

Two ways to ask, as published: the answers' own text is scored (ARC, HellaSwag, ...), or they are listed in the question
and their letter is scored (MMLU, CommonsenseQA). Wording and splits are those of lm-evaluation-harness; TruthfulQA is
asked without its six introductory questions. WinoGrande is not here: it is scored by one continuation under two
contexts, which a row of one prompt and several choices cannot say; `lm_eval: winogrande` in a suite measures it.
"""

from __future__ import annotations

import re
from random import Random
from typing import Any

from eval_harness.tasks import QUESTION, Raw, Task

VALIDATION = {"train": "train", "test": "validation"}
WITH_TEST = {"train": "train", "validation": "validation", "test": "test"}
BY_TEXT = ("acc", "acc_norm")
BY_LETTER = ("acc", "exact_match", "format_drift")


def labelled(raw: Raw) -> dict[str, Any]:
    """ARC and CommonsenseQA: {question, choices: {text, label}, answerKey}; some ARC rows have labels 1 to 4."""
    choices = raw["choices"]
    index = choices["label"].index(raw["answerKey"].strip())
    return {"question": raw["question"], "choices": choices["text"], "answer_index": index}


def openbookqa(raw: Raw) -> dict[str, Any]:
    """As ARC, with `question_stem`."""
    return labelled({**raw, "question": raw["question_stem"]})


def hellaswag(raw: Raw) -> dict[str, Any]:
    """{activity_label, ctx_a, ctx_b, endings, label}: the activity and the context are continued by an ending."""
    context = f"{raw['activity_label']}: {raw['ctx_a']} {raw['ctx_b'].capitalize()}"
    endings = [_without_brackets(one) for one in raw["endings"]]
    return {"question": _without_brackets(context), "choices": endings, "answer_index": int(raw["label"])}


def _without_brackets(text: str) -> str:
    """Rows from WikiHow hold marks such as [title] and [step]."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def piqa(raw: Raw) -> dict[str, Any]:
    """{goal, sol1, sol2, label}."""
    return {"question": raw["goal"], "choices": [raw["sol1"], raw["sol2"]], "answer_index": int(raw["label"])}


def mmlu(raw: Raw) -> dict[str, Any]:
    """{question, choices, answer, subject}."""
    named = {"question": raw["question"], "choices": raw["choices"], "answer_index": int(raw["answer"])}
    return named | {"subject": raw["subject"]}


def truthfulqa(raw: Raw) -> dict[str, Any]:
    """{question, mc1_targets: {choices, labels}}: the right one is always listed first, and a tie goes to the first
    listed, so they are put in an order that the question's text decides."""
    targets = raw["mc1_targets"]
    order = list(range(len(targets["choices"])))
    Random(raw["question"]).shuffle(order)
    choices = [targets["choices"][at] for at in order]
    return {"question": raw["question"], "choices": choices, "answer_index": order.index(targets["labels"].index(1))}


def sciq(raw: Raw) -> dict[str, Any]:
    """{support, question, distractor1..3, correct_answer}: the supporting text comes first."""
    choices = [raw["distractor1"], raw["distractor2"], raw["distractor3"], raw["correct_answer"]]
    question = f"{raw['support'].lstrip()}\nQuestion: {raw['question']}\nAnswer:".lstrip()
    return {"question": question, "choices": choices, "answer_index": 3}


def boolq(raw: Raw) -> dict[str, Any]:
    """{passage, question, label}."""
    question = f"{raw['passage']}\nQuestion: {raw['question']}?\nAnswer:"
    return {"question": question, "choices": ["no", "yes"], "answer_index": int(raw["label"])}


TASKS: dict[str, Task] = {
    "arc_easy": Task(
        "grade-school science questions that simple methods solve",
        "allenai/ai2_arc", "CC-BY-SA-4.0", "Clark et al. 2018, arXiv 1803.05457", 2376, labelled, BY_TEXT,
        config="ARC-Easy", splits=WITH_TEST, prompt=QUESTION,
    ),
    "arc_challenge": Task(
        "grade-school science questions that retrieval and co-occurrence get wrong",
        "allenai/ai2_arc", "CC-BY-SA-4.0", "Clark et al. 2018, arXiv 1803.05457", 1172, labelled, BY_TEXT,
        config="ARC-Challenge", splits=WITH_TEST, prompt=QUESTION,
    ),
    "hellaswag": Task(
        "which ending continues a description of everyday events",
        "Rowan/hellaswag", "MIT", "Zellers et al. 2019, arXiv 1905.07830", 10042, hellaswag, BY_TEXT,
        splits=VALIDATION, chat_template="none",
    ),
    "piqa": Task(
        "which of two ways reaches a physical goal",
        "baber/piqa", "AFL-3.0", "Bisk et al. 2020, arXiv 1911.11641", 1838, piqa, BY_TEXT,
        splits=VALIDATION, prompt=QUESTION,
    ),
    "mmlu": Task(
        "exam questions from 57 subjects, by letter; train is the five development questions of each subject",
        "cais/mmlu", "MIT", "Hendrycks et al. 2021, arXiv 2009.03300", 14042, mmlu, BY_LETTER,
        config="all", splits={"train": "dev", "validation": "validation", "test": "test"},
        prompt="{question}\nAnswer:", lettered=True,
    ),
    "openbookqa": Task(
        "elementary science that needs a fact and common sense",
        "allenai/openbookqa", "Apache-2.0", "Mihaylov et al. 2018, arXiv 1809.02789", 500, openbookqa, BY_TEXT,
        config="main", splits=WITH_TEST,
    ),
    "commonsenseqa": Task(
        "common sense with five choices, by letter",
        "tau/commonsense_qa", "MIT", "Talmor et al. 2019, arXiv 1811.00937", 1221, labelled, BY_LETTER,
        splits=VALIDATION, prompt=QUESTION, lettered=True,
    ),
    "truthfulqa_mc1": Task(
        "questions that many people answer wrongly; one right choice",
        "truthfulqa/truthful_qa", "Apache-2.0", "Lin et al. 2022, arXiv 2109.07958", 817, truthfulqa, BY_TEXT,
        config="multiple_choice", splits={"test": "validation"}, prompt="Q: {question}\nA:",
    ),
    "sciq": Task(
        "science exam questions with a supporting text",
        "allenai/sciq", "CC-BY-NC-3.0", "Welbl et al. 2017, arXiv 1707.06209", 1000, sciq, BY_TEXT,
        splits=WITH_TEST,
    ),
    "boolq": Task(
        "yes or no about a passage",
        "aps/super_glue", "CC-BY-SA-3.0", "Clark et al. 2019, arXiv 1905.10044", 3270, boolq, ("acc",),
        config="boolq", splits=VALIDATION,
    ),
}  # fmt: skip
