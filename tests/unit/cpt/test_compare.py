"""Runs compared from their files: metrics by hand, what is paired and pooled, what is refused, what is printed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from cpt.cli import app
from cpt.errors import ConfigError, RunDirError
from cpt.report.compare import compare, labels
from cpt.report.compare_table import as_json, text
from eval_harness.results import from_items, schema, write_json

ROOT = Path(__file__).resolve().parents[3]
EXACT = "exact_match@1(one_pass,plain)"
A = {  # R by hand: t1 is 0, 3/4, 1/2; t2 is 0, 1/4, 1; kept is 1, 1, 1/2
    "t1": [[0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]],
    "t2": [[0, 0, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]],
    "kept": [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 1, 0]],
}
B = {  # t1 is 0, 3/4, 3/4; t2 0, 0, 1; kept 1, 1, 1
    "t1": [[0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]],
    "t2": [[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]],
    "kept": [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]],
}


def make_run(
    folder: Path,
    scores: dict[str, list[list[float]]],
    *,
    stream: str = "s",
    seed: int = 0,
    tasks: tuple[str, ...] = ("t1", "t2"),
    definition: str = EXACT,
    measure: str = "exact_match",
    prefix: str = "",
    higher_is_better: bool = True,
) -> Path:
    """A finished run directory: set -> row -> item values."""
    rows = []
    for index, stage in enumerate(("base", *tasks)):
        eval_folder = folder / "stages" / f"{index:02d}_{stage}" / "eval"
        eval_folder.mkdir(parents=True)
        cells = {}
        for name, by_row in scores.items():
            items = [(f"{prefix}{name}{i}", float(value)) for i, value in enumerate(by_row[index])]
            result = from_items(items, definition=definition, higher_is_better=higher_is_better).to_json()
            write_json(eval_folder / f"{name}.json", {measure: result})
            cells[name] = {measure: {key: value for key, value in result.items() if key != "per_item"}}
        rows.append({"stage": stage, "index": index, "scores": cells})
    general = [name for name in scores if name not in tasks]
    matrix = {"schema": 1, "stream": stream, "tasks": list(tasks), "general": general, "rows": rows, "summary": {}}
    write_json(folder / "matrix.json", matrix)
    write_json(folder / "run.json", {"name": stream})
    (folder / "stream.yaml").write_text(yaml.safe_dump({"seed": seed, "stages": [{"name": name} for name in tasks]}))
    return folder


def lines(found: Any) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in as_json(found)["quantities"]}


def test_every_metric_by_hand(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", A, stream="naive"), make_run(tmp_path / "b", B, stream="kept")]
    found = compare(labels(runs))
    said = lines(found)
    assert list(said) == ["t1", "t2", "kept", "AP", "BWT_GEM", "F_max", "dG_i"]
    values = {name: (*one["values"]["naive"], *one["values"]["kept"]) for name, one in said.items()}
    assert values == {
        "t1": (0.5, 0.75),
        "t2": (1.0, 1.0),
        "kept": (0.5, 1.0),
        "AP": (0.75, 0.875),
        "BWT_GEM": (-0.25, 0.0),
        "F_max": (0.25, 0.0),
        "dG_i": (-0.5, 0.0),
    }
    assert {name: one["differences"]["kept"]["value"] for name, one in said.items()} == {
        "t1": 0.25, "t2": 0.0, "kept": 0.5, "AP": 0.125, "BWT_GEM": 0.25, "F_max": -0.25, "dG_i": 0.5,
    }  # fmt: skip
    shown = said["t1"]["estimates"]["naive"]["shown"]
    assert 0 <= shown["low"] < 0.5 < shown["high"] <= 1
    assert said["t2"]["differences"]["kept"]["shown"]["reason"] == "all resamples of the 4 items are equal"


def test_rows_and_runs_share_the_draws_of_a_set(tmp_path: Path) -> None:
    """Losses that rise by 1 on every item: each score is uncertain, its change and its difference are not."""
    spread = [[0.5, 3.0, 9.0, 1.0], [1.5, 4.0, 10.0, 2.0], [2.5, 5.0, 11.0, 3.0]]
    how: dict[str, Any] = {"definition": "loss@1", "measure": "loss", "higher_is_better": False}
    more = [[value + 1 for value in row] for row in spread]
    runs = [
        make_run(tmp_path / "a", {"t1": spread, "t2": spread, "kept": spread}, stream="a", **how),
        make_run(tmp_path / "b", {"t1": more, "t2": more, "kept": more}, stream="b", **how),
    ]
    said = lines(compare(labels(runs)))
    directions = {name: one["higher_is_better"] for name, one in said.items()}
    levels = dict.fromkeys(("t1", "t2", "kept", "AP"), False)
    assert directions == {**levels, "BWT_GEM": True, "F_max": False, "dG_i": True}
    for name in ("t1", "t2", "kept", "AP"):
        assert said[name]["estimates"]["a"]["shown"]["low"] is not None, name
    for name, change in {"BWT_GEM": -1.0, "F_max": 1.0, "dG_i": -2.0}.items():
        assert said[name]["values"]["a"] == [pytest.approx(change)]
        assert said[name]["estimates"]["a"]["shown"]["low"] is None, name
    assert all(one["differences"]["b"]["shown"]["low"] is None for one in said.values())
    # Sets are drawn by themselves: the mean of two is surer than one of them.
    widths = [
        said[n]["estimates"]["a"]["shown"]["high"] - said[n]["estimates"]["a"]["shown"]["low"] for n in ("t1", "AP")
    ]
    assert widths[1] < widths[0]


def test_groups_are_pooled_and_paired_by_seed_and_order(tmp_path: Path) -> None:
    def shifted(scores: dict[str, list[list[float]]], by: float) -> dict[str, list[list[float]]]:
        return {name: [[value + by for value in row] for row in rows] for name, rows in scores.items()}

    how: dict[str, Any] = {"definition": "loss@1", "measure": "loss"}
    naive = [make_run(tmp_path / f"a{i}", shifted(A, i), seed=i, **how) for i in (0, 1, 2)]
    better = [make_run(tmp_path / f"b{i}", shifted(A, i + 0.1 + i / 100), seed=i, **how) for i in (2, 0, 1)]
    found = compare({"naive": naive, "better": better})
    t1 = lines(found)["t1"]
    assert t1["values"] == {"naive": [0.5, 1.5, 2.5], "better": pytest.approx([2.62, 0.6, 1.61])}
    # t over 0.5, 1.5, 2.5: 1.5 -+ 4.302653 / sqrt(3).
    assert t1["estimates"]["naive"]["shown"]["low"] == pytest.approx(1.5 - 2.484138, abs=1e-6)
    # Paired by seed the differences are .10, .11, .12: .11 -+ 4.302653 * .01 / sqrt(3). Unpaired nothing could be told.
    assert t1["differences"]["better"]["shown"]["low"] == pytest.approx(0.11 - 0.0248414, abs=1e-6)
    assert t1["differences"]["better"]["runs"] == 3
    unpaired = compare({"naive": naive, "better": better[:2]})
    shown = lines(unpaired)["t1"]["differences"]["better"]["shown"]
    assert shown["method"].startswith("Welch")
    assert shown["low"] < 0 < shown["high"]
    # The other order of the same tasks belongs to the group, with an R of its own.
    other = make_run(tmp_path / "order", shifted(A, 0), seed=0, tasks=("t2", "t1"), **how)
    orders = compare({"naive": [naive[0], other]})
    assert lines(orders)["BWT_GEM"]["values"]["naive"] == [-0.25, 0.75]  # R[2][t2] - R[1][t2] = 1 - 1/4
    assert text(orders).splitlines()[0] == "A  naive: 2 runs, seeds 0, 2 orders"


def test_items_that_weigh_unlike(tmp_path: Path) -> None:
    runs = []
    for name, values in (("a", (1.0, 3.0)), ("b", (2.0, 3.0))):
        run = make_run(tmp_path / name, {"t1": [[*values]] * 2}, stream=name, tasks=("t1",), measure="bits_per_byte")
        for file in run.glob("stages/*/eval/t1.json"):
            stored = json.loads(file.read_text())
            stored["bits_per_byte"] |= {"weights": {"t10": 1.0, "t11": 3.0}, "value": (values[0] + 3 * values[1]) / 4}
            write_json(file, stored)
        runs.append(run)
    said = lines(compare(labels(runs)))
    assert said["t1"]["values"] == {"a": [2.5], "b": [2.75]}
    assert said["t1"]["differences"]["b"]["value"] == 0.25
    assert (said["t1"]["differences"]["b"]["shown"]["low"], said["t1"]["differences"]["b"]["shown"]["high"]) == (
        0.0,
        1.0,
    )
    assert said["BWT_GEM"]["values"] == {"a": [None], "b": [None]}
    assert said["BWT_GEM"]["differences"] == {"b": None}
    assert said["BWT_GEM"]["reason"] == "undefined for one task: no stage comes after it"


def test_a_value_that_is_not_of_its_items_has_no_interval_but_that_over_runs(tmp_path: Path) -> None:
    runs = []
    for seed in (0, 1):
        run = make_run(tmp_path / str(seed), A, seed=seed)
        for file in run.glob("stages/*/eval/t1.json"):
            stored = json.loads(file.read_text())
            stored["exact_match"]["value"] = 7.0 + seed
            write_json(file, stored)
        runs.append(run)
    t1 = lines(compare({"both": runs}))["t1"]["estimates"]["both"]
    assert (t1["hierarchical"]["low"], t1["shown"]["method"]) == (None, "Student's t over runs")
    alone = lines(compare({"a": runs[:1], "b": runs[1:]}))
    assert (alone["t1"]["differences"]["b"]["value"], alone["t1"]["differences"]["b"]["shown"]["low"]) == (1.0, None)
    assert alone["AP"]["estimates"]["a"]["shown"]["low"] is None


def test_every_refusal_at_once(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", A)
    chat = make_run(tmp_path / "chat", A, definition="exact_match@1(one_pass,chat:5fb8ff)", seed=1)
    items = make_run(tmp_path / "items", A, prefix="x", seed=2)
    again = make_run(tmp_path / "again", A)
    with pytest.raises(ConfigError) as refused:
        compare({"a": [a, again], "b": [chat], "c": [items]})
    problems = refused.value.problems
    assert problems[0] == "--group a: two runs of one seed and order are one sample; pool runs that differ in them"
    assert "t1 exact_match of chat after base: its definition is exact_match@1(one_pass,chat:5fb8ff)" in problems[1]
    assert f"that of a {EXACT}" in problems[1]
    assert "t1 exact_match of items after base: other items than in a: 8 are in one of them only" in problems[2]
    assert len(problems) == 1 + 2 * 3  # the definitions and the items of all three sets


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", A)
    with pytest.raises(ConfigError, match="compare: no run; give two or more"):
        compare({})
    with pytest.raises(ConfigError, match="compare: one run; give two or more"):
        compare({"a": [a]})
    with pytest.raises(ConfigError, match="compare: a is given twice"):
        compare({"a": [a], "b": [a]})
    with pytest.raises(ConfigError, match="no measure 'acc' that all runs have; known: exact_match"):
        compare({"a": [a], "b": [a]}, measure="acc")
    fewer = make_run(tmp_path / "fewer", {"t1": A["t1"], "kept": A["kept"]}, tasks=("t1",))
    with pytest.raises(ConfigError, match=r"a and fewer have other tasks \(t1, t2 and t1\)"):
        compare({"a": [a], "b": [fewer]})
    (fewer / "stream.yaml").write_text("{stages: [{name: t1}, {name: t2}]}")
    with pytest.raises(RunDirError, match="measured after 1 of 2 stages; `cpt resume"):
        compare({"a": [a], "b": [fewer]})
    (fewer / "stream.yaml").unlink()
    with pytest.raises(RunDirError, match=r"stream.yaml: cannot be read"):
        compare({"a": [a], "b": [fewer]})
    (a / "stages" / "01_t1" / "eval" / "t1.json").write_text("{")
    with pytest.raises(RunDirError, match=r"01_t1.eval.t1.json: cannot be read"):
        compare({"a": [a], "b": [a]})


def test_sets_of_some_runs_only_are_named(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", A)
    b = make_run(tmp_path / "b", {**B, "more": A["kept"]}, seed=1)
    found = compare({"a": [a], "b": [b]})
    assert "more" not in lines(found)
    assert found.notes == ("not in every run by one measure, left out: more",)


def test_the_command(tmp_path: Path) -> None:
    paths = [str(make_run(tmp_path / f"{name}-{i}", scores, stream=name, seed=i)) for i in (0, 1) for name, scores in
             (("naive", A), ("kept", B))]  # fmt: skip
    shell = CliRunner()
    done = shell.invoke(app, ["compare", paths[0], paths[1]], catch_exceptions=False)
    printed = done.stdout.splitlines()
    assert done.exit_code == 0
    assert all(len(line) <= 80 for line in printed)
    assert printed[:2] == ["A  naive: seed 0", "B  kept: seed 0"]
    t2 = next(line for line in printed if line.startswith("  t2"))
    # 4 of 4 right: 100 % and the binomial interval from .025^(1/4) = .3976 on; no difference.
    assert t2.split() == ["t2", "100.0", "[39.8,100.0]", "100.0", "[39.8,100.0]", "+0.0"]
    groups = [f"--group=naive={paths[0]},{paths[2]}", f"--group=kept={paths[1]},{paths[3]}"]
    done = shell.invoke(app, ["compare", *groups, "--measure", "exact_match", "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert [run["seed"] for run in found["groups"]["naive"]] == [0, 1]
    assert found["first"] == "naive"
    with pytest.raises(ConfigError, match=r"^compare: naive-0 is given twice, and a run is no other than itself"):
        shell.invoke(app, ["compare", paths[0], paths[0]], catch_exceptions=False)
    # Folder names tell runs of one stream apart, and paths folders of one name.
    (tmp_path / "other").mkdir()
    twin = make_run(tmp_path / "other" / "naive-0", B, stream="naive", seed=9)
    assert list(labels([Path(paths[0]), twin])) == [paths[0], str(twin)]
    assert list(labels([Path(paths[0]), Path(paths[2])])) == ["naive-0", "naive-1"]
    for bad in ("naive", "=x", "naive="):
        with pytest.raises(ConfigError, match="must be NAME=RUN,RUN"):
            shell.invoke(app, ["compare", "--group", bad], catch_exceptions=False)


def test_wide_figures_and_long_names_stay_in_80_columns(tmp_path: Path) -> None:
    """Changes of a loss have signs and three decimals in every cell; its large values have exponents."""

    def scaled(scores: dict[str, list[list[float]]], by: float) -> dict[str, list[list[float]]]:
        shift = [[3.1, 2.3, 1.2, 2.6], [1.9, 2.2, 3.7, 0.4], [4.1, 1.2, 2.9, 3.3]]
        made = {}
        for name, rows in scores.items():
            made[name] = [[by * (v + s) for v, s in zip(*two, strict=True)] for two in zip(rows, shift, strict=True)]
        return made

    how: dict[str, Any] = {"definition": "loss@1", "measure": "loss", "higher_is_better": False}
    for size in (1.0, 123456.0):
        runs = [
            make_run(tmp_path / f"{name}{size}", scaled(scores, size), stream=f"{name}{'_and_more' * 12}", **how)
            for name, scores in (("a", A), ("b", B))
        ]
        printed = text(compare(labels(runs))).splitlines()
        assert max(map(len, printed)) <= 80
        bwt = printed.index("  BWT_GEM")
        assert "".join(printed[bwt + 1 : bwt + 4]).count("[") >= 3


def test_it_reads_files_and_loads_no_training_code() -> None:
    code = (
        "import sys, cpt.report.compare_table as c; sys.exit(sum(m in sys.modules for m in ('torch', 'scipy', 'trl')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages of one step on the tiny world."""
    from cpt import Stream, run

    folder = tmp_path_factory.mktemp("runs")
    task = {"task": "tiny_world/reverse", "limit": 12}
    stages = [{"name": "reverse", "data": task, "test": task}]
    copied = {"task": "tiny_world/copy", "limit": 12}
    stages.append({"name": "copy", "data": copied, "test": copied})
    general = {"sums": {"task": "tiny_world/sums", "limit": 12}, "text": {"task": "tiny_world/text", "limit": 4}}
    stream = Stream.parse({
        "name": "real", "model": "tiny-world", "output_dir": str(folder), "stages": stages,
        "training": {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "max_steps": 2},
        "evaluation": {"general": general},
    })  # fmt: skip
    return run(stream, say=lambda line: None).path


