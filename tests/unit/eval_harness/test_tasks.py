"""Task families: a hand-written row of each data set's columns, as the Hub has them, and what is asked of it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from eval_harness.generation import Generation
from eval_harness.measure import MEASURES, check
from eval_harness.rows import Row, canonical
from eval_harness.sources import SourceError, find_task, local_file, read_rows, task_families
from eval_harness.suite import load_suite
from eval_harness.tasks import lettered, whole

NAMES = {
    f"{family}/{name}": task
    for family in task_families()
    if family != "tiny_world"
    for name in __import__(f"eval_harness.tasks.{family}", fromlist=["TASKS"]).TASKS
    if (task := find_task(f"{family}/{name}")) is not None
}

ARC = {
    "id": "M_1",
    "question": "Which is hot?",
    "choices": {"text": ["Ice", "Fire", "Snow"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
# task -> (row of the hub, split, what the row asks, what is right, its choices)
EXAMPLES: dict[str, tuple[dict[str, Any], str, str, str, tuple[str, ...]]] = {
    "multiple_choice/arc_easy": (
        ARC, "test", "Question: Which is hot?\nAnswer:", "Fire", ("Ice", "Fire", "Snow"),
    ),
    "multiple_choice/hellaswag": (
        {"activity_label": "Baking", "ctx_a": "A man stands [title] He", "ctx_b": "he", "label": "1",
         "endings": ["sings [step] a song.", "bakes  bread."]},
        "test", "Baking: A man stands. He He", "bakes bread.", ("sings a song.", "bakes bread."),
    ),
    "multiple_choice/piqa": (
        {"goal": "Open a jar", "sol1": "twist", "sol2": "sing", "label": 0},
        "test", "Question: Open a jar\nAnswer:", "twist", ("twist", "sing"),
    ),
    "multiple_choice/mmlu": (
        {"question": " 2 + 2? ", "subject": "arithmetic", "choices": ["3", "4", "5", "6"], "answer": 1},
        "test", "2 + 2?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer:", "B", ("A", "B", "C", "D"),
    ),
    "multiple_choice/openbookqa": (
        {"question_stem": "Mammals give birth to live",
         "choices": {"text": ["children", "fish"], "label": ["A", "B"]}, "answerKey": "A "},
        "test", "Mammals give birth to live", "children", ("children", "fish"),
    ),
    "multiple_choice/commonsenseqa": (
        {"question": "Where do fish live?", "question_concept": "fish", "answerKey": "C",
         "choices": {"label": ["A", "B", "C"], "text": ["sky", "oven", "sea"]}},
        "test", "Question: Where do fish live?\nA. sky\nB. oven\nC. sea\nAnswer:", "C", ("A", "B", "C"),
    ),
    "multiple_choice/sciq": (
        {"support": " Fire is hot.", "question": "What is hot?", "distractor1": "ice", "distractor2": "snow",
         "distractor3": "rain", "correct_answer": "fire"},
        "test", "Fire is hot.\nQuestion: What is hot?\nAnswer:", "fire", ("ice", "snow", "rain", "fire"),
    ),
    "multiple_choice/boolq": (
        {"passage": "Fire is hot.", "question": "is fire cold", "label": 0, "idx": 3},
        "test", "Fire is hot.\nQuestion: is fire cold?\nAnswer:", "no", ("no", "yes"),
    ),
    "question_answering/squad": (
        {"context": "Paris is in France. ", "question": "Where is Paris? ",
         "answers": {"text": ["France", "in France"], "answer_start": [12, 9]}},
        "test", "Passage: Paris is in France.\nQuestion: Where is Paris?\nAnswer:", "France", (),
    ),
    "question_answering/triviaqa": (
        {"question": "Who wrote Emma?", "answer": {"value": "Jane Austen", "aliases": ["Austen", "Jane Austen"]}},
        "test", "Question: Who wrote Emma?\nAnswer:", "Jane Austen", (),
    ),
    "question_answering/nq_open": (
        {"question": "who wrote emma", "answer": ["Jane Austen", "Austen"]},
        "test", "Question: who wrote emma?\nAnswer:", "Jane Austen", (),
    ),
    "mathematics/gsm8k": (
        {"question": "2 bags of 600?", "answer": "2 * 600 = <<2*600=1200>>1200 in all.\n#### 1,200"},
        "test", "Question: 2 bags of 600?\nAnswer:", "1200", (),
    ),
    "mathematics/math500": (
        {"problem": "$1+1$?", "solution": "It is $\\boxed{2}$.", "answer": "2", "subject": "Algebra", "level": 1},
        "test", "Problem: $1+1$?\nSolution:", "2", (),
    ),
    "mathematics/svamp": (
        {"ID": "chal-1", "Body": "Ann has 3 pens", "Question": "How many pens?", "Equation": "3.0", "Answer": "3.0",
         "Type": "Addition"},
        "test", "Question: Ann has 3 pens. How many pens?\nAnswer:", "3", (),
    ),
    "mathematics/asdiv": (
        {"body": "Ann has 3 pens.", "question": "How many pens?", "answer": "3 (pens)", "formula": "3=3",
         "solution_type": "Addition"},
        "test", "Question: Ann has 3 pens. How many pens?\nAnswer:", "3", (),
    ),
    "summarisation/cnn_dailymail": (
        {"article": "It rained. ", "highlights": "Rain.", "id": "1"}, "test",
        "Article: It rained.\n\nSummary:", "Rain.", (),
    ),
    "summarisation/xsum": (
        {"document": "It rained. ", "summary": "Rain.", "id": "1"}, "test",
        "Article: It rained.\n\nSummary:", "Rain.", (),
    ),
    "cloze/lambada": (
        {"text": "He threw the ball to the dog"}, "test", "He threw the ball to the", "dog", (),
    ),
    "cloze/wikidata_facts": (
        {"inputs": "The capital of France is ", "targets": ["Paris"]}, "test", "The capital of France is", "Paris", (),
    ),
    "memorisation/tofu_full": (
        {"question": "Who is Ann?", "answer": "Ann is a baker."}, "test", "Who is Ann?", "Ann is a baker.", (),
    ),
}  # fmt: skip


def of_hub(task: str, raw: dict[str, Any], split: str) -> Row:
    """A row of the hub, as `read_rows` gives it, in canonical form."""
    found = NAMES[task]
    return canonical(found.asked(found.row(raw), split))


@pytest.mark.parametrize("task", EXAMPLES)
def test_a_row_of_the_hub_is_asked(task: str) -> None:
    raw, split, prompt, answer, choices = EXAMPLES[task]
    row = of_hub(task, raw, split)
    assert (row.prompt, row.completion, row.choices) == (prompt, answer, choices)


def test_every_task_has_an_example_or_the_form_of_one() -> None:
    forms = {NAMES[task].row for task in EXAMPLES}
    texts = {"language_modelling/wikitext2", "language_modelling/tinystories", "multiple_choice/truthfulqa_mc1"}
    assert [name for name, task in NAMES.items() if task.row not in forms and name not in texts] == []


def test_texts() -> None:
    assert (
        of_hub("language_modelling/wikitext2", {"page": " = Rain = \nIt rains."}, "test").text == "= Rain = \nIt rains."
    )
    assert of_hub("language_modelling/tinystories", {"text": "Once.\n"}, "test").text == "Once."


def test_truthfulqa_does_not_list_the_right_answer_first_always() -> None:
    """A model without preference takes the first of equals: on the Hub's order that would be 100 %."""
    firsts = 0
    for number in range(40):
        raw = {
            "question": f"Question {number}?",
            "mc1_targets": {"choices": ["a", "b", "c", "d"], "labels": [1, 0, 0, 0]},
        }
        row = of_hub("multiple_choice/truthfulqa_mc1", raw, "test")
        assert row.completion == "a"
        assert sorted(row.choices) == ["a", "b", "c", "d"]
        assert row == of_hub("multiple_choice/truthfulqa_mc1", raw, "test")
        firsts += row.choices[0] == "a"
    assert 2 <= firsts <= 20  # 10 expected; binomial tails below 1e-3


