"""Results: figures by hand, and a JSON form that loses nothing."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_harness.results import (
    SCHEMA_VERSION,
    Result,
    ResultError,
    from_document,
    from_items,
    to_document,
    unique_ids,
    write_json,
)


def make(items, **more):
    return from_items(items, definition="d@1", higher_is_better=True, **more)


def test_mean_and_standard_error_by_hand():
    # 1, 0, 1, 1: mean 3/4; sample variance (3 * 1/16 + 9/16) / 3 = 1/4; stderr sqrt(1/4 / 4) = 1/4.
    result = make([("a", 1), ("b", 0), ("c", 1), ("d", 1)], excluded={"longer_than_context": 2, "other": 0})
    assert (result.value, result.n, result.stderr) == (0.75, 4, 0.25)
    assert result.excluded == {"longer_than_context": 2}


def test_one_item_has_no_standard_error_and_none_no_value():
    assert make([("a", 2.0)]).stderr is None
    empty = make([], excluded={"longer_than_context": 3})
    assert (empty.value, empty.n, empty.stderr) == (None, 0, None)
    assert "longer_than_context" in (empty.note or "")


def test_repeated_ids_are_numbered():
    assert unique_ids([("a", 1), ("b", 2), ("a", 3), ("a", 4)]) == {"a": 1, "b": 2, "a-2": 3, "a-3": 4}


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=64, max_value=1e150, min_value=-1e150)))
def test_json_is_exact(values):
    result = make([(str(i), value) for i, value in enumerate(values)], note="n")
    text = json.dumps(result.to_json(), allow_nan=False)
    assert Result.from_json(json.loads(text)) == result


def test_what_is_not_finite_is_null_with_a_note():
    data = make([("a", math.inf), ("b", 1.0)], note="chance").to_json()
    assert (data["value"], data["stderr"], data["per_item"]["a"]) == (None, None, None)
    assert data["note"] == "chance; the value is inf"
    assert math.isnan(Result.from_json(data).per_item["a"])


def test_documents_round_trip_and_refuse_other_schemas():
    results = {"facts": {"exact_match": make([("a", 1), ("b", 0)])}}
    document = json.loads(json.dumps(to_document(results, model="m")))
    assert (document["schema_version"], document["model"]) == (SCHEMA_VERSION, "m")
    assert from_document(document) == results
    with pytest.raises(ResultError, match="schema_version = 1"):
        from_document({**document, "schema_version": 1})
    broken = {key: value for key, value in results["facts"]["exact_match"].to_json().items() if key != "n"}
    with pytest.raises(ResultError, match=r"missing \['n'\]"):
        Result.from_json(broken)


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "r.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.json"]
