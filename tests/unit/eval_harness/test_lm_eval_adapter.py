"""Tasks of lm-evaluation-harness from local files: what is run, what is said of it, what is refused."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval_harness import lm_eval_adapter
from eval_harness.errors import Interrupted, ScoringError
from eval_harness.lm_eval_adapter import LmEvalError, LmEvalSet, check, jackknife, run
from eval_harness.results import from_document, to_document
from tests.plugins import require

require("lm_eval", find_spec("lm_eval") is not None, "lm-evaluation-harness is not installed")

WORDS = ("river", "harbour", "market", "word")
CHOICES = [{"question": f"word {n}", "choices": list(WORDS), "answer_index": n % 4} for n in range(9)]
CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "question",
    "doc_to_choice": "choices",
    "doc_to_target": "answer_index",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
TEXTS = [{"text": "The capital of France is Paris."}, {"text": "Say the word: river."}, {"text": "a b c"}]
ROLLING: dict[str, Any] = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "text",
    "metric_list": [{"metric": "bits_per_byte"}],
}
WRITTEN: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "question",
    "doc_to_target": "{{choices[answer_index]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "filter_list": [
        {"name": "whole", "filter": [{"function": "take_first"}]},
        {"name": "first", "filter": [{"function": "regex", "regex_pattern": r"(\w)"}, {"function": "take_first"}]},
    ],
}


@pytest.fixture
def task_file(tmp_path: Path) -> Callable[..., str]:
    """`task_file(name, rows, config)`: write a task of lm-eval; returns the folder of all of them."""

    def write(name: str, rows: list[dict[str, Any]], config: dict[str, Any], **more: Any) -> str:
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        about = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
            "test_split": "test",
            "metadata": {"version": 2.0},
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps(about | config | more), encoding="utf-8")  # JSON is YAML
        return str(tmp_path)

    return write


@pytest.fixture(autouse=True)
def _local_tasks_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The index of the shipped tasks takes seconds to build; two names stand for it."""
    from lm_eval.tasks import TaskManager

    shipped = tmp_path / "shipped"
    shipped.mkdir()
    for name in ("arc_easy", "arc_challenge"):
        (shipped / f"{name}.yaml").write_text(f"task: {name}\ndataset_path: no/such\n", encoding="utf-8")
    manager = TaskManager(include_path=str(shipped), include_defaults=False)
    monkeypatch.setattr(lm_eval_adapter, "_shipped", lambda: manager)


# ---- what is said of a task ---------------------------------------------------------------------------


def test_a_result_names_all_that_decides_it(model: Any, tokenizer: Any, task_file: Callable[..., str]) -> None:
    folder = task_file("cities", CHOICES, CHOICE)
    found = run(model, tokenizer, [LmEvalSet("mine", "cities", include_path=folder, limit=8)])["mine"]["acc"]
    version = lm_eval_adapter._Run._version()
    settings = found.definition.partition("settings=")[2][:6]
    assert found.definition == (
        f"lm_eval:acc@2.0(task=cities,filter=none,0-shot,plain,settings={settings},lm_eval={version})"
    )
    assert (found.n, len(found.per_item), found.higher_is_better) == (8, 8, True)
    assert found.value == statistics.fmean(found.per_item.values())
    assert found.stderr == pytest.approx(statistics.stdev(found.per_item.values()) / math.sqrt(8))
    assert from_document(to_document({"mine": {"acc": found}})) == {"mine": {"acc": found}}


