"""Suites: what every key does, what each wrong one says, all problems at once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from eval_harness.generation import Generation
from eval_harness.lm_eval_adapter import LmEvalSet
from eval_harness.prompts import Prompting
from eval_harness.suite import SHIPPED, SuiteError, load_suite, outline, shipped
from eval_harness.suite_keys import GENERATE, KEYS, LM_EVAL_KEYS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files that suites name."""
    write(tmp_path / "rows.jsonl", *({"q": f"word {i}?", "a": "river"} for i in range(8)))
    write(tmp_path / "shots.jsonl", *({"q": f"shot {i}?", "a": "sea"} for i in range(4)))
    write(tmp_path / "text.jsonl", {"text": "Rain falls."})
    write(
        tmp_path / "choices.jsonl",
        *({"question": "Hot?", "choices": ["ice", f"fire {i}"], "answer_index": 1} for i in range(3)),
    )
    write(
        tmp_path / "arc_easy.test.jsonl",
        *({"question": f"Hot {i}?", "choices": ["ice", "fire"], "answer_index": 1} for i in range(9)),
    )
    write(tmp_path / "arc_easy.train.jsonl", {"question": "Cold?", "choices": ["ice", "fire"], "answer_index": 0})
    return tmp_path


def write(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def suite(folder: Path, text: str) -> str:
    path = folder / "s.yaml"
    path.write_text(text)
    return str(path)


def test_every_key_reaches_its_set(folder: Path) -> None:
    text = """
description: all of them
sets:
  words:
    file: rows.jsonl
    fields: {question: q, answer: a}
    limit: 5
    measures: [exact_match]
    group: general
    exact_match: generate
    chat_template: none
    system: Answer in a word.
    strip_reasoning: "<think>.*?</think>"
    num_fewshot: 2
    fewshot_file: shots.jsonl
    fewshot_seed: 7
    generate: {max_new_tokens: 4, stop: ["."], temperature: 0.5, top_p: 0.9, top_k: 3, seed: 1}
"""
    found = load_suite(suite(folder, text))
    (one,) = found.sets
    assert found.description == "all of them"
    assert [row.prompt for row in one.rows] == [f"word {i}?" for i in range(5)]
    assert (one.measures, one.group, one.exact_match) == (("exact_match",), "general", "generate")
    assert one.prompting == Prompting("none", "Answer in a word.", 2, 7, "<think>.*?</think>")
    assert one.generation == Generation(4, (".",), 0.5, 0.9, 3, 1)
    assert [row.prompt for row in one.fewshot] == [f"shot {i}?" for i in range(4)]


def test_a_set_takes_from_its_task_what_it_leaves_out(folder: Path) -> None:
    own = "a: {task: multiple_choice/arc_easy}"
    other = "b: {task: multiple_choice/arc_easy, num_fewshot: 1, measures: [acc], chat_template: none}"
    one, two = load_suite(suite(folder, f"sets:\n  {own}\n  {other}\n"), data=folder, limit=2).sets
    assert (one.measures, one.prompting, one.fewshot) == (("acc", "acc_norm"), Prompting(), [])
    assert one.rows[0].prompt == "Question: Hot 0?\nAnswer:"
    assert (two.measures, two.prompting.num_fewshot, two.prompting.chat_template) == (("acc",), 1, "none")
    assert [row.prompt for row in two.fewshot] == ["Question: Cold?\nAnswer:"]


def test_reasoning_pattern_of_the_harness(folder: Path) -> None:
    text = pytest.importorskip("eval_harness.metrics.text")
    (one,) = load_suite(suite(folder, "sets: {a: {file: choices.jsonl, strip_reasoning: true}}")).sets
    assert one.prompting.strip_reasoning == text.REASONING


def test_a_pattern_is_of_the_module_that_cuts_with_it(folder: Path) -> None:
    (one,) = load_suite(suite(folder, r"sets: {a: {file: choices.jsonl, strip_reasoning: '\p{Han}+'}}")).sets
    assert one.prompting.strip_reasoning == r"\p{Han}+"
    with pytest.raises(SuiteError, match=r"strip_reasoning = '': must be true, false or a regular expression$"):
        load_suite(suite(folder, "sets: {a: {file: choices.jsonl, strip_reasoning: ''}}"))


def test_limits_take_the_first_rows_and_nest(folder: Path) -> None:
    def ids(limit: int | None, more: str = "") -> list[str]:
        text = f"sets: {{a: {{file: rows.jsonl, fields: {{question: q, answer: a}}, limit: 6{more}}}}}"
        return [row.id for row in load_suite(suite(folder, text), limit=limit).sets[0].rows]

    assert ids(3) == ids(None)[:3]
    assert len(ids(100)) == 6
    shuffled = ids(None, ", shuffle: true")
    assert ids(3, ", shuffle: true") == shuffled[:3]
    assert shuffled != ids(None)
    assert len(set(shuffled)) == 6


def test_a_seed_is_for_sets_that_draw_and_name_none(folder: Path) -> None:
    def seeds(generate: str) -> tuple[int, int]:
        (one,) = load_suite(suite(folder, f"sets: {{a: {{file: choices.jsonl, {generate}}}}}"), seed=9).sets
        return one.prompting.fewshot_seed, one.generation.seed

    assert seeds("generate: {temperature: 1.0}") == (9, 9)
    assert seeds("fewshot_seed: 3, generate: {temperature: 1.0, seed: 4}") == (3, 4)
    assert seeds("group: task") == (9, 0)


def test_lm_eval_sets_stand_beside_the_others(folder: Path) -> None:
    (folder / "tasks").mkdir()
    asked = "lm_eval: winogrande, num_fewshot: 5, include_path: tasks, limit: 50, chat_template: auto"
    text = f"sets: {{w: {{{asked}}}, t: {{file: text.jsonl}}}}"
    found = load_suite(suite(folder, text), limit=20)
    expected = LmEvalSet("w", "winogrande", 5, str(folder / "tasks"), 20, "general", apply_chat_template=True)
    assert found.lm_eval == [expected]
    assert found.names == ["t", "w"]


def test_combined_quantities_are_checked_with_their_sets(folder: Path) -> None:
    write(folder / "tofu.jsonl", {"question": "Who?", "answer": "Ann.", "perturbed_answer": ["Bo."]})
    sets = "sets: {members: {file: tofu.jsonl, measures: [min_k]}, others: {file: choices.jsonl, measures: [min_k]}}\n"
    good = "combined: {auc: {measure: membership_auc, members: members, nonmembers: others}}"
    assert load_suite(suite(folder, sets + good)).combined["auc"]["members"] == "members"
    for bad, said in (
        ("{auc: {measure: membership_au, members: members}}", "combined.auc.measure = 'membership_au': did you mean"),
        ("{auc: {measure: membership_auc, members: nobody, nonmembers: others}}", "names the set 'nobody'"),
        ("{p: {measure: privleak, members: members, nonmembers: others, reference: no.json}}", "no.json"),
        ("{others: {measure: membership_auc}}", "combined.others: is the name of a set"),
        ("[1]", r"combined = \[1\]: must map"),
    ):
        with pytest.raises(SuiteError, match=said):
            load_suite(suite(folder, f"{sets}combined: {bad}"))


def test_every_problem_of_a_suite_at_once(folder: Path) -> None:
    text = """
sets:
  a: {file: a.jsonl, measure: [x], group: tsk, limit: 0}
  b: {split: test}
  c: 3
  d: {file: d.jsonl, measures: exact_match, fields: [q], style: plain}
  e: {task: multiple_choice/arc_esy, chat_template: plain, system: ""}
  f: {file: f.jsonl, num_fewshot: 2}
  g: {file: g.jsonl, generate: {max_new_tokens: many, stops: [x]}}
  h: {file: h.jsonl, generate: {top_p: 0.5}, strip_reasoning: "("}
  i: {lm_eval: winogrande, measures: [acc]}
  j: {file: j.jsonl, fewshot_split: train, fewshot_file: x.jsonl, shuffle: 3}
  k: {file: k.jsonl, generate: [1], num_fewshot: -1, measures: []}
"""
    with pytest.raises(SuiteError) as caught:
        load_suite(suite(folder, text))
    said = str(caught.value).splitlines()
    for part in (
        "sets.a.measure: unknown key: did you mean 'measures'",
        "sets.a.group = 'tsk': must be one of task, general",
        "sets.a.limit = 0: must be a whole number of at least 1",
        "sets.b: needs exactly one of task, file, hub, lm_eval",
        "sets.c = 3: must be a mapping",
        "sets.d.measures = 'exact_match'",
        "sets.d.fields = ['q']",
        "sets.d.style: unknown key",
        "sets.e.task = 'multiple_choice/arc_esy': multiple_choice has no task 'arc_esy'. Did you mean 'arc_easy'",
        "sets.e.chat_template = 'plain': must be one of auto, none",
        "sets.e.system = '': must be text that is not empty",
        "sets.f.num_fewshot = 2: a file is one split",
        "sets.g.generate.max_new_tokens = 'many': must be int",
        "sets.g.generate.stops: unknown key: did you mean 'stop'",
        "sets.h.generate.top_p and top_k need a temperature above 0",
        "sets.h.strip_reasoning = '(': must be true, false or a regular expression",
        "sets.i.measures: unknown key",
        "sets.j: shots come from fewshot_split or from fewshot_file, not both",
        "sets.j.shuffle = 3: must be true or false",
        "sets.k.generate = [1]: must be a mapping",
        "sets.k.num_fewshot = -1: must be a whole number of at least 0",
        "sets.k.measures = []: must be a list of names",
    ):
        assert sum(part in line for line in said) == 1, (part, said)
    assert len(said) == 22, said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("sets: {a: {file: no.jsonl}}", "sets.a: file = .*no such file"),
        ("sets: {a: {file: mixed.jsonl}}", r"sets.a: .*mixed\.jsonl: row 1: no known form"),
        ("sets: {a: {file: wrong.jsonl}}", r"sets.a: .*wrong\.jsonl: row 1: answer 'sun' is not among the choices"),
        ("sets: {a: {file: some.jsonl, measures: [acc]}}", r"some\.jsonl: row 1: acc is .* without choices"),
        ("sets: {a: {file: text.jsonl, measures: [acc]}}", r"row 0: acc is not defined for a row without choices$"),
        ("sets: {a: {file: some.jsonl, measures: [bits_per_byte]}}", r"row 0 \(and 1 more\): bits_per_byte is .*ion"),
        ("sets: {a: {file: text.jsonl, measures: [bits_per_bite]}}", "'bits_per_bite': unknown: did you mean 'bits"),
        ("sets: {a: {file: empty.jsonl}}", r"sets.a: file = .*empty\.jsonl'?: no rows"),
        ("sets: [", "not readable YAML"),
        ("sets: {a: {task: tiny_world/text}, a: {task: tiny_world/sums}}", "'a' is there twice in .*line 1, column 7"),
        ("[]", "must be a mapping"),
        ("sets: {}", "`sets` must map"),
        ("stes: {}", "unknown keys stes"),
    ],
)  # fmt: skip
def test_suites_that_cannot_be_read(folder: Path, content: str, said: str) -> None:
    good = {"question": "Hot?", "choices": ["ice", "fire"], "answer": "fire"}
    write(folder / "mixed.jsonl", {"text": "a"}, {"txt": "b"})
    write(folder / "wrong.jsonl", good, good | {"answer": "sun"})
    write(folder / "some.jsonl", good, {"question": "Hot?", "answer": "fire"})
    write(folder / "empty.jsonl")
    with pytest.raises(SuiteError, match=said):
        load_suite(suite(folder, content))


