"""Rows that a base draws itself: by seed, each once, gone on with after a kill, told when they do not come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpt import ConfigError, DataError, Stream
from cpt import draw as drawing
from cpt.draw import Drawing, draw
from cpt.errors import UserStopped
from eval_harness.generation import Generation, generate
from eval_harness.prompts import PromptError, prompt_ids, text_start, user_turn
from eval_harness.rows import Row

STREAM = Stream.parse({"name": "base", "model": "tiny-world", "stages": []})
SHORT = {"max_new_tokens": 96}


def quietly(line: str) -> None:
    pass


def rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_texts_follow_from_the_seed_and_are_the_bases_own(tmp_path: Path) -> None:
    found = draw(STREAM, Drawing(70, **SHORT), tmp_path / "a.jsonl", quietly)
    assert found["rows"] == 70
    texts = [row["text"] for row in rows(tmp_path / "a.jsonl")]
    assert len(set(texts)) == 70
    assert sum(text.endswith(".") for text in texts) == 70 - found["without_end"]  # the stories that it was taught
    draw(STREAM, Drawing(3, **SHORT), tmp_path / "b.jsonl", quietly)
    assert [row["text"] for row in rows(tmp_path / "b.jsonl")] == texts[:3]
    draw(STREAM, Drawing(3, seed=1, **SHORT), tmp_path / "c.jsonl", quietly)
    assert not {row["text"] for row in rows(tmp_path / "c.jsonl")} & set(texts)


def test_a_kill_loses_a_part_and_a_cut_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any
) -> None:
    monkeypatch.setattr(drawing, "PART", 4)
    draw(STREAM, Drawing(10, **SHORT), tmp_path / "whole.jsonl", quietly)
    made, ways = list[int](), drawing._drawn

    def killed(*about: Any) -> Any:
        made.append(about[4].start)
        if len(made) == 2:
            raise KeyboardInterrupt
        return ways(*about)

    monkeypatch.setattr(drawing, "_drawn", killed)
    with pytest.raises(KeyboardInterrupt):
        draw(STREAM, Drawing(10, **SHORT), tmp_path / "part.jsonl", quietly)
    aside = tmp_path / ".part.jsonl.partial"
    aside.write_text(aside.read_text() + '{"row": {"te')
    assert not (tmp_path / "part.jsonl").exists()
    draw(STREAM, Drawing(10, **SHORT), tmp_path / "part.jsonl", quietly)
    assert made == [0, 4, 4, 8]
    assert (tmp_path / "part.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not aside.exists()


def test_what_was_drawn_otherwise_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aside = tmp_path / ".rows.jsonl.partial"
    aside.write_text('{"base": "another"}\n' + '{"row": {"text": "of another base"}, "ended": true}\n' * 64)
    draw(STREAM, Drawing(2, **SHORT), tmp_path / "rows.jsonl", quietly)
    assert "of another base" not in (tmp_path / "rows.jsonl").read_text()


def test_a_conversation_is_a_turn_and_its_answer(tmp_path: Path, tiny_tokenizer: Any) -> None:
    found = draw(STREAM, Drawing(20, chat=True, max_new_tokens=40), tmp_path / "rows.jsonl", quietly)
    (first, *_), n = rows(tmp_path / "rows.jsonl"), found["rows"]
    assert n == 20
    assert set(first) == {"prompt", "completion"}
    assert found["empty"] > 0  # a model that learned answers alone often ends a user's turn for good
    from cpt.models import open_model

    prompt = prompt_ids(tiny_tokenizer, Row("completion", prompt=first["prompt"]))
    numbers = range(64)
    model = open_model(None, STREAM.model)
    how = Generation(40, temperature=1.0)
    answers = {
        tiny_tokenizer.decode(ids, skip_special_tokens=True).strip()
        for ids in generate(model, tiny_tokenizer, [prompt] * 64, how, draws=list(numbers))
    }
    assert first["completion"] in answers


def test_draws_of_one_prompt_differ_and_depend_on_nothing_else(tiny_tokenizer: Any, tiny_llama: Any) -> None:
    model, prompt, how = tiny_llama(seed=3), [5, 6, 7], Generation(6, temperature=1.0, seed=1)
    together = generate(model, tiny_tokenizer, [prompt] * 4, how, draws=[0, 1, 2, 1])
    assert together[1] == together[3]
    assert len({tuple(ids) for ids in together}) == 3
    assert generate(model, tiny_tokenizer, [prompt], how, draws=[2]) == [together[2]]


def test_where_a_users_turn_stands(tiny_tokenizer: Any) -> None:
    head, ends = user_turn(tiny_tokenizer)
    assert tiny_tokenizer.decode(head) == "<|user|>"
    assert ends[0] == "<|assistant|>"
    assert text_start(tiny_tokenizer) == [tiny_tokenizer.eos_token_id]  # it has no bos


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "needs a chat template"),
        ("{% for m in messages %}{{ m['content'] | upper }} end{% endfor %}", "no user's turn with an end"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "no user's turn with an end"),
    ],
)
def test_templates_that_show_no_turn(tiny_tokenizer: Any, template: str | None, said: str) -> None:
    other = tiny_tokenizer.__class__.from_pretrained(tiny_tokenizer.name_or_path)
    other.chat_template = template
    with pytest.raises(PromptError, match=said):
        user_turn(other)


def test_too_few_rows_are_told_with_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"64 draws gave 0 of 2 rows \(64 cut off\): ask for fewer"):
        draw(STREAM, Drawing(2, chat=True, max_new_tokens=1), tmp_path / "rows.jsonl", quietly)
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_stop_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal

    def interrupt(*about: Any, **how: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return generate(*about, **how)

    monkeypatch.setattr(drawing, "generate", interrupt)
    with pytest.raises(UserStopped, match="stopped by Ctrl-C after 0 draws; run the same command again"):
        draw(STREAM, Drawing(2, **SHORT), tmp_path / "rows.jsonl", quietly)


def test_what_cannot_be_asked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        Drawing(0, max_new_tokens=0, temperature=0.0)
    assert [problem.split(":")[0] for problem in error.value.problems] == [
        "rows = 0",
        "max_new_tokens = 0",
        "temperature = 0.0",
    ]
    with pytest.raises(ConfigError, match=r"write .*rows\.jsonl"):
        draw(STREAM, Drawing(1), tmp_path / "rows.json", quietly)
    (tmp_path / "rows.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        draw(STREAM, Drawing(1), tmp_path / "rows.jsonl", quietly)
    draw(STREAM, Drawing(1, **SHORT), tmp_path / "rows.jsonl", quietly, force=True)
    assert len(rows(tmp_path / "rows.jsonl")) == 1