def test_unlike_settings_have_unlike_definitions(
    model: Any, tokenizer: Any, task_file: Callable[..., str], tmp_path: Path
) -> None:
    folder = task_file("cities", CHOICES, CHOICE)

    def definition(**settings: Any) -> str:
        one = LmEvalSet("mine", "cities", include_path=folder, limit=2, **settings)
        return run(model, tokenizer, [one])["mine"]["acc"].definition

    plain = definition()
    unlike = [
        plain,
        definition(num_fewshot=2),
        definition(system="Be brief."),
        definition(apply_chat_template=True),
        definition(apply_chat_template=True, system="Be brief."),
    ]
    assert len(set(unlike)) == 5
    assert "2-shot:seed1234" in unlike[1]
    assert "chat:" in unlike[3]
    task_file("cities", CHOICES, CHOICE, doc_to_text="Q: {{question}}")
    assert definition() != plain  # the file's version is the same
    task_file("cities", CHOICES[1:], CHOICE)
    assert definition() == plain  # other items, the same definition
    assert str(tmp_path) not in plain


def test_the_standard_error_of_a_ratio_is_the_jackknifes(
    model: Any, tokenizer: Any, task_file: Callable[..., str]
) -> None:
    folder = task_file("texts", TEXTS, ROLLING)
    found = run(model, tokenizer, [LmEvalSet("texts", "texts", include_path=folder)])["texts"]["bits_per_byte"]
    sizes = [len(row["text"].encode()) for row in TEXTS]
    bits = [one * size for one, size in zip(found.per_item.values(), sizes, strict=True)]
    assert found.value == pytest.approx(sum(bits) / sum(sizes))
    without = [(sum(bits) - bits[i]) / (sum(sizes) - sizes[i]) for i in range(3)]
    assert found.stderr == pytest.approx(math.sqrt(2 / 3 * sum((one - sum(without) / 3) ** 2 for one in without)))
    assert found.higher_is_better is False
    assert found.note == "bits_per_byte over all items, no mean; standard error by jackknife"


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    """(1, 2, 6): the means without one are 4, 3.5, 1.5, their mean 3; sqrt(2/3 x (1 + .25 + 2.25)) = sqrt(7/3)."""
    assert jackknife(statistics.fmean, [1.0, 2.0, 6.0]) == pytest.approx(math.sqrt(7 / 3))
    many = [float(n * n % 17) for n in range(100)]
    assert jackknife(statistics.fmean, many) == pytest.approx(statistics.stdev(many) / 10)
    assert jackknife(statistics.fmean, [1.0]) is None
    assert jackknife(lambda items: math.inf, [1.0, 2.0]) is None


def test_every_filter_is_a_result_of_its_own(model: Any, tokenizer: Any, task_file: Callable[..., str]) -> None:
    folder = task_file("written", CHOICES, WRITTEN)
    found = run(model, tokenizer, [LmEvalSet("w", "written", include_path=folder)])["w"]
    assert list(found) == ["exact_match,whole", "exact_match,first"]
    assert all("filter=" + key.partition(",")[2] in result.definition for key, result in found.items())
    assert all(result.n == len(CHOICES) for result in found.values())


def test_a_group_is_a_set_per_task_and_their_mean(
    model: Any, tokenizer: Any, task_file: Callable[..., str], tmp_path: Path
) -> None:
    task_file("north", CHOICES[:6], CHOICE)
    folder = task_file("south", CHOICES[6:], CHOICE)
    for name, by_size in (("sized", True), ("flat", False)):
        rule = {"metric": "acc", "weight_by_size": by_size}
        group = {"group": name, "task": ["north", "south"], "aggregate_metric_list": [rule], "metadata": {"version": 3}}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(group), encoding="utf-8")
    sized = run(model, tokenizer, [LmEvalSet("g", "sized", include_path=folder)])
    flat = run(model, tokenizer, [LmEvalSet("g", "flat", include_path=folder)])
    assert list(sized) == ["g", "g/north", "g/south"]
    north, south, whole = sized["g/north"]["acc"], sized["g/south"]["acc"], sized["g"]["acc"]
    assert north.value != south.value
    assert whole.value == pytest.approx((6 * north.value + 3 * south.value) / 9)
    assert whole.stderr == pytest.approx(math.hypot(6 * north.stderr, 3 * south.stderr) / 9)
    assert whole.value == pytest.approx(statistics.fmean(whole.per_item.values()))
    assert {name.partition("/")[0] for name in whole.per_item} == {"north", "south"}
    assert flat["g"]["acc"].value == pytest.approx((north.value + south.value) / 2)
    assert flat["g"]["acc"].stderr == pytest.approx(math.hypot(north.stderr, south.stderr) / 2)
    assert flat["g"]["acc"].per_item == {}
    assert whole.n == flat["g"]["acc"].n == 9
    assert whole.definition.startswith("lm_eval:acc@3(group=sized,filter=none,mean of 2 tasks,weighted_by_size,")