def test_training_rows_of_mathematics_are_worked_out() -> None:
    raw = {"question": "2 bags of 600?", "answer": "2 * 600 = <<2*600=1200>>1200 in all.\n#### 1,200"}
    assert of_hub("mathematics/gsm8k", raw, "train").completion == "2 * 600 = 1200 in all.\n#### 1200"
    boxed = {"problem": "$1+1$?", "solution": "It is $\\boxed{2}$.", "answer": "2", "subject": "Algebra"}
    assert of_hub("mathematics/math500", boxed, "train").completion == "It is $\\boxed{2}$."
    task = NAMES["mathematics/gsm8k"]
    assert task.asked({"question": "1?", "answer": "1"}, "train")["answer"] == "#### 1"
    assert NAMES["mathematics/math500"].asked({"question": "1?", "answer": "1"}, "train")["answer"] == "\\boxed{1}"


def test_tofu_keeps_paraphrase_and_rivals() -> None:
    raw = {"question": "Who?", "answer": "Ann.", "paraphrased_answer": "It is Ann.", "perturbed_answer": ["It is Bo."]}
    row = of_hub("memorisation/tofu_forget10", raw | {"paraphrased_question": "Which?"}, "test")
    assert (row.paraphrase, row.perturbed) == ("It is Ann.", ("It is Bo.",))