def test_a_real_run_holds_its_schemas_and_its_own_metrics(real: Path, tmp_path: Path) -> None:
    matrix = json.loads((real / "matrix.json").read_text())
    validator = jsonschema.Draft202012Validator
    jsonschema.validate(matrix, schema("matrix"), validator)
    sets = list(real.glob("stages/*/eval/*.json"))
    assert len(sets) == 3 * 4
    for file in sets:
        jsonschema.validate(json.loads(file.read_text()), schema("set"), validator)
    other = make_run(tmp_path / "other", A)
    with pytest.raises(ConfigError, match="have other tasks"):
        compare({"real": [real], "other": [other]})
    twin = tmp_path / "twin"
    twin.symlink_to(real)
    with pytest.raises(ConfigError, match="is given twice"):
        compare({"real": [real], "twin": [twin]})
    twin.unlink()
    subprocess.run(["cp", "-r", str(real), str(twin)], check=True)
    said = lines(compare({"real": [real], "twin": [twin]}))
    of_tasks = matrix["summary"]["exact_match"]
    for name, key in {"AP": "average_performance", "BWT_GEM": "bwt_gem", "F_max": "forgetting_max"}.items():
        assert said[name]["values"]["real"] == [of_tasks[key]["value"]]
    assert said["dG_i"]["values"]["real"] == [of_tasks["general_delta"]["value"]]
    assert {one["differences"]["twin"]["value"] for one in said.values()} == {0.0}
