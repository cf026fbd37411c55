"""Answers written anew: how they are asked for, which are learned, what is kept of them, and who writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cpt.config import Stage
from cpt.data import rewritten as files
from cpt.data.memory import Memory
from cpt.data.rewritten import Written, answered, asked, turn
from cpt.data.sources import Loaded, load
from cpt.data.spec import Source
from cpt.data.stage_data import TASK, StageData
from cpt.errors import DataError, UserStopped
from cpt.methods.base import StageInfo
from cpt.methods.rewrite import MARKERS, TEMPLATE, Rewrite
from cpt.processes import Processes
from cpt.rewards.agreement import agrees, unsuitable
from cpt.signals import StopRequest
from cpt.writing import Writer
from eval_harness.generation import Generation, generate
from eval_harness.prompts import prompt_ids
from eval_harness.rows import Row

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two and two?"}]
ANSWER = {"role": "assistant", "content": "4"}


def loaded(*rows: dict[str, Any]) -> Loaded:
    return load(Source(rows=list(rows)), None, "data")


def numbered(n: int) -> Loaded:
    return loaded(*({"prompt": f"question {i}", "completion": f" answer {i}"} for i in range(n)))


# ---- rows -------------------------------------------------------------------------------------------


def test_a_row_is_asked_for_by_the_template() -> None:
    (row,) = loaded({"prompt": "Two {answer} two?", "completion": " {question}"}).rows
    assert turn(row) == ("Two {answer} two?", " {question}")
    new = asked(row, "Q: {question} A: {answer} {other}")
    assert new.prompt == "Q: Two {answer} two? A:  {question} {other}"  # what was filled in is not read again
    assert answered(row, "anew \n").completion == " anew"  # behind the white space that its answers begin with
    assert answered(row, "anew").id == row.id


@pytest.mark.parametrize("form", [{"messages": [*CHAT, ANSWER]}, {"prompt": CHAT, "completion": [ANSWER]}])
def test_a_conversation_of_one_turn_keeps_its_system_message(form: dict[str, Any]) -> None:
    (row,) = loaded(form).rows
    assert turn(row) == ("Two and two?", "4")
    assert asked(row, "{question} ({answer})").messages == (CHAT[0], {"role": "user", "content": "Two and two? (4)"})
    new = answered(row, "Four.")
    assert turn(new) == ("Two and two?", "Four.")
    assert new.messages[:2] == tuple(CHAT)


def test_several_turns_and_plain_text_are_no_question_with_its_answer() -> None:
    rows = loaded({"messages": [*CHAT, ANSWER, CHAT[1], ANSWER]}, {"text": "plain"}).rows
    assert [turn(row) for row in rows] == [None, None]


# ---- agreement --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "text", "reference", "pattern", "does"),
    [
        ("none", "", "four", None, True),
        ("contains", "It is Four, of course.", "four", None, True),
        ("contains", "It is fourteen.", "four", None, False),
        ("contains", "That makes 4.", "2 + 2 is 4\n#### 4", None, True),
        ("contains", "That makes 2 + 2.", "2 + 2 is 4\n#### 4", None, False),
        ("exact_match", "I see #### 4", "2 + 2 is 4\n#### 4", None, True),
        ("exact_match", "4 it is", "4", None, False),
        ("exact_match", "so (b)", "(b) because", r"\((\w)\)", True),
        ("exact_match", "so b", "(b) because", r"\((\w)\)", False),
        ("numeric", "That makes 4.0", "#### 4", None, True),
        ("numeric", "That makes 5", "#### 4", None, False),
        ("math", r"\boxed{\frac{2}{4}}", r"\boxed{\frac{1}{2}}", None, True),
        ("math", r"\boxed{\frac{3}{4}}", r"\boxed{\frac{1}{2}}", None, False),
    ],
)
def test_agreement(how: Any, text: str, reference: str, pattern: str | None, does: bool) -> None:
    assert agrees(how, text, [reference], pattern) is does
    assert agrees(how, text, ["quite 77 another", reference], pattern) is does
    assert unsuitable(how, reference, pattern) is None


@pytest.mark.parametrize(
    ("how", "reference", "pattern", "said"),
    [
        ("contains", "...", None, "no letter and no digit"),
        ("contains", "text ####  ", None, "its final answer is empty"),
        ("exact_match", "none here", r"\((\w)\)", "the pattern finds no answer in 'none here'"),
        ("numeric", "no number", None, "no number"),
    ],
)
def test_references_that_nothing_agrees_with(how: Any, reference: str, pattern: str | None, said: str) -> None:
    assert said in str(unsuitable(how, reference, pattern))


# ---- the method -------------------------------------------------------------------------------------


@dataclass
class Desk:
    """A stage whose answers are written by a script: text by prompt."""

    memory: Path
    rows: Loaded
    script: Any = lambda prompt: Written("anew", True)
    asked: list[str] = field(default_factory=list)
    given: dict[str, Any] = field(default_factory=dict)

    def generate(self, **how: Any) -> Any:
        self.given = how
        return self.parts

    def parts(self, parts: Sequence[Sequence[Row]]) -> Iterator[list[Written | None]]:
        for part in parts:
            self.asked += [str(row.prompt) for row in part]
            yield [self.script(row.prompt) for row in part]

    def prepare(self, **fields: Any) -> tuple[list[Row], dict[str, Any]]:
        """What is learned, and the method's facts."""
        learned: list[Row] = []
        data = StageData(lambda rows, place, most: learned.extend(rows.rows) or "tokenised")  # type: ignore[union-attr, return-value]
        method = Rewrite(**{"template": "{question}|{answer}", **fields})
        lent = {"rows": self.rows, "generate": self.generate, "memory": self.memory, "parent": "start"}
        method.prepare_data(data, StageInfo(1, "two", "sft", seed=7, batch_rows=4, **lent))
        assert data.sources[TASK] == "tokenised"
        return learned, method.facts()


