"""A sweep's runs, what is refused, and the comparison at equal new-task score."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt.errors import ConfigError
from cpt.run_dir import Run
from cpt.sweep import Row, Sweep, _plain, at_equal_score, outcome, plan, run_sweep

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


def row(method: str, learned: float | None, general: float | None) -> Row:
    return Row(method, 1e-3, 1, "exact_match", learned, 0.0, general, 0.0, None)


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


@pytest.mark.parametrize("over", [{"learning_rate": [1e-3, 0.001]}, {"seed": [0, 0]}])
def test_a_value_that_is_there_twice_is_refused(tmp_path: Path, over: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"over\.\w+\.1 = .*: is there twice: each value is a run"):
        sweep(tmp_path, over=over)


def test_a_run_of_another_version_of_the_sweep_is_still_to_do(tmp_path: Path) -> None:
    """Its scores are of other settings: they stand in no table."""
    one, *_ = plan(sweep(tmp_path, overrides=["training.max_steps=60", f"output_dir={tmp_path}"]))
    made = Run.create(one.stream.output_dir, one.stream.name, "0" * 8)
    for number, name in enumerate(["base", *(stage.name for stage in one.stream.stages)]):
        folder = made.stage(number, name)
        folder.begin({"identity": "x"})
        folder.commit_eval("plan", {}, {})
    (made.path / "stream.yaml").write_text(one.stream.to_yaml())
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
    assert failed == {planned[0].stream.name: "RuntimeError: deep inside"}


def test_the_replay_baseline_has_a_share_of_the_tokens(tmp_path: Path) -> None:
    (made,) = [
        one for one in plan(sweep(tmp_path, baselines=["sequential_replay"])) if one.method == "sequential_replay"
    ]
    (found,) = {str(stage.methods[0]) for stage in made.stream.stages}
    assert "by='tokens'" in found
    assert "earlier='all'" in found
    assert [len(stage.methods) for stage in made.stream.stages] == [1, 1, 1]