def test_contexts_that_were_cut_are_counted(make_model: Any, tokenizer: Any, task_file: Callable[..., str]) -> None:
    rows = [*CHOICES[:3], {**CHOICES[3], "question": "river " * 60}]
    folder = task_file("cities", rows, CHOICE)
    small = make_model(len(tokenizer), max_position_embeddings=32)
    found = run(small, tokenizer, [LmEvalSet("mine", "cities", include_path=folder)])["mine"]["acc"]
    assert found.note == "the context of 1 of 4 items was cut on the left to fit 32 tokens"
    assert found.n == 4


# ---- prompts and generation ---------------------------------------------------------------------------


def test_a_system_message_that_the_template_refuses_is_left_out_and_said(
    model: Any, make_tokenizer: Callable[..., Any], task_file: Callable[..., str]
) -> None:
    tokenizer = make_tokenizer()
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refuses + tokenizer.chat_template
    folder = task_file("cities", CHOICES, CHOICE)
    one = LmEvalSet("mine", "cities", include_path=folder, apply_chat_template=True, system="Be brief.")
    assert run(model, tokenizer, [one])["mine"]["acc"].note == (
        "the chat template refuses a system message; it was left out"
    )


def engine(model: Any, tokenizer: Any) -> Any:
    from eval_harness.lm_eval_model import EngineLM

    return EngineLM(model, tokenizer)


def written(model: Any, tokenizer: Any, text: str, times: int = 1, **settings: Any) -> list[str]:
    from lm_eval.api.instance import Instance

    asked = Instance("generate_until", {}, (text, {"until": [], "max_gen_toks": 8} | settings), 0, ("t", 0, times))
    return engine(model, tokenizer).generate_until([asked] * times)


def test_a_repeated_request_draws_anew_and_the_same_each_time(model: Any, tokenizer: Any) -> None:
    sampled = written(model, tokenizer, "word", 4, do_sample=True, temperature=1.0)
    assert len(set(sampled)) > 1
    assert written(model, tokenizer, "word", 4, do_sample=True, temperature=1.0) == sampled
    assert len(set(written(model, tokenizer, "word", 4, temperature=0.0))) == 1


def test_a_special_token_among_the_stop_strings_ends_the_text(model: Any, tokenizer: Any) -> None:
    lm = engine(model, tokenizer)
    ids = tokenizer("river")["input_ids"] + [tokenizer.convert_tokens_to_ids("<|user|>")] + tokenizer("x")["input_ids"]
    assert lm._text(ids, ("<|user|>",)) == "river"
    assert lm._text(ids, ("ve",)) == "ri"
    assert lm._text(ids, ()) == "riverx"


def test_settings_that_would_be_ignored_are_refused_by_name(model: Any, tokenizer: Any) -> None:
    with pytest.raises(LmEvalError, match=r"task t: generation_kwargs\.num_beams = 4: not supported; allowed: until"):
        written(model, tokenizer, "word", num_beams=4)
    with pytest.raises(LmEvalError, match="do_sample needs a temperature above 0"):
        written(model, tokenizer, "word", do_sample=True)
    with pytest.raises(ScoringError, match=r"max_gen_toks = 128: must be below the model's context of 128"):
        written(model, tokenizer, "word", max_gen_toks=128)
    assert written(model, tokenizer, "word", num_beams=1) == written(model, tokenizer, "word")


