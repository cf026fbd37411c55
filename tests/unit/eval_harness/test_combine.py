"""Quantities over several sets: computed by the metrics' formulas, refused where a part is missing."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from eval_harness.combine import CombineError, check_combined, combine
from eval_harness.metrics import forgetting, membership
from eval_harness.results import from_items, to_document

UTILITY = {"measure": "model_utility", "sets": {"retain": "kept"}}


def result(name, values, prefix="i"):
    items = ((f"{prefix}{k}", v) for k, v in enumerate(values))
    return from_items(items, definition=f"{name}@1", higher_is_better=True)


def utility_results(last=0.5):
    out = {}
    for one in ("kept", "real_authors", "world_facts"):
        likely = "probability" if one == "kept" else "normalised_probability"
        names = (likely, "rouge_l_recall", "truth_ratio_geometric_true_better")
        out[one] = {name: result(name, [value]) for name, value in zip(names, (0.9, 0.8, last), strict=True)}
    return out


def test_model_utility_is_the_harmonic_of_nine():
    (found,) = combine({"mu": UTILITY}, utility_results())["mu"].values()
    assert found.value == pytest.approx(9 / (3 / 0.9 + 3 / 0.8 + 3 / 0.5))
    assert found.n == 9
    assert re.fullmatch(r"model_utility@2\(geometric,harmonic_of_9,parts=[0-9a-f]{6}\)", found.definition)
    (zero,) = combine({"mu": UTILITY}, utility_results(0.0))["mu"].values()
    assert (zero.value, zero.note.startswith("0 by rule")) == (0.0, True)


def test_forget_quality_reads_the_references_ratios(tmp_path):
    own, other = [0.1, 0.2, 0.3, 0.9, 1.1], [0.5, 0.6, 0.2, 0.8, 1.4]
    results = {"forget": {"truth_ratio_geometric": result("truth_ratio_geometric", own)}}
    file = tmp_path / "results.json"
    file.write_text(
        json.dumps(to_document({"forget": {"truth_ratio_geometric": result("truth_ratio_geometric", other)}}))
    )
    spec = {"measure": "forget_quality", "set": "forget", "reference": str(file)}
    (found,) = combine({"fq": spec}, results)["fq"].values()
    expected = forgetting.forget_quality(own, other)
    assert (found.value, found.n) == (expected.p, 5)
    said = r"forget_quality@2\(ks,truth_ratio_geometric@1,n=5/5,parts=[0-9a-f]{6},reference=[0-9a-f]{6}\)"
    assert re.fullmatch(said, found.definition)  # other n, other definition
    (none,) = combine({"fq": {"measure": "forget_quality", "set": "forget"}}, results)["fq"].values()
    assert none.value is None
    assert none.note.startswith("no reference")


def test_membership_and_privleak(tmp_path):
    members, others = [0.1, 0.2, 0.5], [0.4, 0.6, 0.9, 0.3]
    results = {
        "forget": {"min_k": result("min_k", members)},
        "holdout": {"min_k": result("min_k", others, prefix="o")},
    }
    sides = {"members": "forget", "nonmembers": "holdout"}
    (area,) = combine({"a": {"measure": "membership_auc", **sides}}, results)["a"].values()
    expected = membership.auc(members, others)
    assert area.value == expected.value
    assert re.fullmatch(r"membership_auc@2\(min_k,members_lower,parts=[0-9a-f]{6}\)", area.definition)
    assert "both sides" not in area.note
    leaking = {**results, "holdout": results["forget"]}
    (mixed,) = combine({"a": {"measure": "membership_auc", **sides}}, leaking)["a"].values()
    assert mixed.note.endswith("; 3 texts are on both sides")
    file = tmp_path / "results.json"
    retrained = {"forget": {"min_k": result("min_k", [0.4, 0.7, 0.5])}, "holdout": results["holdout"]}
    file.write_text(json.dumps(to_document(retrained)))
    for reference, theirs in ((0.4772, 0.4772), (str(file), membership.auc([0.4, 0.7, 0.5], others))):
        (found,) = combine({"p": {"measure": "privleak", **sides, "reference": reference}}, results)["p"].values()
        assert found.value == pytest.approx(membership.privleak(expected, theirs).value)
        assert "area" in found.note
    (none,) = combine({"p": {"measure": "privleak", **sides}}, results)["p"].values()
    assert (none.value, none.note.startswith("no reference")) == (None, True)


def test_a_quantity_of_other_rows_prompts_or_references_is_another(tmp_path):
    def definition(spec, results):
        (found,) = combine({"q": spec}, results)["q"].values()
        return found.definition

    same, other = utility_results(), utility_results(0.3)
    assert definition(UTILITY, same) == definition(UTILITY, other)  # another model
    part = same["kept"]["probability"]
    for changed in (
        replace(part, definition="probability@1(chat:5fb8ff)"),
        replace(part, per_item={"another row": 0.9}),
    ):
        results = {**same, "kept": {**same["kept"], "probability": changed}}
        assert definition(UTILITY, results) != definition(UTILITY, same)

    results = {"forget": {"truth_ratio_geometric": result("truth_ratio_geometric", [0.1, 0.2])}}
    file = tmp_path / "results.json"
    spec = {"measure": "forget_quality", "set": "forget", "reference": str(file)}
    found = []
    for weights in ("a" * 64, "b" * 64, "b" * 64):
        file.write_text(json.dumps(to_document(results, weights=weights)))
        found.append(definition(spec, results))
    assert found[0] != found[1] == found[2]
    sides = {"forget": {"min_k": result("min_k", [0.1])}, "holdout": {"min_k": result("min_k", [0.4])}}
    areas = {"measure": "privleak", "members": "forget", "nonmembers": "holdout"}
    assert definition({**areas, "reference": 0.5}, sides) != definition({**areas, "reference": 0.4}, sides)


def test_every_problem_at_once(tmp_path):
    measures = {"kept": ("probability",), "forget": ("truth_ratio_geometric", "min_k"), "holdout": ("loss_score",)}
    (tmp_path / "bad.json").write_text("{}")
    combined = {
        "a": {"measure": "model_utilty"},
        "b": {"measure": "model_utility", "sets": {"retain": "kept"}},
        "c": {"measure": "forget_quality", "reference": "x", "seed": 1},
        "d": {"measure": "forget_quality", "set": "forget", "reference": str(tmp_path / "bad.json")},
        "e": {"measure": "privleak", "members": "forget", "nonmembers": "holdout", "reference": 1.5},
        "f": {"measure": "membership_auc", "members": "forget", "nonmembers": "nowhere", "score": "loss"},
        "g": {"measure": "membership_auc", "members": "forget", "nonmembers": "forget"},
        "h": {"measure": "model_utility", "sets": {"retian": "kept"}},
        "i": {"measure": "forget_quality", "set": ["forget"]},
        "j": {"measure": ["privleak"]},
    }
    with pytest.raises(CombineError) as caught:
        check_combined(combined, measures)
    said = str(caught.value)
    for part in (
        "combined.a.measure = 'model_utilty': did you mean 'model_utility'",
        "combined.b: needs rouge_l_recall, truth_ratio_geometric_true_better among the measures of set 'kept'",
        "combined.b: names the set 'real_authors', which the suite does not have",
        "combined.c.seed: unknown key",
        "combined.c.set: is missing",
        "combined.d: reference",
        "combined.e: needs min_k among the measures of set 'holdout'",
        "combined.e.reference = 1.5: must be a results file, or an area",
        "combined.f.score = 'loss': must be one of loss_score",
        "combined.h.sets = {'retian': 'kept'}: must map retain, real_authors, world_facts to sets",
        "combined.i.set = ['forget']: must name a set",
        "combined.j.measure = ['privleak']: did you mean 'privleak'",
        "combined.g: members and nonmembers are both 'forget'",
    ):
        assert part in said, (part, said)


def test_a_reference_of_other_items_or_another_definition_is_refused(tmp_path):
    own = result("truth_ratio_geometric", [0.1, 0.2, 0.3])
    results = {"forget": {"truth_ratio_geometric": own}}
    file = tmp_path / "results.json"
    spec = {"fq": {"measure": "forget_quality", "set": "forget", "reference": str(file)}}

    def refused(other, match):
        file.write_text(json.dumps(to_document({"forget": {"truth_ratio_geometric": other}})))
        with pytest.raises(CombineError, match=match):
            combine(spec, results)

    refused(result("truth_ratio_geometric", [0.1, 0.2]), r"the reference has 2 truth ratios, the model 3")
    other = from_items([("x", 0.1), ("y", 0.2), ("i2", 0.3)], definition=own.definition, higher_is_better=False)
    refused(other, "other items")
    chat = from_items([("i0", 0.1)], definition="truth_ratio_geometric@1(with_end,chat:5fb8ff)", higher_is_better=False)
    refused(chat, "is truth_ratio_geometric@1.with_end,chat:5fb8ff. there")
    file.unlink()
    with pytest.raises(CombineError, match="no such file"):
        combine(spec, results)