def test_what_is_learned_and_why_others_stay(tmp_path: Path) -> None:
    script = {
        "question 0| answer 0": Written("the answer 0 it is", True),
        "question 1| answer 1": Written("the answer 2 it is", True),
        "question 2| answer 2": Written("the answer 2 and so on", False),
        "question 3| answer 3": Written("\n", True),
        "question 4| answer 4": Written("As an AI I say answer 4", True),
        "question 5| answer 5": None,
    }
    desk = Desk(tmp_path, numbered(6), script.__getitem__)
    rows, facts = desk.prepare(verify="contains", max_new_tokens=9, temperature=0.5, stop=["\n"])
    assert [row.completion for row in rows] == [" the answer 0 it is", *(f" answer {i}" for i in range(1, 6))]
    assert facts["stay"] == {"cut_off": 1, "empty": 1, "refused": 1, "too_long": 1, "wrong": 1}
    assert facts["note"].startswith("1 of 6 answers written anew, 1 cut off, 1 empty, ")
    assert desk.given == {"max_new_tokens": 9, "temperature": 0.5, "stop": ("\n",), "seed": 7}
    (entry,) = Memory(tmp_path).entries()
    assert entry.rows == [rows[0].id]
    assert "answer 2" not in "".join(
        file.read_text() for file in tmp_path.rglob("*.json*")
    )  # what was not kept is gone


def test_a_marker_that_the_reference_holds_is_no_refusal(tmp_path: Path) -> None:
    rows = loaded({"prompt": "May I?", "completion": "I cannot say."})
    learned, _ = Desk(tmp_path, rows, lambda prompt: Written("Well, I cannot.", True)).prepare()
    assert learned[0].completion == "Well, I cannot."


def test_a_share_is_drawn_by_the_seed_and_rows_that_repeat_are_asked_once(tmp_path: Path) -> None:
    twice = Loaded("twice", numbered(10).rows * 2, "twice")
    desk = Desk(tmp_path, twice)
    rows, facts = desk.prepare(share=0.3)
    assert facts["asked"] == len(desk.asked) == 3
    assert [row.completion == " anew" for row in rows[:10]] == [row.completion == " anew" for row in rows[10:]]
    assert sum(row.completion == " anew" for row in rows) == 6


def test_written_once_and_gone_on_with_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PART", 4)

    def killed(prompt: str) -> Written:
        if prompt.startswith("question 6"):
            raise KeyboardInterrupt
        return Written(f"anew: {prompt}", True)

    desk = Desk(tmp_path, numbered(10), killed)
    with pytest.raises(KeyboardInterrupt):
        desk.prepare()
    desk.asked, desk.script = [], lambda prompt: Written(f"anew: {prompt}", True)
    rows, facts = desk.prepare()
    assert [prompt.split("|")[0] for prompt in desk.asked] == [f"question {i}" for i in range(4, 10)]
    assert [row.completion for row in rows] == [f" anew: question {i}| answer {i}" for i in range(10)]
    assert not list(tmp_path.rglob("parts"))
    desk.asked = []
    assert desk.prepare() == (rows, facts)
    assert not desk.asked
    desk.prepare(verify="contains")  # another question to the same model
    assert len(desk.asked) == 10


