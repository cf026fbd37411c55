"""Every metric loads into Hugging Face evaluate, from another folder and without network, and says what it should."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from eval_harness.hf import metric_names, metric_path
from eval_harness.metrics import continual, forgetting, membership, text

R = [[0.1, 0.2, 0.3], [0.9, 0.3, None], [0.6, 0.8, 0.5], [0.4, 0.7, 0.9]]
GENERAL = [[46, 26, 70], [45, 20, 70], [40, 4, 71]]
SINGLE = [0.8, 0.9, 0.6]
PREDICTIONS, REFERENCES = ["The red cat.", "a dog", "7"], [["red cat", "cat"], ["the cat"], ["7.0"]]
ONE_EACH = ["red cats", "the cat", "..."]
HITS = [[True, False, True, True], [False], []]
RIGHT, WRONG = [[-0.7, -1.4, -2.1], [-0.1]], [[[-0.7, -0.7], [-3.5]], [[-2.0], [-1.0, -3.0]]]
RATIOS, OTHERS = [0.5, 0.9, None, 1.5], [0.8, 1.1, 1.4, 2.0]
UTILITY = {
    "sets": ["retain", "real_authors", "world_facts"],
    "probability": [0.9, 0.5, 0.4],
    "rouge_l_recall": [0.9, 0.8, 0.7],
    "truth_ratio": [0.5, 0.6, 0.55],
}
LOG_PROBS = [[-1.0, -2.0, -0.5], [-3.0], []]

CASES: dict[str, dict[str, Any]] = {  # what compute is given
    "average_performance": {"predictions": R},
    "mean_average_performance": {"predictions": R},
    "plasticity": {"predictions": R},
    "bwt": {"predictions": R, "higher_is_better": False},
    "bwt_gem": {"predictions": R},
    "bwt_t": {"predictions": R, "higher_is_better": False},
    "fwt_gem": {"predictions": R},
    "fwt_sapt": {"predictions": R, "single": SINGLE},
    "forgetting_max": {"predictions": R},
    "forgetting_just_learned": {"predictions": R},
    "intransigence": {"predictions": R, "reference": SINGLE, "against": "single"},
    "f1_average": {"predictions": R, "general": 0.5},
    "hars": {"predictions": [0.5, 0.7], "retention": 0.3},
    "general_delta": {"predictions": GENERAL, "stage": 1},
    "quasi_exact_match": {"predictions": PREDICTIONS, "references": REFERENCES},
    "f1": {"predictions": PREDICTIONS, "references": ONE_EACH},
    "rouge_l": {"predictions": PREDICTIONS, "references": ONE_EACH, "stemmer": True},
    "exact_memorisation": {"hits": HITS},
    "extraction_strength": {"hits": HITS[:1], "end_tokens": 1},
    "truth_ratio": {"right": RIGHT, "wrong": WRONG, "kind": "arithmetic", "by": "closeness"},
    "forget_quality": {"predictions": RATIOS, "references": OTHERS},
    "model_utility": UTILITY | {"kind": "geometric"},
    "min_k": {"log_probs": LOG_PROBS, "k": 0.4},
}


def of_function(name: str) -> dict[str, Any]:
    """The fields of the pure function's summary, its value under the metric's name."""
    given = CASES[name]
    function: Callable[..., Any] = getattr(continual, name)
    others = {key: value for key, value in given.items() if key != "predictions"}
    fields = asdict(function(given["predictions"], **others))
    return {name: fields.pop("value"), **fields}


def average(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known)


def expected(name: str) -> dict[str, Any]:
    """What the pure functions give, without the module."""
    if name == "bwt":
        lower = {"R": R, "higher_is_better": False}
        return {"bwt_gem": continual.bwt_gem(**lower).value, "bwt_t": continual.bwt_t(**lower).value, "n": 2}
    if name == "hars":
        return {"hars": continual.hars(0.6, 0.3).value, "n": 2}
    if name == "general_delta":
        return {"general_delta": (-1 - 6 + 0) / 3, "n": 3}
    if name == "quasi_exact_match":
        scores = [text.quasi_exact_match(*pair) for pair in zip(PREDICTIONS, REFERENCES, strict=True)]
        return {name: average(scores), "n": 3, "left_out": 0}
    if name == "f1":  # nothing of "..." is left
        pairs = zip(PREDICTIONS, ONE_EACH, strict=True)
        return {name: average([text.f1(prediction, [one]) for prediction, one in pairs]), "n": 2, "left_out": 1}
    if name == "rouge_l":
        found = [text.rouge_l(*pair, stemmer=True) for pair in zip(PREDICTIONS[:2], ONE_EACH[:2], strict=True)]
        precision, recall, f1 = (average(list(part)) for part in zip(*found, strict=True))
        return {name: f1, "rouge_l_recall": recall, "rouge_l_precision": precision, "n": 2, "left_out": 1}
    if name == "exact_memorisation":
        return {name: average([forgetting.exact_memorisation(one) for one in HITS]), "n": 2, "left_out": 1}
    if name == "extraction_strength":
        return {name: forgetting.extraction_strength(HITS[0], end_tokens=1), "n": 1, "left_out": 0}
    if name == "truth_ratio":
        ratios = [forgetting.truth_ratio_arithmetic(*pair) for pair in zip(RIGHT, WRONG, strict=True)]
        return {name: forgetting.aggregate(ratios, "closeness").value, "ratios": ratios, "n": 2}
    if name == "forget_quality":
        found = forgetting.forget_quality(RATIOS, OTHERS)
        return {name: found.p, "statistic": found.statistic, "n": 3, "n_ref": 4, "left_out": 1, "method": "exact"}
    if name == "model_utility":
        columns = [what for what in UTILITY if what != "sets"]
        by_set = {one: {what: UTILITY[what][row] for what in columns} for row, one in enumerate(UTILITY["sets"])}
        return {name: forgetting.model_utility(by_set, truth_ratio="geometric").value, "n": 9}
    if name == "min_k":
        scores = [membership.min_k(one, 0.4) for one in LOG_PROBS]
        return {name: average(scores), "scores": scores, "n": 2, "left_out": 1}
    return of_function(name)


SCRIPT = """
import json, socket, sys

