"""Streams as YAML: every error at once with its place, overrides that paste, a round trip, no heavy imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cpt import trainer_fields, upstream_fields
from cpt.config import Stream
from cpt.errors import ConfigError
from cpt.recipe_book import Recipe, recipes
from cpt.validate import examine, json_schema, problems

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]


def small(**changes: Any) -> dict[str, Any]:
    """A stream of two stages as a raw mapping."""
    stage = {"name": "one", "data": {"rows": ROWS}, "methods": ["hft"]}
    other = {"name": "two", "data": [{"rows": ROWS}], "methods": [{"type": "replay", "ratio": 0.25, "earlier": "all"}]}
    return {"name": "s", "model": "tiny-world", "stages": [stage, other]} | changes


def refused(raw: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        Stream.parse(raw)
    return caught.value.problems


def test_every_error_at_once_each_with_its_place_and_a_way_out() -> None:
    raw = small(naem="x")
    raw["stages"][0]["methods"] = [{"type": "hft", "raito": 0.5}]
    raw["stages"][1]["methods"][0]["ratio"] = 1.5
    raw["stages"][1]["methods"].append({"type": "replai"})
    raw["stages"][1]["training"] = {"learning_rat": 1e-3, "output_dir": "x", "max_steps": "many"}
    raw["evaluation"] = {"general": {"g": {"task": "tiny_world/sums", "measures": ["exact_mach"]}}}
    found = "\n".join(refused(raw))
    for place, hint in [
        ("naem = 'x': unknown key.", "Did you mean 'name'?"),
        ("stages.0.methods.0.raito = 0.5: unknown key.", "Did you mean 'ratio'?"),
        ("stages.1.methods.0.ratio = 1.5: must be less than 1", "share of every effective batch"),
        ("stages.1.methods.1.type = 'replai': no method is called 'replai'.", "Did you mean 'replay'?"),
        ("stages.1.training.learning_rat = 0.001: is no field of TRL", "Did you mean 'learning_rate'?"),
        ("stages.1.training.output_dir = 'x': is not for a stage to set", "run directory"),
        ("stages.1.training.max_steps = 'many': must be of type int", ""),
        ("evaluation.general.g.measures.0 = 'exact_mach': is no measure.", "Did you mean 'exact_match'?"),
    ]:
        line = next((line for line in found.split("\n") if line.startswith(place)), None)
        assert line is not None, f"{place!r} not in:\n{found}"
        assert hint in line


def test_one_round_tells_fields_what_hangs_together_and_files(tmp_path: Path) -> None:
    """A misspelt key must not hide a ratio that does not fit, nor that a missing file, nor that a row."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "no answer"}')
    raw = small(naem="x", data_root=str(tmp_path))
    raw["stages"][0]["methods"] = [{"type": "replai"}, {"type": "hft", "ratio": "half"}]
    raw["stages"][1]["methods"][0] |= {"ratio": 0.3, "earlier": ["on"]}
    raw["stages"].append({"name": "one", "data": {"file": "rows.jsonl"}})
    raw["stages"].append({"name": "four", "data": {"file": "row.jsonl"}, "test": {"task": "tiny_world/sum"}})
    with pytest.raises(ConfigError) as caught:
        examine(raw)
    found = "\n".join(caught.value.problems)
    for part in (
        *("naem = 'x': unknown key", "stages.0.methods.0.type = 'replai'", "stages.0.methods.1.ratio = 'half'"),
        *("stages.1.methods.0.ratio = 0.3: of 8 rows", "stages.1.methods.0.earlier", "stages.2.name = 'one': is taken"),
        *("stages.2.data.0 (rows.jsonl) row 0: row without an answer", "stages.3.data.0.file", "stages.3.test.task"),
    ):
        assert part in found, f"{part!r} not in:\n{found}"
    assert len(caught.value.problems) == 9


def test_the_branches_of_a_union_are_one_problem_at_a_place_that_pastes() -> None:
    raw = small()
    raw["stages"][1]["methods"][0]["earlier"] = True
    (line,) = refused(raw)
    assert line.startswith("stages.1.methods.0.earlier = True: ")


def test_the_place_of_an_error_pastes_into_an_override(tmp_path: Path) -> None:
    raw = small()
    raw["stages"][1]["methods"][0]["ratio"] = 1.5
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump(raw))
    (line,) = refused(raw)
    place = line.split(" = ")[0]
    assert place == "stages.1.methods.0.ratio"
    for path in (place, "stages.two.methods.replay.ratio"):
        stream = Stream.from_yaml(file, [f"{path}=0.5", "training.learning_rate=1e-4", "model.dtype=float32"])
        assert stream.stages[1].methods[0].ratio == 0.5  # type: ignore[attr-defined]
        assert stream.training["learning_rate"] == 1e-4
        assert (stream.model.path, stream.model.dtype) == ("tiny-world", "float32")
    with pytest.raises(ConfigError, match=r"stages\.three does not exist; there are: 0 \(one\), 1 \(two\)"):
        Stream.from_yaml(file, ["stages.three.kind=sft"])


@pytest.mark.parametrize("recipe", [one for one in recipes() if "sweep" not in one.kinds], ids=lambda one: one.name)
def test_the_resolved_stream_of_every_recipe_round_trips(recipe: Recipe, tmp_path: Path) -> None:
    stream = Stream.from_yaml(recipe.file)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(stream.to_yaml())
    assert Stream.from_yaml(resolved) == stream
    assert Stream.from_yaml(resolved).to_yaml() == stream.to_yaml()
    assert problems(stream) == []
    jsonschema.validate(yaml.safe_load(recipe.file.read_text()), json_schema())


