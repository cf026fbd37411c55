"""What a copied recipe with mistakes in it is told: every mistake in one round, and nothing that is no mistake."""

import re
from pathlib import Path

import pytest

from cpt import ConfigError, Run, RunDirError, Stream
from cpt.config import read_raw
from cpt.recipe_book import copy, next_step
from cpt.validate import examine

RATIO = "stages.1.methods.0.ratio=0.13"  # of 64 rows 8.32: wrong in combination only


def places(recipe: str, *overrides: str) -> list[str]:
    """The dotted paths that are complained of, in order."""
    with pytest.raises(ConfigError) as error:
        examine(read_raw(recipe, list(overrides)))
    return [line.split(" = ")[0].split(": ")[0] for line in error.value.problems]


@pytest.mark.parametrize(
    ("mistake", "place"),
    [
        ("stages.0.data={task: tiny_world/new_people, limt: 3}", "stages.0.data.0.limt"),
        ("stages.0.data=[{task: tiny_world/new_people, limt: 3}]", "stages.0.data.0.limt"),
        ("stages.0.test.measures=[exact_mach]", "stages.0.test.measures.0"),
        ("stages.0.methods=replay", "stages.0.methods"),
        ("stages.0.methods=[{type: repaly}]", "stages.0.methods.0.type"),
        ("stages.0.kind=sfd", "stages.0.kind"),
        ("stages.0.name=new people", "stages.0.name"),
        ("evaluation.within={every: 10, sets: [sumz]}", "evaluation.within.sets.0"),
        ("training.learning_rate=fast", "training.learning_rate"),
        ("model={path: tiny-world, dtype: bf16}", "model.dtype"),
    ],
)
def test_a_mistake_hides_no_other(mistake: str, place: str) -> None:
    assert sorted(places("sft_stream", mistake, RATIO)) == sorted([place, "stages.1.methods.0.ratio"])


@pytest.mark.parametrize(
    ("recipe", "mistake", "place", "also"),
    [
        ("rft_stream", "stages.0.kind=rtf", "stages.0.kind", "stages.0"),
        ("rft_stream", "stages.0.kl.to=bse", "stages.0.kl.to", "stages.0"),
        ("rft_stream", "stages.0.kl=bse", "stages.0.kl.to", "stages.0"),
        ("rft_stream", "stages.0.kl=0.02", "stages.0.kl", "stages.0"),
        ("rft_stream", "stages.0.rewards=exact_match", "stages.0.rewards", "stages.0"),
        ("sft_then_rft", "stages.0.adapter.mode=nwe", "stages.0.adapter.mode", "stages.1"),
        ("sft_then_rft", "stages.0.adapter=nwe", "stages.0.adapter.mode", "stages.1"),
    ],
)
def test_a_misspelt_choice_is_read_as_it_was_meant(recipe: str, mistake: str, place: str, also: str) -> None:
    """Else a stage of kind rtf would be told that sft stages have no rewards."""
    group = f"{also}.training.num_generations"
    assert sorted(places(recipe, mistake, f"{group}=7")) == sorted([place, group])


def test_what_has_no_near_choice_is_said_once() -> None:
    assert "stages.0.kind" in places("sft_stream", "stages.0.kind=dpo")


def test_a_mapping_is_told_its_keys_and_a_list_how_it_is_written() -> None:
    with pytest.raises(ConfigError, match=r"stages\.0\.kl = 0\.02: must be a mapping.* Its keys: to, weight\."):
        examine(read_raw("rft_stream", ["stages.0.kl=0.02"]))
    with pytest.raises(ConfigError, match=r"stages\.0 = 'reverse': must be a mapping.* Its keys: name, kind, data"):
        examine(read_raw("sft_stream", ["stages=[reverse]"]))
    with pytest.raises(ConfigError, match=r"stages\.0\.methods = 'replay': must be a list: .*\[ \]"):
        examine(read_raw("sft_stream", ["stages.0.methods=replay"]))


def test_a_field_of_grpo_is_looked_for_there() -> None:
    with pytest.raises(ConfigError, match=r"GRPOConfig\. Did you mean 'num_generations'"):
        Stream.from_yaml("rft_stream", ["training.num_generatons=8"])
    with pytest.raises(ConfigError, match=r"SFTConfig\. Did you mean 'max_steps'"):
        Stream.from_yaml("rft_stream", ["training.max_stepz=8"])


def test_an_override_changes_one_user_of_an_anchor() -> None:
    """`methods: *keep` in three stages is one object to YAML."""
    stages = Stream.from_yaml("sft_stream", ["stages.1.methods.0.ratio=0.25"]).stages
    assert [stage.methods[0].ratio for stage in stages] == [0.125, 0.25, 0.125]