def refuse(*args, **kwargs):
    raise OSError("the network was asked for")

socket.socket.connect = socket.getaddrinfo = refuse
import evaluate
from eval_harness.hf import metric_path

found = {}
for case, (name, given) in json.load(sys.stdin).items():
    metric = evaluate.load(metric_path(name))
    about = {"name": metric.name, "description": metric.description, "usage": metric.inputs_description}
    try:
        found[case] = {"about": about, "result": metric.compute(**given)}
    except (TypeError, ValueError) as error:
        found[case] = {"about": about, "error": f"{type(error).__name__}: {error}"}
rows = evaluate.load(metric_path("bwt_gem"))
for row in json.loads(sys.argv[1]):
    rows.add(prediction=row)
pair = evaluate.combine([evaluate.load(metric_path(name)) for name in ("bwt_gem", "forgetting_max")])
found["row by row"] = {"result": rows.compute()}
found["combined"] = {"result": pair.compute(predictions=json.loads(sys.argv[1]))}
json.dump(found, sys.stdout)
"""

BAD = {  # case -> metric, what it is given, what is said
    "shape": ("bwt_gem", {"predictions": [[0.1, 0.2]]}, "must have a row for the base"),
    "words": ("bwt_gem", {"predictions": ["0.1", "0.2"]}, "expected a list"),
    "reference": ("intransigence", {"predictions": R, "reference": SINGLE}, "against"),
    "short reference": ("fwt_sapt", {"predictions": R, "single": [0.5]}, "must be one per task"),
    "kind": ("truth_ratio", {"right": RIGHT, "wrong": WRONG, "kind": "median", "by": "closeness"}, "kind = 'median'"),
    "no kind": ("truth_ratio", {"right": RIGHT, "wrong": WRONG, "by": "closeness"}, "kind"),
    "stemmer": ("rouge_l", {"predictions": ["a"], "references": ["b"]}, "stemmer"),
    "another n": ("forget_quality", {"predictions": RATIOS, "references": OTHERS[:3]}, "Mismatch in the number"),
    "a loss": ("min_k", {"log_probs": [[2.5]]}, "a loss has the opposite sign"),
    "twice": ("model_utility", UTILITY | {"sets": ["retain"] * 3, "kind": "geometric"}, "must name each set once"),
    "no set": ("model_utility", UTILITY | {"sets": ["a", "b", "c"], "kind": "geometric"}, "must be one of retain"),
}
UNDEFINED = {  # case -> metric, what it is given, the reason for its None
    "a cell": ("average_performance", {"predictions": [*R[:3], [0.4, None, 0.9]]}, "not measured: R[3][2]"),
    "nan": ("average_performance", {"predictions": [*R[:3], [0.4, math.nan, 0.9]]}, "not finite: R[3][2] = nan"),
    "one task": ("forgetting_max", {"predictions": [[0.1], [0.9]]}, "one task"),
    "an ability": ("general_delta", {"predictions": [[1, 2], [1]]}, "not measured: G[1][2]"),
    "a taught task": ("hars", {"predictions": [0.5, None], "retention": 0.3}, "not measured: A"),
    "nothing": ("exact_memorisation", {"hits": [[]]}, "no item has a score"),
    "a utility": ("model_utility", UTILITY | {"probability": [0.9, None, 0.4], "kind": "geometric"}, "real_authors"),
}


@pytest.fixture(scope="module")
def found(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """case -> result of one process in another folder, with empty caches and no network."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    cases = {name: (name, given) for name, given in CASES.items()}
    cases |= {case: (name, given) for case, (name, given, _) in (BAD | UNDEFINED).items()}
    caches = {"HF_HOME": str(elsewhere / "home"), "HF_MODULES_CACHE": str(elsewhere / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(R)],
        input=json.dumps(cases),
        cwd=elsewhere,
        env=os.environ | caches | {"PYTHONPATH": str(root), "HF_EVALUATE_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_module_has_a_case():
    assert metric_names() == sorted(CASES)


def test_every_continual_metric_has_a_module():
    metrics = {
        name for name, f in vars(continual).items() if getattr(f, "__annotations__", {}).get("return") == "Summary"
    }
    assert {name for name in metrics if not name.startswith("_")} <= set(metric_names())


@pytest.mark.parametrize("name", metric_names())
def test_a_module_says_what_its_function_says(found, name):
    result, same = found[name]["result"], expected(name)
    assert {key: result[key] for key in same} == same
    assert result.get("reason") is None


@pytest.mark.parametrize("name", metric_names())
def test_a_module_is_named_as_its_folder_and_described(found, name):
    about = found[name]["about"]
    assert about["name"] == name
    assert "predictions" in about["description"] or f"`{next(iter(CASES[name]))}`" in about["description"]
    assert about["usage"]


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(found, case):
    assert "result" not in found[case]
    assert BAD[case][2] in found[case]["error"]


@pytest.mark.parametrize("case", UNDEFINED)
def test_what_is_undefined_is_none_with_its_reason(found, case):
    name, _, reason = UNDEFINED[case]
    assert found[case]["result"][name] is None
    assert reason in found[case]["result"]["reason"]


def test_rows_may_come_one_by_one(found):
    assert found["row by row"] == {"result": found["bwt_gem"]["result"]}


def test_metrics_combine(found):
    result = found["combined"]["result"]
    assert result["bwt_gem"] == found["bwt_gem"]["result"]["bwt_gem"]
    assert result["forgetting_max_formula"].startswith("F_max = ")


def test_an_unknown_metric_is_named_with_a_near_one():
    with pytest.raises(ValueError, match=r"no metric 'bwt_gen': did you mean 'bwt_gem'\? must be one of average_"):
        metric_path("bwt_gen")
    with pytest.raises(ValueError, match="no metric 'base'"):
        metric_path("base")


def test_the_names_come_without_evaluate():
    code = "import sys, eval_harness.hf as h; h.metric_path('bwt'); print({'evaluate', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
