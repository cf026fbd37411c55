"""The published JSON Schema: real documents hold, damaged ones do not."""

from __future__ import annotations

import copy
import json
import math

import jsonschema
import pytest

from eval_harness.measure import EvalSet, measure
from eval_harness.results import (
    SCHEMA_FILE,
    SCHEMA_VERSION,
    Result,
    ResultError,
    from_document,
    from_items,
    schema,
    to_document,
)
from eval_harness.rows import canonical


def valid(document, kind="document"):
    return jsonschema.Draft202012Validator(schema(kind)).is_valid(document)


@pytest.fixture(scope="module")
def measured(tiny_llama, tiny_tokenizer):
    """What measure() says of answers and of text, through JSON."""
    rows = [canonical({"prompt": f"{a} + {a} =", "completion": str(2 * a)}) for a in range(4)]
    long = [canonical({"prompt": "word " * 300, "completion": "x"})]
    texts = [canonical({"text": "A cat sat."}), canonical({"text": "Dogs run and run."})]
    sets = [EvalSet("sums", rows + long), EvalSet("long", long), EvalSet("text", texts)]
    settings = {"sums": {"chat_template": "auto", "num_fewshot": 0}}
    found = measure(tiny_llama(max_position_embeddings=128), tiny_tokenizer, sets)
    document = to_document(found, model="tiny", limit=None, settings=settings, libraries={"torch": "2.13"})
    return json.loads(json.dumps(document, allow_nan=False))


def test_every_schema_is_one():
    for kind in ("document", "set", "result", "matrix"):
        jsonschema.Draft202012Validator.check_schema(schema(kind))
    assert json.loads(SCHEMA_FILE.read_text()) == schema()
    assert schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema()["$defs"]["document"]["properties"]["schema_version"] == {"const": SCHEMA_VERSION}


def test_what_measure_makes_holds(measured):
    assert measured["results"]["long"]["exact_match"]["value"] is None
    jsonschema.validate(measured, schema(), jsonschema.Draft202012Validator)
    assert valid(measured["results"]["sums"], "set")
    assert valid(measured["results"]["text"]["bits_per_byte"], "result")


def test_a_result_and_its_schema_have_the_same_fields():
    described = schema()["$defs"]["result"]["properties"]
    assert set(described) == set(Result.__dataclass_fields__)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("schema_version",), 1),
        (("results",), []),
        (("results", "sums"), {}),
        (("results", "sums", "exact_match", "n"), 1.5),
        (("results", "sums", "exact_match", "n"), -1),
        (("results", "sums", "exact_match", "stderr"), -0.1),
        (("results", "sums", "exact_match", "value"), "0.5"),
        (("results", "sums", "exact_match", "value"), None),  # undefined, and nobody says why
        (("results", "sums", "exact_match", "definition"), ""),
        (("results", "sums", "exact_match", "excluded"), {"longer_than_context": 0}),
        (("results", "sums", "exact_match", "per_item"), [1, 0]),
        (("results", "sums", "exact_match", "weights"), {"a": 0}),
        (("results", "sums", "exact_match", "speed"), 1),
        (("settings", "sums"), "auto"),
        (("libraries", "torch"), 2.13),
        (("limit",), 0),
    ],
    ids=str,
)
def test_what_is_damaged_does_not_hold(measured, where, value):
    damaged = copy.deepcopy(measured)
    assert damaged["results"]["sums"]["exact_match"]["note"] is None
    *parents, last = where
    place = damaged
    for key in parents:
        place = place[key]
    place[last] = value
    assert valid(measured)
    assert not valid(damaged)


@pytest.mark.parametrize("key", ["value", "n", "stderr", "definition", "higher_is_better", "per_item", "note"])
def test_nothing_may_be_missing(measured, key):
    damaged = copy.deepcopy(measured)
    del damaged["results"]["sums"]["answer_loss"][key]
    assert not valid(damaged)
    with pytest.raises(ResultError, match=rf"missing \['{key}'\]"):
        from_document(damaged)


def test_weights_travel_where_there_are_some():
    plain = from_items([("a", 1.0), ("b", math.nan)], definition="d@1", higher_is_better=True)
    assert "weights" not in plain.to_json()
    assert valid(plain.to_json(), "result")  # a value that is no number is null with a note
    heavy = Result(2.0, 2, None, "r@1", False, {"a": 1.0, "b": 2.5}, weights={"a": 1.0, "b": 2.0})
    stored = json.loads(json.dumps(heavy.to_json()))
    assert valid(stored, "result")
    assert Result.from_json(stored) == heavy


def test_a_matrix_by_hand():
    cell = from_items([("a", 1.0)], definition="d@1", higher_is_better=True).to_json()
    del cell["per_item"]
    metric = {"value": None, "formula": "BWT = ...", "n": 0, "reason": "undefined for one task"}
    rows = [{"stage": "base", "index": 0, "scores": {"sums": {"exact_match": cell}}}]
    summary = {"exact_match": {"general_average": [1.0, None], "bwt_gem": metric}}
    matrix = {"schema": 1, "stream": "s", "tasks": ["sums"], "general": [], "rows": rows, "summary": summary}
    assert valid(matrix, "matrix")
    assert not valid({**matrix, "rows": []}, "matrix")
    assert not valid({**matrix, "tasks": ["sums", "sums"]}, "matrix")
    assert not valid({**matrix, "summary": {"exact_match": {"bwt_gem": {**metric, "reason": None}}}}, "matrix")
    assert not valid({**matrix, "summary": {"exact_match": {"bwt_gem": 0.5}}}, "matrix")
