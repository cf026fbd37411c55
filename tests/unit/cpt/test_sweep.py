"""A sweep's runs, what is refused, what is kept of it, and the comparison at equal new-task score."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt.config import Stream
from cpt.errors import ConfigError, TrainingError
from cpt.run_dir import Run
from cpt.sweep import Planned, Sweep, Tokens, _plain, done, outcome, plan, to_yaml, tokens
from cpt.sweep_results import Row, at_equal_score, references, results, text
from cpt.sweep_run import finish, run_sweep

METHODS = {"replay": [{"type": "replay", "ratio": 0.25, "general": {"task": "tiny_world/general"}}], "half": ["hft"]}


def sweep(tmp_path: Path, **fields: Any) -> Sweep:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({"name": "w", "stream": "sft_stream"} | fields))
    return Sweep.from_yaml(str(file))


def test_every_combination_and_every_baseline_is_a_run(tmp_path: Path) -> None:
    over = {"methods": METHODS, "learning_rate": [1e-3, 2.5e-4], "seed": [0, 7]}
    planned = plan(sweep(tmp_path, over=over, baselines=["sequential", "joint", "specialist"]))
    assert len(planned) == (1 + 2 + 1 + 3) * 2 * 2
    assert len({one.stream.name for one in planned}) == len(planned)
    one = next(one for one in planned if one.stream.name == "w-replay-lr2_5e-4-s7")
    assert one.label == "replay-lr2_5e-4"
    assert one.stream.seed == 7
    assert [one.stream.training_of(stage)["learning_rate"] for stage in one.stream.stages] == [2.5e-4] * 3
    assert [[method.type for method in stage.methods] for stage in one.stream.stages] == [["replay"]] * 3
    plain = next(one for one in planned if one.method == "sequential")
    assert [stage.methods for stage in plain.stream.stages] == [[], [], []]
    alone = next(one for one in planned if one.method == "specialist_reverse")
    assert [stage.name for stage in alone.stream.stages] == [alone.alone] == ["reverse"]


def test_joint_trains_all_rows_equally_with_the_steps_of_all(tmp_path: Path) -> None:
    (joint,) = plan(sweep(tmp_path, over={"methods": {}}, baselines=["joint"]))[1:]
    (stage,) = joint.stream.stages
    assert joint.stream.training_of(stage)["max_steps"] == 300
    assert [source.weight for source in stage.data] == [1.0, 1.0, 1.0]
    assert [source.task for source in stage.data] == [
        f"tiny_world/{n}" for n in ("new_people", "reverse", "last_letter")
    ]
    assert {"new_people", "reverse", "last_letter", "sums"} <= set(joint.stream.evaluation.general)


def test_all_problems_of_all_runs_are_said_at_once(tmp_path: Path) -> None:
    over = {"methods": {"bad": [{"type": "replay", "ratio": 0.3, "earlier": "all"}], "worse": ["hfd"]}}
    with pytest.raises(ConfigError) as caught:
        plan(sweep(tmp_path, over=over, overrides=["training.max_steps=-1"]))
    said = "\n".join(caught.value.problems)
    assert "stages.0.training.max_steps: a sweep compares at equal budget" in said
    assert "bad: stages.0.methods.0.ratio = 0.3" in said
    assert "worse: stages.0.methods.0" in said
    assert "Did you mean 'hft'" in said
    assert len(set(caught.value.problems)) == len(caught.value.problems)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"over": {"methods": {"joint": []}}}, "is a baseline's name: take another"),
        ({"baselines": ["jont"]}, "baselines.0 = 'jont'"),
        ({"strem": "x"}, "strem"),
        ({"name": "a b"}, "name = 'a b'"),
    ],
)
def test_what_is_no_sweep_is_refused(tmp_path: Path, fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep(tmp_path, **fields)
    assert any(problem in line for line in caught.value.problems)


@pytest.mark.parametrize(
    ("rate", "name"), [(1e-3, "lr1e-3"), (0.00025, "lr2_5e-4"), (1.0, "lr1e0"), (12.5, "lr1_25e1")]
)
def test_rates_have_names(rate: float, name: str) -> None:
    assert _plain(rate) == name


def row(method: str, learned: float | None, general: float | None, rate: float = 1e-3, **more: Any) -> Row:
    return Row(method, rate, 1, "exact_match", learned, 0.0, general, 0.0, None, **more)


def test_equal_new_task_score_by_hand() -> None:
    """a reaches .9 and b .8: at .8 a lies half way between .7 (-.1) and .9 (-.3)."""
    rows = [row("a", 0.7, -0.1), row("a", 0.9, -0.3), row("b", 0.6, -0.05), row("b", 0.8, -0.15)]
    found = at_equal_score(rows)
    assert found is not None
    score, left = found
    assert score == 0.8
    assert left == {"a": pytest.approx(-0.2), "b": -0.15}


def test_a_curve_that_does_not_pass_the_score_says_nothing() -> None:
    assert at_equal_score([row("a", 0.9, -0.3), row("b", 0.8, -0.1)]) == (0.8, {"a": None, "b": -0.1})
    assert at_equal_score([row("a", 0.9, -0.3)]) is None
    assert at_equal_score([row("a", None, -0.3), row("b", 0.8, None)]) is None


def test_a_rate_too_high_is_no_neighbour_of_one_too_low() -> None:
    """a reaches .7 between rates 1 and 2, where it keeps most, and again between 2 and 3, where it has lost more."""
    a = [row("a", 0.5, -0.01, 1e-4), row("a", 0.9, -0.1, 1e-3), row("a", 0.6, -0.6, 1e-2)]
    found = at_equal_score([*reversed(a), row("b", 0.7, -0.2)])
    assert found is not None
    assert found[1] == {"a": pytest.approx((-0.01 - 0.1) / 2), "b": -0.2}


def test_where_lower_is_better_the_equal_score_is_the_lowest_that_all_reach() -> None:
    """Losses: a reaches 1, b reaches 2; at 2 a lies half way between 3 (-.1) and 1 (-.3)."""
    a = [row("a", 3.0, -0.1, 1e-4, higher_is_better=False), row("a", 1.0, -0.3, 1e-3, higher_is_better=False)]
    b = [row("b", 4.0, 0.0, 1e-4, higher_is_better=False), row("b", 2.0, -0.15, 1e-3, higher_is_better=False)]
    found = at_equal_score([*a, *b])
    assert found is not None
    assert found[0] == 2.0
    assert found[1] == {"a": pytest.approx(-0.2), "b": -0.15}


@pytest.mark.parametrize("over", [{"learning_rate": [1e-3, 0.001]}, {"seed": [0, 0]}])
def test_a_value_that_is_there_twice_is_refused(tmp_path: Path, over: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"over\.\w+\.1 = .*: is there twice: each value is a run"):
        sweep(tmp_path, over=over)


def test_a_run_of_another_version_of_the_sweep_is_still_to_do(tmp_path: Path) -> None:
    """Its scores are of other settings: they stand in no table."""
    one, *_ = plan(sweep(tmp_path, overrides=["training.max_steps=60", f"output_dir={tmp_path}"]))
    made = finished(one)
    assert outcome(one) == "done"
    (made.path / "stream.yaml").write_text(one.stream.to_yaml().replace("max_steps: ", "max_steps: 1"))
    assert outcome(one) == "to do"


def test_whatever_ends_one_run_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(sweep(tmp_path, over={"seed": [0, 1]}, overrides=[f"output_dir={tmp_path}"]))
    asked: list[str] = []

    def run(stream: Any, say: Any) -> None:
        asked.append(stream.name)
        if stream.name == planned[0].stream.name:
            raise RuntimeError("deep inside")

    monkeypatch.setattr("cpt.stream.run", run)
    failed = run_sweep(planned, tmp_path / "kept", lambda line: None)
    assert asked == [one.stream.name for one in planned]
    alone = tmp_path / "kept" / "streams" / "w-own-s0.yaml"
    assert failed == {"w-own-s0": f"RuntimeError: deep inside (where it arose: cpt run {alone})"}


def test_the_replay_baseline_has_a_share_of_the_tokens(tmp_path: Path) -> None:
    (made,) = [
        one for one in plan(sweep(tmp_path, baselines=["sequential_replay"])) if one.method == "sequential_replay"
    ]
    (found,) = {str(stage.methods[0]) for stage in made.stream.stages}
    assert "by='tokens'" in found
    assert "earlier='all'" in found
    assert [len(stage.methods) for stage in made.stream.stages] == [1, 1, 1]


# ---- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -1e-3, 0.0])
def test_a_rate_that_is_none_is_refused(tmp_path: Path, rate: float) -> None:
    with pytest.raises(ConfigError, match=r"over\.learning_rate\.0"):
        sweep(tmp_path, over={"learning_rate": [rate]})


def test_two_runs_never_share_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"over\.methods\.specialist_reverse .*is a baseline's name"):
        sweep(tmp_path, over={"methods": {"specialist_reverse": []}}, baselines=["specialist"])
    with pytest.raises(ConfigError, match="two rates have one name, lr1e-3"):
        plan(sweep(tmp_path, over={"learning_rate": [1e-3, 1.00000001e-3]}))


def test_a_stream_is_no_sweep_and_a_sweep_no_stream(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quickstart: is a stream, one run: cpt run quickstart"):
        Sweep.from_yaml("quickstart")
    with pytest.raises(ConfigError, match="sweep: is a sweep, several runs"):
        plan(sweep(tmp_path, stream="sweep"))


def test_a_stream_without_stages_or_steps_is_refused_with_any_baseline(tmp_path: Path) -> None:
    every = ["sequential", "sequential_replay", "joint", "specialist"]
    with pytest.raises(ConfigError, match="stages: none: there is nothing to compare"):
        plan(sweep(tmp_path, stream="evaluate", baselines=every))
    with pytest.raises(ConfigError) as caught:
        plan(sweep(tmp_path, overrides=["training={learning_rate: 0.001}"], baselines=every))
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        f"stages.{i}.training.max_steps" for i in range(3)
    ]


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("stages.reverse.training={per_device_train_batch_size: 8}", "training.per_device_train_batch_size"),
        ("stages.reverse.training={learning_rate: 0.5}", "differ in training.learning_rate"),
        ("stages.reverse.schedule=infinite", "schedule"),
        (
            "stages.reverse.data=[{task: tiny_world/reverse}, {task: tiny_world/copy}]",
            "stages.1.data needs a weight for each of its sources",
        ),
    ],
)
def test_joint_is_refused_where_no_one_stage_stands_for_all(tmp_path: Path, override: str, why: str) -> None:
    asked = sweep(tmp_path, overrides=[override], over={"methods": {"bad": ["hfd"]}}, baselines=["joint"])
    with pytest.raises(ConfigError) as caught:
        plan(asked)
    said = "\n".join(caught.value.problems)
    assert "joint trains all rows in one stage" in said
    assert why in said
    assert "bad: stages.0.methods.0" in said  # not this one alone


def test_swept_rates_stand_for_those_of_the_stages_in_joint_training_too(tmp_path: Path) -> None:
    given = {"overrides": ["stages.reverse.training={learning_rate: 0.5}"], "baselines": ["joint"]}
    joint = plan(sweep(tmp_path, over={"learning_rate": [1e-3]}, **given))[-1]
    assert joint.stream.training_of(joint.stream.stages[0])["learning_rate"] == 1e-3


def test_joint_has_of_each_stage_what_its_steps_had(tmp_path: Path) -> None:
    """100, 300 and 200 steps are shares of 1/2, 3/2 and 1 of an equal one; within a stage, counts are kept."""
    two = "[{task: tiny_world/reverse, count: 30}, {task: tiny_world/copy, count: 10}]"
    steps = [f"stages.{i}.training={{max_steps: {n}}}" for i, n in enumerate((100, 300, 200))]
    (joint,) = plan(sweep(tmp_path, overrides=[*steps, f"stages.reverse.data={two}"], baselines=["joint"]))[1:]
    (stage,) = joint.stream.stages
    assert joint.stream.training_of(stage)["max_steps"] == 600
    assert [source.weight for source in stage.data] == [0.5, 1.125, 0.375, 1.0]
    assert [source.name for source in stage.data] == ["new_people", "reverse_1", "reverse_2", "last_letter"]
    assert [source.count for source in stage.data] == [None] * 4


def test_joint_keeps_the_schedule_of_all(tmp_path: Path) -> None:
    alike = [f"stages.{i}.schedule={{type: infinite, anneal: 0.3}}" for i in range(3)]
    made = yaml.safe_load(Path("recipes/sft_stream.yaml").read_text())
    made["training"].pop("lr_scheduler_type", None)
    (tmp_path / "stream.yaml").write_text(yaml.safe_dump(made))
    joint = plan(sweep(tmp_path, stream=str(tmp_path / "stream.yaml"), overrides=alike, baselines=["joint"]))[-1]
    schedule = joint.stream.stages[0].schedule
    assert schedule is not None
    assert schedule.anneal == 0.3


def test_sets_drawn_by_the_seed_are_refused_over_seeds(tmp_path: Path) -> None:
    drawn = {"overrides": ["stages.reverse.test={task: tiny_world/reverse, shuffle: true, limit: 5}"]}
    assert len(plan(sweep(tmp_path, over={"seed": [3]}, **drawn))) == 1
    with pytest.raises(ConfigError, match=r"stages\.1\.test\.shuffle: the stream's seed draws these rows"):
        plan(sweep(tmp_path, over={"seed": [0, 1]}, **drawn))


def test_a_specialist_is_scored_while_it_trains_on_what_it_has(tmp_path: Path) -> None:
    within = ["evaluation.within={every: 20, sets: [new_people, sums]}"]
    made = {one.alone: one.stream for one in plan(sweep(tmp_path, overrides=within, baselines=["specialist"]))}
    assert made["new_people"].evaluation.within.sets == ["new_people", "sums"]
    assert made["reverse"].evaluation.within.sets == ["sums"]
    only = plan(sweep(tmp_path, overrides=["evaluation.within={sets: [new_people]}"], baselines=["specialist"]))
    assert [one.stream.evaluation.within.every for one in only if one.alone == "reverse"] == ["off"]


def test_rows_are_read_once_for_all_rates_and_seeds_of_a_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[str] = []

    def problems(stream: Stream) -> list[str]:
        looked_at.append(stream.name)
        return [f"bad {stream.name}"]

    monkeypatch.setattr("cpt.sweep.problems", problems)
    over = {"methods": METHODS, "learning_rate": [1e-3, 1e-4], "seed": [0, 1]}
    with pytest.raises(ConfigError, match="bad w-half-lr1e-3-s0"):
        plan(sweep(tmp_path, over=over))
    assert sorted(looked_at) == ["w-half-lr1e-3-s0", "w-replay-lr1e-3-s0"]


# ---- what is done ------------------------------------------------------------------------------------


def scored(value: float, measure: str) -> dict[str, Any]:
    kept = {"value": value, "n": 4, "stderr": None, "definition": measure, "excluded": 0, "note": None}
    return {measure: kept | {"higher_is_better": measure != "nll"}}


def finished(
    one: Planned,
    measures: tuple[str, str] = ("exact_match", "exact_match"),
    summary: dict[str, Any] | None = None,
    tasks: Sequence[str] | None = None,
    facts: dict[str, Any] | None = None,
) -> Run:
    """A run directory as a finished run leaves it, without weights. measures: of tasks, and of general sets."""
    made = Run.create(one.stream.output_dir, one.stream.name, "0" * 8)
    names = ["base", *(stage.name for stage in one.stream.stages)]
    for number, name in enumerate(names):
        folder = made.stage(number, name)
        folder.begin({"identity": "x"})
        folder.commit_eval("plan", {}, {})
        if number:
            about = {"identity": "x", "model": {}, "facts": {"tokens": 10 * number, "steps": 1} | (facts or {})}
            (folder.path / "DONE").write_text(json.dumps(about))
    tasks = names[1:] if tasks is None else tasks
    values = dict.fromkeys(tasks, measures[0]) | {"sums": measures[1]}
    if one.method == "joint":
        tasks, values = [], values | dict.fromkeys(["new_people", "reverse", "last_letter"], measures[0])
    general = [name for name in values if name not in tasks]
    rows = [
        {"stage": name, "index": i, "scores": {n: scored(0.1 * i, m) for n, m in values.items()}}
        for i, name in enumerate(names)
    ]
    matrix = {"schema": 1, "stream": one.stream.name, "tasks": tasks, "general": general, "rows": rows}
    matrix |= {"summary": summary or {}}
    (made.path / "matrix.json").write_text(json.dumps(matrix))
    (made.path / "stream.yaml").write_text(one.stream.to_yaml())
    return made


def known(by: dict[str, dict[str, float]]) -> dict[str, Any]:
    return {measure: {name: {"value": value} for name, value in found.items()} for measure, found in by.items()}


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: (run.path / "matrix.json").unlink(),
        lambda run: (run.path / "matrix.json").write_text('{"tasks": ['),
        lambda run: (run.path / "run.json").write_text("{"),
        lambda run: (run.stage(2, "reverse").path / "DONE").write_text("{"),
        lambda run: (run.stage(2, "reverse").path / "DONE").unlink(),
        lambda run: (run.stage(3, "last_letter").eval / "DONE").unlink(),
        lambda run: run.stage(3, "last_letter").commit_eval("another plan", {}, {}),
        lambda run: shutil.rmtree(run.path / "stages"),
    ],
)
def test_a_run_that_is_not_whole_is_to_do(tmp_path: Path, damage: Any) -> None:
    """Killed between its last score and its matrix, or a file lost: the sweep runs it again, it does not end."""
    one, *_ = plan(sweep(tmp_path, overrides=[f"output_dir={tmp_path}"]))
    made = finished(one)
    assert done(one) == made.path
    damage(made)
    assert outcome(one) == "to do"
    assert results([one]) == []


def test_a_matrix_that_lacks_the_last_stage_is_not_whole(tmp_path: Path) -> None:
    one, *_ = plan(sweep(tmp_path, overrides=[f"output_dir={tmp_path}"]))
    file = finished(one).path / "matrix.json"
    held = json.loads(file.read_text())
    file.write_text(json.dumps(held | {"rows": held["rows"][:-1]}))
    assert outcome(one) == "to do"


def test_whatever_a_run_calls_sys_exit_for_it_is_no_orderly_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(sweep(tmp_path, over={"seed": [0, 1]}, overrides=[f"output_dir={tmp_path}"]))
    monkeypatch.setattr("cpt.stream.run", lambda stream, say: sys.exit(0))
    failed = run_sweep(planned, tmp_path / "kept", lambda line: None)
    assert list(failed) == [one.stream.name for one in planned]
    assert failed[planned[0].stream.name].startswith("SystemExit: 0 (where it arose: cpt run ")


def test_runs_of_several_processes_are_found_done_and_never_begun_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(sweep(tmp_path, over={"seed": [0, 1]}, overrides=[f"output_dir={tmp_path}", "processes=2"]))
    finished(planned[0])
    monkeypatch.setattr("cpt.stream.run", lambda stream, say: pytest.fail("begun"))
    heard: list[str] = []
    failed = run_sweep(planned, tmp_path / "kept", heard.append)
    assert "finished, by a launch of 2 processes" in heard
    file = tmp_path / "kept" / "streams" / "w-own-s1.yaml"
    assert failed == {"w-own-s1": f"takes 2 processes: start {file} under a launcher"}
    held = json.loads((tmp_path / "kept" / "sweep.json").read_text())["runs"]
    assert [held[one.stream.name]["state"] for one in planned] == ["done", "failed"]


def test_the_streams_beside_a_sweep_are_its_runs_letter_by_letter(tmp_path: Path) -> None:
    """One that is started alone must leave the run directory that the sweep looks for."""
    every = ["sequential", "sequential_replay", "joint", "specialist"]
    planned = plan(sweep(tmp_path, over={"methods": METHODS, "learning_rate": [1e-5]}, baselines=every))
    (tmp_path / "streams").mkdir()
    (tmp_path / "streams" / "w-gone.yaml").write_text("name: gone")
    to_yaml(planned, tmp_path)
    found = {file.stem: file for file in (tmp_path / "streams").iterdir()}
    assert found.keys() == {one.stream.name for one in planned}
    for one in planned:
        assert Stream.from_yaml(found[one.stream.name]).to_yaml() == one.stream.to_yaml()


# ---- what came of it ---------------------------------------------------------------------------------


def test_results_by_hand(tmp_path: Path) -> None:
    """Two seeds: means; tasks by their measure, general by its own; tokens of all stages, 10 + 20 + 30."""
    planned = plan(sweep(tmp_path, over={"seed": [0, 1]}, overrides=[f"output_dir={tmp_path}"]))
    for one, p, general in zip(planned, (0.5, 0.7), (-0.1, -0.3), strict=True):
        of_tasks = {"plasticity": p, "bwt_gem": -0.2, "average_performance": p - 0.1, "general_delta": 99.0}
        finished(one, ("exact_match", "nll"), known({"exact_match": of_tasks, "nll": {"general_delta": general}}))
    (found,) = results(planned)
    assert (found.measure, found.general_measure, found.seeds) == ("exact_match", "nll", 2)
    assert found.learned == pytest.approx(0.6)
    assert found.general == pytest.approx(-0.2)
    assert found.end == pytest.approx(0.5)
    assert found.spread == pytest.approx(0.2 / 2**0.5)
    assert found.tokens == Tokens(60, is_counted=True)
    said = text(planned, {})
    assert "exact_match, %: learned P, kept BWT_GEM, at the end AP; nll: general dG_i" in said
    assert said.splitlines()[-1].split() == ["own", "-", "2", "60.0", "-20.0", "-0.200", "50.0", "14.1", "60"]


def test_tokens_of_a_stage_that_went_on_are_estimated_from_its_last_launch(tmp_path: Path) -> None:
    """20 steps, of which the last 5 counted 100 tokens: 400. What an rft stage counts is of all its launches."""
    one, *_ = plan(sweep(tmp_path, overrides=[f"output_dir={tmp_path}"]))
    made = finished(one)
    file = made.stage(1, "new_people").path / "DONE"
    went_on = {"tokens": 100, "steps": 20, "resumed_from": "checkpoint-15"}
    file.write_text(json.dumps({"identity": "x", "model": {}, "facts": went_on}))
    assert tokens(made.path) == Tokens(400 + 20 + 30, is_counted=False)
    assert text([one], {}).splitlines()[-1].split()[-1] == "~450"
    made.stage(1, "new_people").begin({"identity": "x", "kind": "rft"})
    assert tokens(made.path) == Tokens(100 + 20 + 30, is_counted=True)


def test_where_a_loss_is_measured_the_lowest_learned_most(tmp_path: Path) -> None:
    planned = plan(sweep(tmp_path, over={"learning_rate": [1e-3, 1e-4]}, overrides=[f"output_dir={tmp_path}"]))
    for one, loss in zip(planned, (1.0, 2.0), strict=True):
        finished(one, ("nll", "nll"), known({"nll": {"plasticity": loss}}))
    assert "learned most at: own 0.001" in text(planned, {})
    assert {row.higher_is_better for row in results(planned)} == {False}


def test_of_rates_that_learned_alike_the_one_that_keeps_more_is_best(tmp_path: Path) -> None:
    planned = plan(sweep(tmp_path, over={"learning_rate": [1e-3, 1e-4]}, overrides=[f"output_dir={tmp_path}"]))
    for one, general in zip(planned, (-0.1, -0.2), strict=True):
        finished(one, summary=known({"exact_match": {"plasticity": 0.5, "general_delta": general}}))
    assert "learned most at: own 0.001" in text(planned, {})


def test_a_stream_without_tests_has_a_table_of_what_there_is(tmp_path: Path) -> None:
    one, *_ = plan(sweep(tmp_path, overrides=[f"output_dir={tmp_path}"]))
    finished(one, summary=known({"exact_match": {"general_delta": -0.25}}), tasks=[])
    (found,) = results([one])
    assert (found.measure, found.learned, found.general) == ("", None, -0.25)
    assert "nothing measured: learned P" in text([one], {})


def test_baselines_stand_by_their_own_measure_with_their_tokens(tmp_path: Path) -> None:
    planned = plan(sweep(tmp_path, baselines=["joint", "specialist"], overrides=[f"output_dir={tmp_path}"]))
    for one in planned[1:]:
        finished(one, ("exact_match" if one.alone == "reverse" else "nll", "exact_match"))
    found = {(one.baseline, one.task): (one.measure, one.score, one.tokens) for one in references(planned)}
    ten = Tokens(10, is_counted=True)
    both = [found[name, "reverse"] for name in ("specialist", "joint")]
    assert both == [("exact_match", 0.1, ten), ("nll", 0.1, ten)]
    assert len(found) == 6
    lines = [line.split() for line in text(planned, {}).splitlines()]
    assert ["baseline", "task", "rate", "score", "tokens"] in lines
    assert ["specialist", "reverse", "-", "10.0", "10"] in lines
    assert ["joint", "reverse", "-", "0.100", "10"] in lines


def test_what_failed_is_told_and_counts_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files may be whole, of a time before: what they hold is of other rows, or another process writes there."""
    planned = plan(sweep(tmp_path, over={"seed": [0]}, overrides=[f"output_dir={tmp_path}"]))
    finished(planned[0])

    def run(stream: Any, say: Any) -> None:
        raise TrainingError("the loss was not a number")

    monkeypatch.setattr("cpt.stream.run", run)
    failed = run_sweep(planned, tmp_path / "kept", lambda line: None)
    held = json.loads((tmp_path / "kept" / "sweep.json").read_text())
    assert held["results"] == []
    assert held["runs"]["w-own-s0"]["state"] == "failed"
    said = finish(planned, failed, tmp_path / "kept")
    assert "no run of the stream is finished yet" in said
    assert "failed: w-own-s0: the loss was not a number" in said
    assert (tmp_path / "kept" / "sweep.txt").read_text() == f"{said}\n"


def test_tables_stand_where_runs_cannot_be_compared(tmp_path: Path) -> None:
    """The runs made here have no items, and a comparison needs them."""
    planned = plan(sweep(tmp_path, over={"methods": METHODS}, overrides=[f"output_dir={tmp_path}"]))
    for one in planned:
        finished(one)
    (tmp_path / "kept").mkdir()
    said = finish(planned, {}, tmp_path / "kept")
    assert "replay" in said.splitlines()[3]
    assert "not compared:" in said
    assert max(map(len, said.splitlines())) <= 80 + len(str(tmp_path))


def test_runs_of_unlike_launches_are_told(tmp_path: Path) -> None:
    planned = plan(sweep(tmp_path, over={"seed": [0, 1]}, overrides=[f"output_dir={tmp_path}"]))
    finished(planned[0], facts={"processes": 8})
    assert "unlike" not in text(planned, {})
    finished(planned[1], facts={"processes": 1})
    said = " ".join(text(planned, {}).split())
    assert "trained by unlike numbers of processes, so with unlike batches (1: w-own-s1; 8: w-own-s0)" in said