@pytest.mark.parametrize("name", NAMES)
def test_what_a_task_says_of_itself_can_be(name: str) -> None:
    task = NAMES[name]
    assert "test" in task.splits
    assert list(Generation(**{**task.generate, "stop": tuple(task.generate.get("stop", ()))}).problems()) == []
    assert [measure for measure in task.measures if measure not in MEASURES] == []
    writes = any("generation" in MEASURES[measure].asks for measure in task.measures)
    assert writes == ("max_new_tokens" in task.generate)
    assert task.licence
    assert task.source
    assert "{question}" in task.prompt
    assert not task.num_fewshot or task.fewshot_split in task.splits


def test_lettered() -> None:
    asked = lettered({"question": "Hot?", "choices": ["ice", "fire"], "answer": "fire"})
    assert asked == {"question": "Hot?\nA. ice\nB. fire", "choices": ["A", "B"], "answer_index": 1}
    with pytest.raises(ValueError, match="27 choices"):
        lettered({"question": "?", "choices": list(map(str, range(27))), "answer_index": 0})


@pytest.mark.parametrize(
    ("given", "said"), [("145.0", "145"), (7, "7"), ("-2.00", "-2"), ("2.5", "2.5"), ("a.0", "a.0")]
)
def test_whole(given: Any, said: str) -> None:
    assert whole(given) == said


# ---- local files in the place of the hub -----------------------------------------------------------------


def write(path: Any, *rows: dict[str, Any]) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_folder_of_files_wins_over_the_hub(tmp_path: Any) -> None:
    row = {"question": "Which is hot?", "choices": ["ice", "fire"], "answer_index": 1}
    write(tmp_path / "general" / "arc_easy.test.jsonl", row)
    rows = read_rows(task="multiple_choice/arc_easy", split="test", data=tmp_path)
    assert rows == [row | {"question": "Question: Which is hot?\nAnswer:"}]
    with pytest.raises(SourceError, match=r"ai2_arc'.*cannot be loaded.*has no arc_easy\.train\.jsonl"):
        read_rows(task="multiple_choice/arc_easy", split="train", data=tmp_path)
    with pytest.raises(SourceError, match=r"cannot be loaded.*none is given"):
        read_rows(task="multiple_choice/arc_easy", split="test")


