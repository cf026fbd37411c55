"""How often a training stage is scored on what, and what its curves tell, worked by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from cpt.config import Stream, Within
from cpt.errors import ConfigError
from cpt.processes import Processes
from cpt.stability_gap import Trained, read_curve, stability_gap
from cpt.within import MOST, SHARE, Schedule, Watch, Work, schedule, subset
from eval_harness.items import EvalSet
from eval_harness.measure import draw_shots, measure
from eval_harness.prompts import Prompting
from eval_harness.rows import Row, canonical

WORK = Work(step=1000, batch=256, forward=1 / 3)
AUTO = Within()
STAGES = [{"name": "a", "data": {"rows": [{"prompt": "p", "completion": "c"}]}}]


# ---- configuration --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "every", "rows"),
    [
        ("auto", "auto", 32),
        ("on", "auto", 32),
        ("off", "off", 32),
        ("25", 25, 32),
        ("{every: 5, rows: 4}", 5, 4),
        ("{every: off}", "off", 32),
    ],
)
def test_a_word_or_a_number_is_enough(text: str, every: Any, rows: int) -> None:
    stream = Stream.parse({"name": "s", "model": "tiny-world", "evaluation": {"within": yaml.safe_load(text)}})
    assert (stream.evaluation.within.every, stream.evaluation.within.rows) == (every, rows)
    assert Stream.parse(yaml.safe_load(stream.to_yaml())) == stream


@pytest.mark.parametrize(
    ("within", "problem"),
    [
        (0, "evaluation.within.every = 0: must be auto, off or a number of optimizer steps of at least 1"),
        ("often", "evaluation.within.every = 'often': must be auto, off or a number"),
        ({"rows": 0}, "evaluation.within.rows = 0: must be greater than 0"),
        ({"sets": ["genral"]}, "evaluation.within.sets.0 = 'genral': is no set of this stream. Did you mean 'general'"),
    ],
)
def test_what_makes_no_plan_is_refused(within: Any, problem: str) -> None:
    general = {"general": {"rows": [{"prompt": "p", "completion": "c"}]}}
    raw = {"name": "s", "model": "tiny-world", "stages": STAGES, "evaluation": {"general": general, "within": within}}
    with pytest.raises(ConfigError) as caught:
        Stream.parse(raw)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(problem)


# ---- how often ------------------------------------------------------------------------------------------


def test_auto_scores_as_often_as_its_share_allows() -> None:
    # 1000 steps of 1000 tokens; 2000 tokens scored cost 667 trained, 1/1500: thirty fit, 29 distances of 35
    found = schedule(AUTO, 1000, lambda rows: 2000 * rows // 32, WORK)
    assert found == Schedule(every=35, rows=32, times=30, share=pytest.approx(0.02))


def test_auto_takes_fewer_rows_for_a_curve_and_then_fewer_points() -> None:
    # 32 rows: 15 fit; 16 rows: 30
    assert schedule(AUTO, 1000, lambda rows: 4000 * rows // 32, WORK) == Schedule(35, 16, 30, pytest.approx(0.02))
    # 8 rows: 5 fit, at 0, 250, ..., 1000
    assert schedule(AUTO, 1000, lambda rows: 1400 * rows, WORK) == Schedule(250, 8, 5, pytest.approx(5 * 11.2 / 3000))
    # of three that fit nothing but the ends and the middle; of two the ends
    assert schedule(AUTO, 1000, lambda rows: 3500 * rows, WORK) == Schedule(1000, 8, 2, pytest.approx(2 * 28 / 3000))
    assert schedule(AUTO, 1000, lambda rows: 6000 * rows, WORK) == (
        "scoring 8 rows of each set twice would cost 3% of so short a stage"
    )


@pytest.mark.parametrize("tokens", [1, 37, 991, 4096])
@pytest.mark.parametrize("steps", [1, 2, 7, 150, 3000, 10**6])
@pytest.mark.parametrize("forward", [1 / 3, 1 / 2])
def test_auto_never_costs_more_than_its_share(tokens: int, steps: int, forward: float) -> None:
    work = Work(1000, 256, forward)
    found = schedule(AUTO, steps, lambda rows: tokens * rows, work)
    if isinstance(found, str):
        assert 2 * 8 * tokens * forward > SHARE * steps * 1000
        return
    assert len({*range(0, steps, found.every), steps}) == found.times <= MOST
    assert found.times * found.rows * tokens * forward == pytest.approx(found.share * steps * 1000)
    assert found.share <= SHARE * (1 + 1e-9)


def test_auto_keeps_the_rows_of_earlier_stages_and_a_number_is_obeyed() -> None:
    def few(rows: int) -> int:
        return rows

    assert isinstance(found := schedule(AUTO, 1000, few, WORK, before=8), Schedule)
    assert found.rows == 8
    assert isinstance(found := schedule(Within(rows=4), 1000, few, WORK, before=8), Schedule)
    assert found.rows == 4  # more were not asked for
    dear = schedule(Within(every=400), 1000, lambda rows: 10**6, WORK)
    assert dear == Schedule(400, 32, 4, pytest.approx(4 * 10**6 / 3 / 10**6))


# ---- which rows -----------------------------------------------------------------------------------------


@pytest.fixture
def words() -> EvalSet:
    raw = [{"prompt": f"Reverse these letters: {'abcdefgh'[i % 8]}x", "completion": f"x{i}"} for i in range(40)]
    return EvalSet("words", [canonical(row) for row in raw], ("f1",), exact_match="generate")


def test_fewer_rows_are_the_first_of_more_and_nothing_is_written(words: EvalSet) -> None:
    few, many = subset(words, 8, 3), subset(words, 32, 3)
    assert few.rows == many.rows[:8]
    assert few.rows != subset(words, 8, 4).rows
    assert (few.measures, few.exact_match) == (("exact_match", "answer_loss"), "one_pass")
    assert len(subset(words, 99, 0).rows) == 40
    assert len(words.rows) == 40


def test_shots_are_those_of_the_whole_set(words: EvalSet) -> None:
    few = replace(words, prompting=Prompting(num_fewshot=3), fewshot=[*words.rows, *extra_rows()])
    assert draw_shots(subset(few, 4, 0)) == draw_shots(few)


def extra_rows() -> list[Row]:
    return [canonical({"prompt": f"Say {i}", "completion": str(i)}) for i in range(6)]


# ---- a watch --------------------------------------------------------------------------------------------


@pytest.fixture
def watch(words: EvalSet, tiny_tokenizer: Any, tmp_path: Path) -> Callable[..., Watch]:
    def make(asked: Within, said: list[str] | None = None) -> Watch:
        return Watch(
            asked,
            [words],
            tiny_tokenizer,
            WORK,
            window=256,
            seed=0,
            file=tmp_path / "within.jsonl",
            earlier=[],
            batch_tokens=None,
            say=(said if said is not None else []).append,
            processes=Processes(),
        )

    return make


def test_a_curve_is_cut_at_the_checkpoint_and_goes_on(
    watch: Callable[..., Watch], tiny_llama: Callable[..., Any], words: EvalSet, tiny_tokenizer: Any
) -> None:
    models = [tiny_llama(seed=step).train() for step in range(6)]
    one = watch(Within(every=2, rows=5))
    one.begin(5, 0)
    for step, model in enumerate(models):
        assert one.at(step, model, nullcontext())
        assert model.training
    whole = one.file.read_text()
    head, lines = read_curve(one.file)
    assert head is not None
    assert head["every"] == 2
    assert [line["step"] for line in lines] == [0, 2, 4, 5]
    for line in lines:
        expected = measure(models[line["step"]], tiny_tokenizer, [subset(words, 5, 0)])["words"]
        assert line["scores"]["words"] == {name: result.value for name, result in expected.items()}
    with open(one.file, "a") as stream:
        stream.write('{"step": 5, "sco')  # a kill
    again = watch(Within(every=2, rows=5))
    again.begin(5, 3)
    assert [line["step"] for line in read_curve(one.file)[1]] == [0, 2]
    for step in (3, 4, 5):
        again.at(step, models[step], nullcontext())
    assert one.file.read_text() == whole
    other = watch(Within(every=2, rows=6))
    other.begin(5, 3)
    assert read_curve(one.file) == (None, [])


def test_logits_that_are_no_numbers_stand_in_the_curve_as_undefined(
    watch: Callable[..., Watch], tiny_llama: Callable[..., Any]
) -> None:
    one, model = watch(Within(every=1, rows=2)), tiny_llama()
    one.begin(2, 0)
    assert one.at(0, model, nullcontext())
    model.model.norm.weight.data.fill_(math.nan)
    assert not one.at(1, model, nullcontext())
    assert one.at(2, tiny_llama(), nullcontext())
    _, lines = read_curve(one.file)
    assert lines[1]["scores"] == {}
    assert "the logits are NaN" in lines[1]["undefined"]["model"]
    head, lines = read_curve(one.file)
    (gap,) = [stability_gap([Trained("words", 2, head, lines)], ["words"])]
    assert gap is not None
    assert gap["measures"]["answer_loss"]["wf_10"]["value"] is None
    assert "words at step 1" in gap["measures"]["answer_loss"]["wf_10"]["reason"]


def test_spread_weights_are_left_out_and_a_short_stage_says_so(watch: Callable[..., Watch]) -> None:
    said: list[str] = []
    one = watch(AUTO, said)
    one.begin(100, 0, "ZeRO-3")
    assert one.facts() == {"left_out": "ZeRO-3 leaves each process a part of every weight"}
    assert one.at(0, None, nullcontext())
    watch(AUTO, said).begin(1, 0)
    assert "nothing is scored: scoring 8 rows of each set twice would cost" in said[1]
    assert not one.file.exists()


@pytest.mark.parametrize(
    ("zero3", "fsdp", "environ", "expected"),
    [(True, "", "", "ZeRO-3"), (False, "", "", None), (None, ["full_shard"], "", "FSDP"), (None, "", "true", "FSDP")],
)
def test_what_spreads_weights(
    zero3: bool | None, fsdp: Any, environ: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cpt.trainers.session import spreads_weights

    config = SimpleNamespace(is_zero3=lambda: zero3)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", environ)
    plugin = None if zero3 is None else SimpleNamespace(hf_ds_config=config)
    assert spreads_weights(SimpleNamespace(deepspeed_plugin=plugin, fsdp=fsdp)) == expected


# ---- what curves tell -----------------------------------------------------------------------------------
#
# a is learned in 4 steps, b in 4, c in 2. Scores of a: 0 .9 | .9 .3 .8 | .8 .5; of b (from its own stage on):
# .1 .4 .7 | .7 .6; of c: 0 .9; of the general set: 1 .8 | .8 .7 .9 | .9 .9. A stage ends where the next begins.


def trained(name: str, steps: int, points: list[int], **scores: list[float | None]) -> Trained:
    groups = {key: "general" if key == "general" else "task" for key in scores}
    about = {"acc": {"definition": "acc@1", "higher_is_better": True, "n": 8}}
    sets = {key: {"id": f"rows of {key}", "group": group, "measures": about} for key, group in groups.items()}
    head = {"every": 2, "rows": 8, "steps": steps, "plan": "p", "sets": sets}
    lines = [{"step": step, "scores": {k: {"acc": v[i]} for k, v in scores.items()}} for i, step in enumerate(points)]
    return Trained(name, steps, head, lines)


A = trained("a", 4, [0, 4], a=[0.0, 0.9], general=[1.0, 0.8])
B = trained("b", 4, [0, 2, 4], a=[0.9, 0.3, 0.8], b=[0.1, 0.4, 0.7], general=[0.8, 0.7, 0.9])
C = trained("c", 2, [0, 2], a=[0.8, 0.5], b=[0.7, 0.6], c=[0.0, 0.9], general=[0.9, 0.9])


def gap_of(*stages: Trained) -> dict[str, Any]:
    found = stability_gap(stages, [stage.name for stage in stages])
    assert found is not None
    return found["measures"]["acc"]


def value(found: dict[str, Any]) -> Any:
    return None if found["value"] is None else round(found["value"], 9)


def test_the_worst_counts_since_a_tasks_own_end_over_all_stages() -> None:
    first, second, third = gap_of(A), gap_of(A, B), gap_of(A, B, C)
    assert [value(gap["min_acc"]) for gap in (first, second, third)] == [None, 0.3, 0.45]  # (.3 + .6) / 2
    assert first["min_acc"]["reason"] == "no task was finished before"
    # .9; .7 / 2 + .3 / 2; .9 / 3 + .45 * 2 / 3
    assert [value(gap["wc_acc"]) for gap in (first, second, third)] == [0.9, 0.5, 0.6]
    assert [value(gap["min_general"]) for gap in (first, second, third)] == [0.8, 0.7, 0.7]
    assert third["min_acc"]["n"] == 2


def test_windows_lie_within_the_stage() -> None:
    second = gap_of(A, B)
    assert value(second["wf_10"]) == 0.3  # a falls by .6, b not at all
    assert value(second["wp_10"]) == 0.55  # a by .5 from its worst, b by .6
    assert second["wf_10"]["formula"].startswith("WF^10 = ")


def test_a_stage_without_a_curve_or_of_other_rows_leaves_the_worst_undefined() -> None:
    without = Trained("b", 4, None, [])
    third = gap_of(A, without, C)
    assert third["min_acc"]["reason"] == "stage b was not scored while it trained"
    assert third["wc_acc"]["value"] is None
    assert value(third["wf_10"]) == round((0.3 + 0.1 + 0) / 3, 9)
    assert stability_gap([A, without], ["a", "b"]) is None
    other = trained("b", 4, [0, 2, 4], a=[0.9, 0.3, 0.8], b=[0.1, 0.4, 0.7], general=[0.8, 0.7, 0.9])
    assert other.head is not None
    other.head["sets"]["a"]["id"] = "other rows"
    third = gap_of(A, other, C)
    assert third["min_acc"]["reason"] == "stage b was not scored on the same rows of a in the same way"
    assert value(third["min_general"]) == 0.7
    cut = trained("b", 4, [2, 4], a=[0.3, 0.8], b=[0.4, 0.7], general=[0.7, 0.9])
    assert gap_of(A, cut)["wf_10"]["reason"] == (
        "the scores within stage b do not reach from its first to its last step"
    )


def test_a_stage_without_a_test_and_a_stream_without_general_sets() -> None:
    bare = trained("b", 4, [0, 2, 4], a=[0.9, 0.3, 0.8])
    found = stability_gap([trained("a", 4, [0, 4], a=[0.0, 0.9]), bare], ["a"])
    assert found is not None
    gap = found["measures"]["acc"]
    assert value(gap["min_acc"]) == 0.3
    assert gap["wc_acc"]["reason"] == "stage b has no test with this measure"
    assert gap["min_general"]["reason"] == "no general set has this measure"
    assert json.loads(json.dumps(found, allow_nan=False)) == found


# ---- launches -------------------------------------------------------------------------------------------


def test_a_number_of_steps_is_refused_where_no_process_holds_the_weights() -> None:
    from cpt.train_stage import _refuse_launch

    plain = {"fp16": False, "deepspeed": None, "deepspeed_plugin": None, "gradient_checkpointing": False}
    args = SimpleNamespace(**plain, fsdp=["full_shard"])
    raw = {"name": "s", "model": "tiny-world", "stages": STAGES}
    auto = Stream.parse(raw)
    _refuse_launch(auto, auto.stages[0], args)
    asked = Stream.parse(raw | {"evaluation": {"within": 10}})
    with pytest.raises(ConfigError) as caught:
        _refuse_launch(asked, asked.stages[0], args)
    (problem,) = caught.value.problems
    assert problem.startswith(
        "training: FSDP leaves each process a part of every weight, and evaluation.within.every = 10"
    )
    assert "use DDP or ZeRO-2, or evaluation.within: auto" in problem