# ---- what is refused, and what stays as it was --------------------------------------------------------


def test_every_problem_is_said_before_a_model_is_there(task_file: Callable[..., str]) -> None:
    folder = task_file("fixed", CHOICES, CHOICE, num_fewshot=0)
    task_file("broken", CHOICES, CHOICE, dataset_kwargs={"data_files": {"test": "no_such.jsonl"}})
    with pytest.raises(LmEvalError) as caught:
        check(
            [
                LmEvalSet("a", "fixde", include_path=folder),
                LmEvalSet("b", "arc_esay"),
                LmEvalSet("c", "fixed", include_path=folder, num_fewshot=3),
                LmEvalSet("c", "fixed", include_path=folder, limit=0),
                LmEvalSet("d", "fixed", include_path="no/such/folder", num_fewshot=-1),
                LmEvalSet("e", "broken", include_path=folder),
            ]
        )
    lines = str(caught.value).splitlines()
    assert lines[0] == "set 'c': given 2 times"
    assert lines[1].startswith("set 'a': task 'fixde': not among lm-eval's tasks or in ")
    assert lines[1].endswith("did you mean 'fixed'?")
    assert lines[2] == "set 'b': task 'arc_esay': not among lm-eval's tasks. did you mean 'arc_easy'?"
    assert lines[3] == "set 'c': num_fewshot = 3: task 'fixed' is fixed at 0 shots; leave it out"
    assert lines[4] == "set 'c': limit = 0: must be a whole number of at least 1"
    assert lines[5] == "set 'd': num_fewshot = -1: must be 0 or more"
    assert lines[6] == "set 'd': include_path = 'no/such/folder': no such folder"
    assert lines[7].startswith("set 'e': task 'broken' cannot be loaded: FileNotFoundError")
    assert len(lines) == 8
    check([LmEvalSet("ok", "fixed", include_path=folder, num_fewshot=0)])


def test_what_the_tokenizer_lacks_is_said(
    model: Any, make_tokenizer: Callable[..., Any], task_file: Callable[..., str]
) -> None:
    folder = task_file("cities", CHOICES, CHOICE)
    one = LmEvalSet("mine", "cities", include_path=folder, apply_chat_template=True)
    with pytest.raises(LmEvalError, match="set 'mine': apply_chat_template: the tokenizer has no chat template"):
        run(model, make_tokenizer(chat=False), [one])
    bare = make_tokenizer()
    bare.eos_token = None
    with pytest.raises(LmEvalError, match="neither bos nor eos"):
        engine(model, bare)


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval_adapter, "find_spec", lambda name: None)
    with pytest.raises(LmEvalError, match=r"pip install 'cpt\[lm-eval\]'"):
        check([LmEvalSet("a", "arc_easy")])


def test_nothing_global_changes(
    model: Any, tokenizer: Any, task_file: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    import torch
    from lm_eval.api import task

    def state() -> tuple[Any, ...]:
        drawn = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()
        return *drawn, logging.getLogger("lm_eval").level, task.tqdm, dict(os.environ), model.training

    folder = task_file("written", CHOICES, WRITTEN, num_fewshot=1)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before = state()
    run(model, tokenizer, [LmEvalSet("w", "written", include_path=folder)])
    assert state() == before
    with pytest.raises(LmEvalError):
        check([LmEvalSet("w", "no_such", include_path=folder)])
    assert state() == before
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "it/s" not in printed.err


def test_a_stop_ends_it(model: Any, tokenizer: Any, task_file: Callable[..., str]) -> None:
    folder = task_file("cities", CHOICES, CHOICE)
    with pytest.raises(Interrupted):
        run(model, tokenizer, [LmEvalSet("mine", "cities", include_path=folder)], should_stop=lambda: True)