def test_yaml_that_holds_itself_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "loop.yaml"
    file.write_text("name: loop\nmodel: tiny-world\nstages: &all [*all]\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        Stream.from_yaml(file)


def test_a_sweep_is_told_from_a_stream(tmp_path: Path) -> None:
    mine = copy("sweep", tmp_path / "s.yaml")
    assert next_step(mine) == f"cpt sweep {mine} --list; cpt sweep {mine}"
    with pytest.raises(ConfigError, match=r"s\.yaml: is a sweep.*cpt sweep .*s\.yaml --list"):
        Stream.from_yaml(mine)
    assert next_step(copy("evaluate", tmp_path / "e.yaml")).startswith("cpt validate ")
    assert places("sft_stream", "stream=mine") == ["stream"]  # a misspelt key of a stream is one


@pytest.mark.parametrize(
    "text", [b"a: 1", b"a: [", b"- 1", b"name: q\nmodel: {revision: x}\nstages: [hi]", b"\xff\xfe"]
)
def test_whatever_a_file_holds_it_is_copied_letter_by_letter(tmp_path: Path, text: bytes) -> None:
    """What is wrong with it is for `cpt validate` to say."""
    (tmp_path / "a.yaml").write_bytes(text)
    mine = copy(str(tmp_path / "a.yaml"), tmp_path / "b.yaml")
    assert mine.read_bytes() == text
    assert next_step(mine) == f"cpt validate {mine}; cpt run {mine}"


def test_a_target_that_is_no_yaml_is_told_the_whole_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        copy("quickstart", tmp_path / "mine")
    assert caught.value.problems == [f"{tmp_path / 'mine'}: a stream is a .yaml file; write {tmp_path / 'mine'}.yaml"]


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("training.learning_rate=-1.0", "must be at least 0"),
        ("training.adam_beta1=1.5", "must be at least 0 and below 1"),
        ("training.max_steps=0", "must be greater than 0; left out, num_train_epochs decides"),
        ("training.num_train_epochs=0", "must be greater than 0"),
        ("training.lr_scheduler_type=cosin", "is none of its values. Did you mean 'cosine'?"),
        ("training.optim=adamw_torh", "is none of its values. Did you mean 'adamw_torch'?"),
        ("training.report_to=[tensorbord]", "is none of its values. Did you mean 'tensorboard'?"),
        ("stages.0.test.measures=[rouge_l]", "what is written has no end: give generate.max_new_tokens"),
    ],
)
def test_a_value_that_would_fail_in_the_trainer_is_told_before(mistake: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        examine(read_raw("sft_stream", [mistake]))


def test_two_precisions_are_one_too_many() -> None:
    with pytest.raises(ConfigError, match=r"training.fp16 = True: excludes bf16"):
        examine(read_raw("sft_stream", ["training.bf16=true", "training.fp16=true"]))


def test_a_key_that_is_there_twice_is_told_with_its_line(tmp_path: Path) -> None:
    """YAML keeps the last of two, and says nothing."""
    file = tmp_path / "twice.yaml"
    file.write_text("name: a\nmodel: tiny-world\ntraining: {max_steps: 3}\ntraining: {max_steps: 4}\n")
    with pytest.raises(ConfigError, match=r"'training' is there twice"):
        Stream.from_yaml(str(file))


@pytest.mark.parametrize(
    ("home", "said"),
    [
        ("no_such_package:Gone", "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
        ("json:dumps", "json:dumps is no subclass of cpt.Method"),
    ],
)
def test_a_method_of_another_package_that_is_broken_is_told(
    monkeypatch: pytest.MonkeyPatch, home: str, said: str
) -> None:
    from cpt.methods import registry

    monkeypatch.setattr(registry, "homes", lambda: registry.OURS | {"strange": home})
    registry.find.cache_clear()
    try:
        with pytest.raises(ConfigError, match=re.escape(f"stages.0.methods.0.type = 'strange': {said}")):
            examine(read_raw("sft_stream", ["stages.0.methods=[strange]"]))
    finally:
        registry.find.cache_clear()


def test_a_run_is_found_by_the_names_that_are_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = Run.create(Path("runs"), "quickstart", "0" * 8)
    (made.path / "stages" / "01_reverse").mkdir()
    assert made.find("01_reverse").path == made.find("reverse").path == made.find("1").path
    with pytest.raises(RunDirError, match="Did you mean runs/quickstart"):
        Run.open("quickstart")
    with pytest.raises(RunDirError, match="Did you mean runs/quickstart"):
        Run.open("runs/quickstrat")