def test_keys_rows_and_plans_are_said_in_one_round(folder: Path) -> None:
    good = {"question": "Hot?", "answer": "fire"}
    write(folder / "bad.jsonl", good, *({"q": i} for i in range(5)), good)
    text = """
sets:
  a: {file: rows.jsonl, fields: {question: q, answer: a}, shuffel: true}
  b: {file: bad.jsonl, measures: [contains_answer, acc, rouge_1]}
  c: {file: bad.jsonl, limit: 1, num_fewshot: 1, fewshot_file: bad.jsonl}
combined:
  u: {measure: membership_auc, members: a, nonmembers: b, score: min_k}
  v: {measure: membership_auc, members: a, nonmembers: nobody, score: min_k}
"""
    with pytest.raises(SuiteError) as caught:
        load_suite(suite(folder, text))
    lines, file = str(caught.value).splitlines(), f"{folder / 'bad.jsonl'}"
    expected = [
        "sets.a.shuffel: unknown key: did you mean 'shuffle'",
        *(f"sets.b: {file}: row {row}: no known form" for row in (1, 2, 3)),
        "sets.b: 2 more rows cannot be read either",
        f"sets.b: {file}: row 0 (and 1 more): acc is not defined for a row without choices",
        "sets.b: measures: 'rouge_1': unknown: did you mean 'rouge_l'",
        "sets.b: what is written has no end: give generate.max_new_tokens",
        *(f"sets.c: {file}: row {row}: no known form" for row in (1, 2, 3)),
        "sets.c: 2 more rows cannot be read either",
        "sets.c: num_fewshot = 1: only 0 completion rows",
        "combined.v: names the set 'nobody'",
    ]
    assert len(lines) == len(expected), lines
    for line, part in zip(lines, expected, strict=True):
        assert line.startswith(f"{folder / 's.yaml'}: {part}")