def test_a_forgotten_row_is_not_asked_and_what_was_written_of_it_is_gone(tmp_path: Path) -> None:
    desk = Desk(tmp_path, numbered(4), lambda prompt: Written(f"anew: {prompt}", True))
    rows, _ = desk.prepare()
    assert Memory(tmp_path).forget([rows[2].id])
    assert "question 2" not in "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    again, _ = desk.prepare()
    assert again[2].completion == " answer 2"  # the seam's `load` leaves it out: here it is plain
    assert [row.completion for row in again[:2]] == [row.completion for row in rows[:2]]
    desk.asked = []
    desk.prepare(max_new_tokens=3)
    assert len(desk.asked) == 3


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"template": "{question} alone"}, "needs {answer}, where the row's own go"),
        ({"pattern": "(x)"}, "is for verify: contains or exact_match: leave it out"),
        ({"verify": "contains", "pattern": "x"}, "group"),
        ({"markers": ["ok", " "]}, "must not hold an empty string"),
        ({"stop": [""]}, "must not hold an empty string"),
        ({"temperature": -1.0}, "greater than or equal to 0"),
    ],
)
def test_settings_that_cannot_be(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        Rewrite(**fields)


def test_the_page_says_template_and_markers() -> None:
    page = Path("docs/methods/rewrite.md").read_text(encoding="utf-8")
    assert TEMPLATE in page
    assert all(f"`{one}`" in page for one in MARKERS)


def test_rows_that_cannot_be() -> None:
    several = loaded({"messages": [*CHAT, ANSWER, CHAT[1], ANSWER]}, {"text": "plain"})
    ((field_, said),) = Rewrite().check_rows(several)
    assert field_ == "type"
    assert said.startswith(f"row {several.rows[0].id} and 1 more: is no single question with its answer")
    ((field_, said),) = Rewrite(verify="numeric").check_rows(loaded({"prompt": "Which?", "completion": "neither"}))
    assert field_ == "verify"
    assert said.endswith(": take another way, or none")
    assert not Rewrite(verify="numeric").check_rows(numbered(2))


@pytest.mark.parametrize("kind", ["pretrain", "rft"])
def test_other_kinds_refuse_it(kind: str) -> None:
    rows = [{"text": "plain"}] if kind == "pretrain" else [{"prompt": "a", "completion": "b"}]
    rewards = ["exact_match"] if kind == "rft" else []
    about = {"name": "one", "kind": kind, "data": {"rows": rows}, "rewards": rewards, "methods": ["rewrite"]}
    with pytest.raises(ValueError, match="rewrite"):
        Stage.model_validate(about)


# ---- who writes -------------------------------------------------------------------------------------


@pytest.fixture
def writer(tiny_tokenizer: Any, tiny_llama: Any) -> Writer:
    model = tiny_llama(seed=3)
    return Writer(lambda: model, tiny_tokenizer, "none", 24, Processes(), "two")


def test_the_model_writes_as_the_harness_does(writer: Writer) -> None:
    rows = [Row("completion", prompt="ab " * n) for n in (1, 2, 12, 3)]  # the third leaves no room
    how = {"max_new_tokens": 6, "temperature": 1.0, "seed": 5}
    ((*found,), (last,)) = writer(**how)([rows[:3], rows[3:]])
    prompts = [prompt_ids(writer.tokenizer, row, "none") for row in rows]
    assert len(prompts[2]) > 24 - 6
    assert found[2] is None
    alone = generate(writer.opening(), writer.tokenizer, [prompts[0], prompts[3]], Generation(**how))
    assert [one and one.text for one in (found[0], last)] == [
        writer.tokenizer.decode(ids, skip_special_tokens=True) for ids in alone
    ]
    assert [one and one.ended for one in (found[0], last)] == [
        ids[-1] == writer.tokenizer.eos_token_id for ids in alone
    ]


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(writer: Writer) -> None:
    row = Row("completion", prompt="ab cd")
    ((plain,),) = writer(max_new_tokens=8)([[row]])
    assert plain is not None
    assert not plain.ended
    ((short,),) = writer(max_new_tokens=8, stop=(plain.text[2],))([[row]])
    assert short is not None
    assert short == Written(plain.text.split(plain.text[2])[0], True)


def test_a_stop_between_batches_says_how_to_go_on(writer: Writer) -> None:
    stop = StopRequest()
    stop.signal = 2
    stopped = Writer(*list(vars(writer).values())[:6], stop)
    with pytest.raises(UserStopped, match="in stage 'two', writing answers; run the same command again"):
        list(stopped(max_new_tokens=4)([[Row("completion", prompt="ab")]]))


def test_a_broken_model_is_told(tiny_tokenizer: Any, tiny_llama: Any) -> None:
    model = tiny_llama(seed=3)
    model.lm_head.weight.data.fill_(float("nan"))
    writer = Writer(lambda: model, tiny_tokenizer, "none", 24, Processes(), "two")
    with pytest.raises(DataError, match="stage 'two', writing answers: the logits are NaN"):
        list(writer(max_new_tokens=4)([[Row("completion", prompt="ab")]]))


def test_the_memory_says_whose_answers_they_are(tmp_path: Path) -> None:
    Desk(tmp_path, numbered(2)).prepare()
    (entry,) = Memory(tmp_path).entries()
    about = json.loads((entry.folder / "about.json").read_text())
    assert (about["model"], about["of"], about["source"]) == ("start", "rows", "rows in memory")
