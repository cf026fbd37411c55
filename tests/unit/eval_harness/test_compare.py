"""Two documents side by side: what is paired, what is refused, what the table and the exit code say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from eval_harness.compare import CompareError, compare, main, table
from eval_harness.results import Result, ResultError, aggregate, aggregation, from_items, to_document, write_json


def result(values, definition="exact_match@1(one_pass,plain)", higher_is_better=True, prefix="i"):
    items = [(f"{prefix}{at}", value) for at, value in enumerate(values)]
    return from_items(items, definition=definition, higher_is_better=higher_is_better)


def ratio(above, below):
    items = {f"i{at}": a / b for at, (a, b) in enumerate(zip(above, below, strict=True))}
    weights = {name: float(weight) for name, weight in zip(items, below, strict=True)}
    value = sum(above) / sum(below)
    return Result(value, len(items), None, "bits_per_byte@1(window=128,surviving_bytes)", False, items, weights=weights)


def document(sets, **about):
    return json.loads(json.dumps(to_document(sets, **about)))


def one(a, b, **about):
    (pair,) = compare(document({"facts": {"m": a}}), document({"facts": {"m": b}}), **about).pairs
    return pair


@pytest.fixture
def files(tmp_path):
    """`files(a, b, **about_b)`: two documents as files, their paths."""

    def write(a, b, **about):
        write_json(tmp_path / "a.json", to_document(a))
        (tmp_path / "b").mkdir()
        write_json(tmp_path / "b" / "results.json", to_document(b, **about))
        return [str(tmp_path / "a.json"), str(tmp_path / "b")]

    return write


def test_a_pair_by_hand():
    pair = one(result([1, 0, 0, 0, 1, 0, 1, 0]), result([1, 1, 1, 1, 1, 1, 1, 0]))
    # 3/8 and 7/8; 4 rows changed, all up: p = 2 / 16.
    assert (pair.a, pair.b, pair.difference, pair.n) == (0.375, 0.875, 0.5, 8)
    assert pair.p_value == 0.125
    assert pair.stderr == pytest.approx(math.sqrt(8 / 7 * 0.25 / 8))
    assert 0 < pair.low < 0.5 < pair.high
    assert pair.verdict == "better"


def test_the_verdict_knows_the_direction():
    low, high = [1.0, 1.1, 1.2, 0.9] * 5, [2.0, 2.2, 2.1, 2.0] * 5
    assert one(result(low), result(high)).verdict == "better"
    assert one(result(low, "loss@1", False), result(high, "loss@1", False)).verdict == "worse"
    assert one(result([1, 0] * 4), result([0, 1] * 4)).verdict == "unclear"
    assert one(result([1, 0] * 4), result([1, 0] * 4)).verdict == "equal"
    assert one(result([1]), result([0])).verdict == "-"
    other_batches = [value * (1 + 4e-6) for value in low]
    assert one(result(low), result(other_batches)).verdict == "equal"


def test_only_common_items_enter_and_the_others_are_counted():
    a = result([1, 0, 1, 0])
    b = Result(1.0, 3, 0.0, a.definition, True, {"i1": 1.0, "i2": 1.0, "new": 1.0})
    pair = one(a, b)
    assert (pair.n, pair.only_a, pair.only_b) == (2, 2, 1)
    assert (pair.a, pair.b, pair.difference) == (0.5, 1.0, 0.5)


def test_how_a_value_follows_from_its_items():
    texts = ratio([1, 9], [1, 3])
    assert aggregation(texts) == "ratio_of_sums"
    assert aggregate(texts, "ratio_of_sums", ["i1"]) == 3.0
    assert aggregation(result([1, 2, 4])) == "mean"
    perplexity = Result(math.exp(2), 2, None, "p@1", False, {"a": 1.0, "b": 3.0})
    assert aggregation(perplexity) == "exp_of_mean"
    assert aggregation(Result(7.0, 2, None, "norm@1", False, {"a": 1.0, "b": 3.0})) is None
    assert aggregation(Result(2.0, 3, None, "m@1", False, {"a": 1.0, "b": 3.0})) is None  # an item is missing
    assert aggregation(Result(None, 0, None, "m@1", False, note="nothing")) is None


def test_ratios_and_perplexities_are_compared_as_what_they_are():
    # (2 + 12) / 5 - (1 + 9) / 4; the second tokenizer keeps more bytes of the second text.
    pair = one(ratio([1, 9], [1, 3]), ratio([2, 12], [1, 4]))
    assert pair.difference == pytest.approx(14 / 5 - 10 / 4)
    assert (pair.low, pair.high) == (pytest.approx(0.0), pytest.approx(1.0))  # the items' own ratios: 3 - 3, 2 - 1
    first = Result(math.exp(2), 2, None, "p@1", False, {"a": 1.0, "b": 3.0})
    second = Result(math.exp(1), 2, None, "p@1", False, {"a": 0.0, "b": 2.0})
    assert one(first, second).difference == pytest.approx(math.exp(1) - math.exp(2))
    norm = Result(7.0, 2, None, "norm@1", False, {"a": 1.0, "b": 3.0})
    assert (one(norm, norm).difference, one(norm, norm).low) == (0.0, None)
    assert one(norm, norm).reason == "does not follow from its items: no interval"


def test_unequal_definitions_and_settings_are_refused_with_both():
    a = document({"facts": {"m": result([1, 0])}}, settings={"facts": {"system": None, "num_fewshot": 0, "id": "x"}})
    b = document({"facts": {"m": result([1, 0], "exact_match@1(one_pass,chat:5fb8ff)")}})
    found = compare(a, b)
    assert not found.pairs
    assert str(found.refused[0]).splitlines() == [
        "facts m: unequal definitions",
        "  A: exact_match@1(one_pass,plain)",
        "  B: exact_match@1(one_pass,chat:5fb8ff)",
    ]
    c = {**a, "settings": {"facts": {"system": None, "num_fewshot": 5, "id": "y"}}}
    (refused,) = compare(a, c).refused
    assert (refused.what, refused.a, refused.b) == ("settings", "num_fewshot = 0", "num_fewshot = 5")
    assert compare(a, {**a, "settings": {"facts": {**a["settings"]["facts"], "id": "other rows"}}}).pairs


def test_only_settings_that_a_measure_depends_on_are_held_against_it():
    loss = result([1.5, 2.5], "answer_loss@1(nats_per_token,with_end,plain)", False)
    own = {"answer_loss": loss, "f1": result([0.5, 1.0], "f1@1(squad,new=8,plain)"), "exact_match": result([1, 0])}
    how = {"prompting": "plain", "generation": "new=8", "id": "x"}
    first = document({"facts": own}, settings={"facts": how})
    second = document({"facts": own}, settings={"facts": how | {"generation": "new=8,t=0.7"}})
    found = compare(first, second)
    assert [pair.measure for pair in found.pairs] == ["answer_loss", "exact_match"]
    assert [(refused.measure, refused.what) for refused in found.refused] == [("f1", "settings")]
    written = {"exact_match": result([1, 0], "exact_match@1(generate,plain)")}
    sides = [document({"facts": written}, settings=one["settings"]) for one in (first, second)]
    assert not compare(*sides).pairs
    other = document({"facts": own}, settings={"facts": how | {"prompting": "plain,system:123456"}})
    assert not compare(first, other).pairs
    task = {"acc": result([1, 0], "lm_eval:acc@1(task=piqa,filter=none,0-shot,plain,settings=abc,lm_eval=0.4.13)")}
    sides = [document({"w": task}, settings={"w": {"task": "piqa", "num_fewshot": shots}}) for shots in (None, 0)]
    assert compare(*sides).pairs


def test_equal_results_are_one_line_and_equal_weights_are_said():
    same = {"facts": {"exact_match": result([1, 0, 1])}, "text": {"bits_per_byte": ratio([1, 9], [1, 3])}}
    found = compare(document(same, weights="ab"), document(same, weights="ab"))
    lines = table(found).splitlines()
    assert [line.split()[-1] for line in lines if line.startswith("  ")] == ["equal", "equal"]
    assert lines[-1] == "A and B are measurements of the same weights"
    assert "resamples" not in table(found)


def test_small_differences_keep_their_digits_and_the_table_its_width():
    a, b = [2.6e-4, 2.7e-4, 2.5e-4, 2.4e-4], [9.1e-4, 8.4e-4, 9.9e-4, 6.2e-4]
    losses = [{"loss": result(side, "loss@1", False), "more": result([one * -1e8 for one in side])} for side in (a, b)]
    lines = table(compare(*(document({"facts": one}) for one in losses))).splitlines()
    row = next(line.split() for line in lines if line.startswith("  loss"))
    assert row[:4] == ["loss", "2.6e-04", "0.0008", "+0.0006"]
    assert row[-1] == "worse"
    assert max(map(len, lines)) <= 80


def test_a_p_value_is_never_subtracted_nor_compared_across_n():
    def quality(p, n):
        return Result(p, n, None, "forget_quality@1(ks,two_sided)", True, note="KS .4")

    pair = one(quality(1e-21, 300), quality(1e-16, 300))
    assert (pair.a, pair.b, pair.difference, pair.verdict) == (1e-21, 1e-16, None, "-")
    found = compare(document({"f": {"q": quality(1e-21, 300)}}), document({"f": {"q": quality(1e-16, 400)}}))
    assert not found.pairs
    assert (found.refused[0].what, found.refused[0].a, found.refused[0].b) == ("n, and no items to pair", "300", "400")


def test_the_command_prints_pairs_refuses_the_rest_and_exits_2(files, capsys):
    chat = result([1, 0, 1], "exact_match@1(one_pass,chat:5fb8ff)")
    a = {"facts": {"exact_match": result([0] * 6), "normalised_probability_of_all": result([0.5, 0.25], "p@1")}}
    b = {"facts": {"exact_match": result([1] * 5 + [0]), "normalised_probability_of_all": result([1.0, 0.5], "p@1")}}
    paths = files(
        a | {"sums": {"exact_match": result([1, 0, 1])}, "copy": {"exact_match": chat}},
        b | {"sums": {"exact_match": chat}, "sort": {"exact_match": chat}},
    )
    a_said = json.loads(Path(paths[0]).read_text())
    write_json(paths[0], a_said | {"model": "org/one", "weights": "1f2e3d4c5b", "limit": 5, "dtype": "auto"})
    assert main(paths) == 2
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    start = next(at for at, line in enumerate(lines) if line.startswith("set "))
    said = " ".join(" ".join(lines[:start]).split()).replace(" ", "")  # paths may be broken anywhere
    expected = f"A {paths[0]}: org/one, weights 1f2e3d4c, limit 5 B {paths[1]}: a model without a name"
    assert said == expected.replace(" ", "")
    lines = lines[start:]
    assert lines[0].split() == ["set", "A", "B", "B", "-", "A", "[0.95", "interval]"]
    assert lines[2].split()[:4] == ["exact_match", "0.0000", "0.8333", "+0.8333"]
    assert lines[2].split()[-1] == "better"
    assert lines[4].strip() == "normalised_probability_of_all"
    assert "only in A: copy exact_match" in lines
    assert "only in B: sort exact_match" in lines
    assert err.startswith("error: sums exact_match: unequal definitions\n  A: exact_match@1(one_pass,plain)")
    assert main([*paths, "--set", "facts"]) == 0
    assert capsys.readouterr().err == ""
    assert main([*paths, "--set", "sums"]) == 2
    assert main([*paths, "--set", "copy"]) == 2
    assert "no set and measure that both documents have" in capsys.readouterr().err


def test_the_command_as_json(files, capsys):
    paths = files({"f": {"m": result([0, 1, 0])}}, {"f": {"m": result([1, 1, 1])}}, libraries={"torch": "2"})
    assert main([*paths, "--json", "--level", "0.5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["level"], found["refused"], found["notes"]) == (0.5, [], [])
    assert found["pairs"][0]["difference"] == pytest.approx(2 / 3)
    assert found["pairs"][0]["verdict"] in ("better", "unclear")


def test_other_library_versions_are_said():
    sets = {"f": {"m": result([0, 1])}}
    found = compare(
        document(sets, libraries={"torch": "2.12", "a": "1"}), document(sets, libraries={"torch": "2.13", "a": "1"})
    )
    assert found.notes == ["measured with other versions: torch 2.12 and 2.13"]


def test_bad_input(files, tmp_path, capsys):
    good = {"f": {"m": result([0, 1])}}
    paths = files(good, good)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    write_json(tmp_path / "old.json", {**to_document(good), "schema_version": 1})
    whole = to_document(good)
    write_json(tmp_path / "shape.json", whole | {"results": []})
    write_json(tmp_path / "set.json", whole | {"results": {"f": [1]}})
    write_json(
        tmp_path / "items.json", whole | {"results": {"f": {"m": whole["results"]["f"]["m"] | {"per_item": [1]}}}}
    )
    for name, said in {
        "none.json": "no such file",
        "broken.json": "cannot be read as JSON",
        "list.json": "is no results document",
        "old.json": "schema_version = 1: this version reads 2",
        "shape.json": "results: not of the schema",
        "set.json": "results: not of the schema",
        "items.json": "results: not of the schema",
    }.items():
        assert main([paths[0], str(tmp_path / name)]) == 2
        assert said in capsys.readouterr().err
    assert main([*paths, "--set", "fact", "--measure", "n"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: --set fact: neither document has it; they have f",
        "error: --measure n: neither document has it; they have m",
    ]
    with pytest.raises(SystemExit):
        main([*paths, "--level", "95"])
    with pytest.raises(CompareError):
        compare(document(good), document(good), sets=["x"])
    with pytest.raises(ResultError):
        compare({"results": {}}, document(good))