def test_the_schema_refuses_what_validation_refuses() -> None:
    schema = json_schema()
    jsonschema.validate(small(), schema)
    raw = small()
    raw["stages"][0]["methods"] = [{"type": "hft", "raito": 0.5}]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(raw, schema)


def test_a_third_partys_method_is_found_and_round_trips(tmp_path: Path) -> None:
    """An installed package with an entry point, in a process of its own."""
    (tmp_path / "theirs.py").write_text(
        "from typing import Literal\nfrom cpt import Method\n\n"
        "class Theirs(Method):\n    'A method from outside.'\n"
        "    type: Literal['theirs'] = 'theirs'\n    strength: float = 0.25\n"
    )
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[cpt.methods]\ntheirs = theirs:Theirs\n")
    code = (
        "from cpt.config import Stream\n"
        "raw = {'name': 's', 'model': 'tiny-world', 'stages': [{'name': 'a', 'data': {'task': 'tiny_world/sums'},"
        " 'methods': [{'type': 'theirs', 'strength': 0.5}]}]}\n"
        "stream = Stream.parse(raw)\n"
        "import yaml; again = Stream.parse(yaml.safe_load(stream.to_yaml()))\n"
        "assert again == stream and again.stages[0].methods[0].strength == 0.5\n"
        "print(type(again.stages[0].methods[0]).__name__)\n"
    )
    assert python(code, tmp_path) == "Theirs"


def python(code: str, path: Path) -> str:
    """Run code in a process that also sees `path`; its last line of output."""
    root = Path(__file__).parents[3]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(path)])}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip().split("\n")[-1]


def test_validation_needs_no_heavy_library(tmp_path: Path) -> None:
    for home in {*trainer_fields.CONFIGS.values(), "peft:LoraConfig"}:
        upstream_fields.known(home)  # the one thing that imports TRL or PEFT, once per version, in another process
    (tmp_path / "blocker.py").write_text(
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in {'torch', 'transformers', 'trl', 'peft', 'datasets', 'accelerate'}:\n"
        "            raise ImportError(f'{name} was imported')\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    code = (
        "import blocker, glob, importlib, pathlib, cpt.methods\n"
        "for file in pathlib.Path(cpt.methods.__file__).parent.glob('*.py'):\n"
        "    importlib.import_module(f'cpt.methods.{file.stem}') if file.stem != '__init__' else None\n"
        "from cpt.config import Stream\nfrom cpt.validate import problems\n"
        "stream = Stream.from_yaml('quickstart')\nassert problems(stream) == []\nprint('validated')\n"
    )
    assert python(code, tmp_path) == "validated"


def test_field_names_are_read_once_and_kept(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    home = "trl:SFTConfig"
    upstream_fields.known.cache_clear()
    try:
        assert "learning_rate" in upstream_fields.known(home)
        assert "once per installed version" in capfd.readouterr().err
        kept = json.loads(upstream_fields.cache_file(home).read_text())
        assert kept["packing"] == "bool"
        upstream_fields.known.cache_clear()
        upstream_fields.known(home)
        assert capfd.readouterr().err == ""
    finally:
        upstream_fields.known.cache_clear()


def test_a_stored_stream_is_read_by_any_number_of_processes(tmp_path: Path, monkeypatch: Any) -> None:
    rewarded = {"name": "one", "kind": "rft", "data": {"rows": ROWS}, "rewards": ["numeric"]}
    raw = small(stages=[rewarded | {"training": {"num_generations": 8, "per_device_train_batch_size": 4}}])
    (tmp_path / "stream.yaml").write_text(yaml.safe_dump(raw))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Stream.from_yaml(tmp_path / "stream.yaml").batch_problems() == []
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ConfigError, match="must divide the 4 completions"):
        Stream.from_yaml(tmp_path / "stream.yaml")
    stored = Stream.stored(tmp_path / "stream.yaml")
    ((place, value, text),) = stored.batch_problems()
    assert (place, value) == (("stages", 0, "training", "num_generations"), 8)
    assert "must divide the 4 completions" in text


def test_what_a_settings_file_holds_is_part_of_a_stage(tmp_path: Path) -> None:
    from cpt.inputs import _content

    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": {"stage": 2}}')
    before = _content(str(file))
    file.write_text('{"zero_optimization": {"stage": 3}}')
    assert before != _content(str(file))
    assert _content("no such.json") == "no such.json"


def test_owned_fields_exist_upstream() -> None:
    """A field that TRL drops must leave our list too."""
    known = set().union(*(upstream_fields.known(home) for home in trainer_fields.CONFIGS.values()))
    assert set(trainer_fields.OWNED) - known == set()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"stages": [{"name": "base", "data": {"rows": ROWS}}]}, "stages.0.name = 'base': is taken"),
        ({"stages": [{"name": "a b", "data": {"rows": ROWS}}]}, "stages.0.name = 'a b': "),
        ({"stages": [{"name": "a", "data": {}}]}, "must name one origin: hub, file, task or rows (none is given)"),
        ({"stages": [{"name": "a", "data": {"rows": []}}]}, "stages.0.data.0.rows = []: is empty"),
        ({"stages": [{"name": "a", "data": [{"rows": ROWS, "weight": 1}, {"rows": ROWS}]}]}, "weight, or none"),
        ({"stages": [{"name": "a", "data": {"rows": ROWS}, "methods": ["hft", "hft"]}]}, "both decide what is trained"),
        ({"stages": [{"name": "a", "data": {"rows": ROWS}, "methods": ["replay"]}]}, "nothing to replay"),
    ],
)
def test_what_does_not_hang_together_is_said(changes: dict[str, Any], sentence: str) -> None:
    assert sentence in "\n".join(refused(small(**changes)))