def test_a_file_without_split_and_of_another_name(tmp_path: Any) -> None:
    write(
        tmp_path / "tofu" / "forget10_perturbed.json",
        {"question": "Who?", "answer": "Ann."},
        {"question": "?", "answer": "B"},
    )
    rows = read_rows(task="memorisation/tofu_forget10", split="train", data=tmp_path)
    assert [row["answer"] for row in rows] == ["Ann.", "B"]
    exact = write(tmp_path / "forget10_perturbed.train.jsonl", {"question": "Who?", "answer": "C"})
    assert local_file(tmp_path, "forget10_perturbed", "train") == exact
    write(tmp_path / "tofu" / "forget10_perturbed.train.jsonl", {"question": "Who?", "answer": "C"})
    with pytest.raises(SourceError, match=r"forget10_perturbed\.train is there 2 times"):
        local_file(tmp_path, "forget10_perturbed", "train")


def test_rows_that_a_task_cannot_ask_name_the_file_and_the_row(tmp_path: Any) -> None:
    good = {"question": "Hot?", "choices": ["ice", "fire"], "answer_index": 1}
    write(tmp_path / "mmlu.test.jsonl", good, {"question": "Hot?", "answer": "fire"})
    with pytest.raises(SourceError, match=r"mmlu\.test\.jsonl: row 1: no 'choices' \(fields found: question, answer\)"):
        read_rows(task="multiple_choice/mmlu", split="test", data=tmp_path)
    write(tmp_path / "mmlu.test.jsonl", good, {"question": "Hot?", "choices": ["ice", "fire"], "answer": "sun"})
    with pytest.raises(SourceError, match=r"mmlu\.test\.jsonl: row 1: 'sun' is not in list"):
        read_rows(task="multiple_choice/mmlu", split="test", data=tmp_path)


def test_a_split_that_a_data_set_does_not_have(tmp_path: Any) -> None:
    with pytest.raises(SourceError, match=r"lambada_openai has no split 'train' here; it has test\..*lambada\.train"):
        read_rows(task="cloze/lambada", split="train", data=tmp_path)
    with pytest.raises(SourceError, match="no such folder"):
        read_rows(task="cloze/lambada", split="test", data=tmp_path / "nowhere")


def test_rows_of_a_hub_whose_columns_changed_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from eval_harness import sources

    asked = []
    monkeypatch.setattr(sources, "_read_hub", lambda *where: asked.append(where) or [ARC, {"question": "?"}])
    with pytest.raises(SourceError, match=r"arc_easy': allenai/ai2_arc, split 'test': row 1: no 'choices'"):
        read_rows(task="multiple_choice/arc_easy", split="test", revision="abc")
    assert asked == [("allenai/ai2_arc", "ARC-Easy", "test", "abc")]


def test_every_task_stands_on_its_page(root: Any) -> None:
    page = (root / "docs" / "evaluate.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+/\w+)` \| ([^|]*) \| ([\d,]+) \| (\d+) \| ([^|]*) \|$", page, re.MULTILINE)
    said = {name: (hub, count, int(shots), licence) for name, hub, count, shots, licence in rows}
    assert said == {
        name: (" ".join(filter(None, (t.hub, t.config))), f"{t.test_rows:,}", t.num_fewshot, t.licence)
        for name, t in NAMES.items()
    }


@pytest.mark.shared
@pytest.mark.parametrize("suite", ["general", "memorisation"])
def test_shipped_suites_read_the_research_data(shared: Any, suite: str) -> None:
    found = load_suite(suite, data=shared / "data", limit=20)
    assert all(len(one.rows) == 20 for one in found.sets)
    assert check(found.sets)
    shots = {one.name: (one.prompting.num_fewshot, bool(one.fewshot)) for one in found.sets}
    assert shots.get("gsm8k", (5, True)) == (5, True)
