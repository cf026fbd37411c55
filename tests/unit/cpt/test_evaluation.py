"""What a stage's results are known by: everything that decides them, and nothing that does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from cpt.config import DriftSource, Stream
from cpt.data.sources import load
from cpt.drift import DriftPlan
from cpt.errors import DataError
from cpt.evaluation import Plan, _model_identity
from eval_harness.cache import Cache


@pytest.fixture
def stream() -> Stream:
    return Stream.parse(
        {"name": "s", "model": "tiny-world", "stages": [{"name": "a", "data": {"task": "tiny_world/copy"}}]}
    )


def planned(stream: Stream, tokenizer: Any, base: str = "base", **source: Any) -> DriftPlan:
    asked = DriftSource(task="tiny_world/copy", limit=3, **source)
    return DriftPlan.of(asked, load(asked, None, "evaluation.drift"), stream, base, tokenizer)


def test_a_plan_of_drift_follows_what_decides_it_and_not_the_libraries(
    stream: Stream, tiny_tokenizer: Any, tiny_world_dir: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = planned(stream, tiny_tokenizer)
    other = AutoTokenizer.from_pretrained(tiny_world_dir)
    other.add_tokens(["river"])  # the same template, other ids
    changed = [
        planned(stream, other),
        planned(stream, tiny_tokenizer, base="other"),
        planned(stream, tiny_tokenizer, weights=False),
        planned(stream, tiny_tokenizer, split="test"),
    ]
    assert len({first.id, *(one.id for one in changed)}) == 1 + len(changed)
    monkeypatch.setattr("cpt.drift.versions", lambda: {"torch": "0"})
    assert planned(stream, tiny_tokenizer).id == first.id
    monkeypatch.setattr("cpt.drift.SCHEMA_VERSION", 0)
    assert planned(stream, tiny_tokenizer).id != first.id


def test_drift_of_other_libraries_is_measured_again(
    stream: Stream, tiny_tokenizer: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, store, opened = planned(stream, tiny_tokenizer), Cache(tmp_path / "scores"), []

    def opening() -> Any:
        opened.append(1)
        raise LookupError

    monkeypatch.setattr("cpt.drift.drift", lambda *a, **k: {})
    monkeypatch.setattr("cpt.drift.open_model", lambda *a: None)
    plan = DriftPlan(plan.rows, plan.prompting, False, plan.base, plan.id)
    processes = SimpleNamespace(on_main=lambda function: function(), world=1)

    def measured(opening: Any) -> Any:
        folder = tmp_path / "01_a" / "model"
        stop = SimpleNamespace(here=None)
        return plan.measure(folder, "weights", opening, stream, tiny_tokenizer, store, stop, processes)  # type: ignore[arg-type]

    assert measured(lambda: None) == {} == measured(opening)
    assert not opened
    monkeypatch.setattr("cpt.drift.versions", lambda: {"torch": "0"})
    with pytest.raises(LookupError):
        measured(opening)


def test_scores_belong_to_the_kind_of_device(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {}
    for has in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has=has: has)
        there[has] = _model_identity({"model.safetensors": "a"}, stream)
    assert there[True] != there[False]


def test_a_conversation_without_a_template_is_named_before_anything_is_measured(
    stream: Stream, tiny_tokenizer: Any
) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    asked = DriftSource(rows=[row, {"text": "a"}])
    plain = stream.model_copy(update={"evaluation": stream.evaluation.model_copy(update={"chat_template": "none"})})
    with pytest.raises(DataError, match=r"evaluation\.drift: a conversation .* needs a chat template, and none"):
        DriftPlan.of(asked, load(asked, None, "evaluation.drift"), plain, "base", tiny_tokenizer)


def test_every_form_and_the_shots_are_rendered_before_anything_trains(tiny_tokenizer: Any, tiny_world_dir: Any) -> None:
    said = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    test = {"rows": [said, {"prompt": "a", "completion": "b"}]}
    picky = AutoTokenizer.from_pretrained(tiny_world_dir)
    refuse = "{% if messages|length > 2 %}"
    picky.chat_template = refuse + "{{ raise_exception('one question only') }}{% endif %}" + picky.chat_template
    shots = {"num_fewshot": 1, "fewshot": {"rows": [{"prompt": "c", "completion": "d"}]}}
    for tokenizer, more, chat_template, says in (
        (tiny_tokenizer, {}, "none", "a prompt given as messages needs a chat template"),
        (picky, shots, "auto", "refuses a conversation of user, assistant, user: one question only"),
    ):
        stages = [{"name": "a", "data": {"task": "tiny_world/copy"}, "test": test | more}]
        stream = Stream.parse(
            {"name": "s", "model": "tiny-world", "stages": stages, "evaluation": {"chat_template": chat_template}}
        )
        source = stream.stages[0].test
        assert source is not None
        drawn = load(source.fewshot, None, "fewshot") if source.fewshot else None
        sets = {"a": ("task", source, load(source, None, "test"), drawn)}
        with pytest.raises(DataError, match=rf"stages\.a\.test: .*{says}"):
            Plan.of(sets, stream.evaluation, tokenizer)  # type: ignore[arg-type]