def test_unknown_suites_are_named() -> None:
    with pytest.raises(SuiteError, match="did you mean 'tiny_world'"):
        load_suite("tiny_wrld")
    with pytest.raises(SuiteError, match=r"none\.yaml: no such file"):
        load_suite("none.yaml")


def test_the_tiny_world_loads_without_anything() -> None:
    sets = load_suite("tiny_world", limit=2).sets
    assert [one.name for one in sets] == ["facts", "facts_heldout", "sums", "sums_heldout", "copy", "sort", "text"]
    assert all(len(one.rows) == 2 and one.group == "general" for one in sets)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_an_outline_says_what_a_suite_costs_without_reading_it(path: Path) -> None:
    found = outline(path.stem, limit=100)
    assert all(rows is not None and 1 <= rows <= 100 for _, _, rows in found)
    assert shipped()[path.stem]


def test_the_descriptions_count_rows_rightly() -> None:
    for name, said in (("general", "4,162"), ("memorisation", "1,017"), ("reading", "500")):
        assert f"{sum(rows or 0 for _, _, rows in outline(name)):,}" == said
        assert f"{said} rows" in shipped()[name]


def test_an_outline_knows_rows_of_limits_only(folder: Path) -> None:
    known = "b: {lm_eval: piqa, limit: 3}, d: {task: tiny_world/text}"
    text = f"sets: {{a: {{file: rows.jsonl}}, {known}, c: {{task: cloze/lambada, split: train}}}}"
    expected = [("a", "file rows.jsonl", None), ("b", "lm_eval piqa", 3), ("d", "task tiny_world/text", 50)]
    assert outline(suite(folder, text)) == [*expected, ("c", "task cloze/lambada", None)]


def test_every_key_stands_on_its_page(root: Path) -> None:
    page = (root / "docs" / "evaluate.md").read_text(encoding="utf-8").split("## A suite")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(KEYS)
    assert [key for key in (*LM_EVAL_KEYS, *GENERATE) if f"`{key}" not in page] == []


def test_every_shipped_suite_stands_on_its_page(root: Path) -> None:
    page = (root / "docs" / "evaluate.md").read_text(encoding="utf-8").split("## Shipped suites")[1].split("\n## ")[0]
    said = dict(re.findall(r"^\| `(\w+)` \| [^|]* \| ([\d,]+) \|", page, re.MULTILINE))
    assert said == {name: f"{sum(rows or 0 for _, _, rows in outline(name)):,}" for name in shipped()}
