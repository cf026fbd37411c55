"""Mathematics: a solution is written and its result compared, in the form asked for and wherever it stands.

Tests hold the bare result. The train split holds worked solutions, whose form is the one that the strict parser
knows: a last line "#### RESULT" (GSM8K's own), or a boxed result (MATH's own).
"""

from __future__ import annotations

import re
from typing import Any

from eval_harness.tasks import QUESTION, Raw, Task, whole

RESULTS = ("math_strict", "math_lenient", "format_drift_math")


def gsm8k(raw: Raw) -> dict[str, Any]:
    """{question, answer}: the answer is steps with calculator marks <<...>>, then "#### RESULT"."""
    steps, _, result = raw["answer"].rpartition("####")
    solution = re.sub(r"<<.*?>>", "", steps).strip()
    return {"question": raw["question"], "answer": result.strip().replace(",", ""), "solution": solution}


def math500(raw: Raw) -> dict[str, Any]:
    """{problem, solution, answer, subject, level, unique_id}: the solution holds the boxed result."""
    named = {"question": raw["problem"], "answer": raw["answer"], "solution": raw["solution"]}
    return named | {"subject": raw["subject"]}


def svamp(raw: Raw) -> dict[str, Any]:
    """{Body, Question, Answer, Equation, Type, ...}: the answer is a float as a string."""
    body = raw["Body"].strip()
    question = f"{body if body.endswith(('.', '?', '!')) else body + '.'} {raw['Question'].strip()}"
    return {"question": question, "answer": whole(raw["Answer"]), "solution": raw["Equation"], "subject": raw["Type"]}


def asdiv(raw: Raw) -> dict[str, Any]:
    """{body, question, answer, formula, solution_type}: the answer's unit stands behind it in brackets."""
    result = raw["answer"].split(" (")[0]
    question = f"{raw['body'].strip()} {raw['question'].strip()}"
    return {"question": question, "answer": whole(result), "solution": raw["formula"], "subject": raw["solution_type"]}


def announced(raw: Raw) -> dict[str, Any]:
    """The solution, and the result on a line "#### RESULT"."""
    steps = str(raw.get("solution") or "").strip()
    return {"answer": "\n".join([*([steps] if steps else []), f"#### {raw['answer']}"])}


def boxed(raw: Raw) -> dict[str, Any]:
    """The solution, whose result is boxed; boxed by itself where there is no solution."""
    return {"answer": str(raw.get("solution") or "").strip() or f"\\boxed{{{raw['answer']}}}"}


TASKS: dict[str, Task] = {
    "gsm8k": Task(
        "grade-school word problems of two to eight steps",
        "openai/gsm8k", "MIT", "Cobbe et al. 2021, arXiv 2110.14168", 1319, gsm8k, RESULTS,
        config="main", prompt=QUESTION, solved=announced, num_fewshot=5,
        generate={"max_new_tokens": 320, "stop": ["Question:"]},
    ),
    "math500": Task(
        "500 problems of the competition data set MATH",
        "HuggingFaceH4/MATH-500", "MIT", "Hendrycks et al. 2021, arXiv 2103.03874; Lightman et al. 2023", 500,
        math500, RESULTS, splits={"test": "test"}, prompt="Problem: {question}\nSolution:", solved=boxed,
        generate={"max_new_tokens": 1024, "stop": ["Problem:"]},
    ),
    "svamp": Task(
        "one-step word problems, varied against shallow cues",
        "ChilleD/SVAMP", "MIT", "Patel et al. 2021, arXiv 2103.07191", 300, svamp, RESULTS,
        prompt=QUESTION, solved=announced, num_fewshot=5, generate={"max_new_tokens": 128, "stop": ["Question:"]},
    ),
    "asdiv": Task(
        "word problems of primary school",
        "EleutherAI/asdiv", "CC-BY-NC-4.0", "Miao et al. 2020, arXiv 2106.15772", 2305, asdiv, RESULTS,
        splits={"test": "validation"}, prompt=QUESTION, solved=announced,
        generate={"max_new_tokens": 128, "stop": ["Question:"]},
    ),
}  # fmt: skip
