"""What `cpt methods` says is what the classes are, and a package that cannot be imported is a line of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest
from pydantic import Field
from typer.testing import CliRunner

from cpt import method_table
from cpt.errors import ConfigError
from cpt.method_table import HOOKS, NEEDS, REFUSED, FieldFacts, describe, every, one
from cpt.methods import base, registry
from cpt.methods.base import Method


class Pull(Method):
    """Pull weights back.

    As far as they went.
    """

    type: Literal["pull"] = "pull"
    strength: float = Field(description="how hard")
    many: list[int] = Field([1], min_length=1)

    kinds: ClassVar[frozenset[str]] = frozenset({"sft"})
    absent: ClassVar[dict[str, Any]] = {"strength": 0.0}

    def edit_weights(self, weights: Any, stage: Any) -> None:
        """Nothing."""


@pytest.fixture
def with_strangers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ours, and three entry points of other packages: a missing module, a function, an attribute that is not there."""
    strangers = {"gone": "no_such_package:Gone", "odd": "json:dumps", "renamed": "json:Renamed"}
    monkeypatch.setattr(registry, "homes", lambda: dict(sorted((registry.OURS | strangers).items())))
    yield
    registry.find.cache_clear()


def test_facts_are_read_from_the_class() -> None:
    found = describe("pull", "mine:Pull", Pull)
    assert (found.summary, found.description) == ("Pull weights back.", "As far as they went.")
    assert (found.kinds, found.hooks, found.absent) == (["sft"], ["edit_weights"], {"strength": 0.0})
    assert found.refused == ["DeepSpeed with offload", "FSDP", "ZeRO-3"]
    assert found.fields == [
        FieldFacts("strength", "float", None, "", "how hard", required=True),
        FieldFacts("many", "list of int", [1], "at least 1 of them", ""),
    ]
    assert found.page is None


def test_fields_of_ours() -> None:
    fields = {field.name: field for name in ("hft", "replay") for field in one(name).fields}
    assert (fields["ratio"].type, fields["ratio"].bounds) == ("float", "at least 0, below 1")
    assert (fields["level"].type, fields["level"].default) == ("category | layer | model", "category")
    assert fields["earlier"].type == "all | list of str | null"
    assert fields["general"].type == "list of Source | null"
    assert fields["rows_per_stage"].bounds == "above 0"


def test_every_method_of_ours_says_what_it_does_and_costs(root: Path) -> None:
    for found in map(one, registry.OURS):
        assert found.problem is None
        assert found.summary
        assert found.cost
        assert found.hooks
        assert (root / str(found.page)).is_file()
        assert [field.name for field in found.fields if not field.description] == []


def test_every_hook_is_told_of() -> None:
    said_otherwise = {"active", "check", "check_rows", "quotas", "facts", "load_state_dict"}
    assert set(HOOKS) | said_otherwise == base.HOOKS


def test_what_a_method_needs_is_a_limit_in_every_form() -> None:
    """gere by default keeps a margin, which stands on what the base computed of each whole row."""
    assert one("gere").refused == ["FSDP", "ZeRO-3", "packing"]
    listed = " ".join(method_table.text(every()).split())
    assert "of the base at every stage. Not under FSDP, ZeRO-3, packing. grad_ascent" in listed
    assert "into every effective batch. rewrite" in listed  # replay works everywhere
    assert "refused    FSDP, ZeRO-3, packing (as it is by default)" in method_table.page(one("gere"))


def test_every_need_of_ours_is_one_that_the_table_knows() -> None:
    unlimited = {"hidden", "blocks", "template"}
    ours: list[Any] = [registry.find(name) for name in registry.OURS]
    assert {need for method in ours for need in method.model_construct().needs} <= set(NEEDS) | unlimited


@pytest.mark.parametrize("need", NEEDS)
def test_limits_of_needs_are_those_that_are_refused(need: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `cpt.train_stage`, which is given every launch in turn; what a stream itself decides is checked elsewhere."""
    from cpt import train_stage

    method = SimpleNamespace(type="it", active=True, needs=frozenset({need}))
    stage: Any = SimpleNamespace(methods=[method], schedule=None)
    stream: Any = SimpleNamespace(evaluation=SimpleNamespace(within=SimpleNamespace(every="off")))
    monkeypatch.setattr(train_stage, "fresh_methods", lambda stage: [])
    monkeypatch.setattr("cpt.trainers.deepspeed.refuse_edits", lambda methods, args: [])
    monkeypatch.setattr("cpt.trainers.deepspeed.forget", lambda args: None)
    monkeypatch.setattr("cpt.trainers.session.spreads_weights", lambda args: args.spread)
    plain = {"spread": None, "deepspeed_plugin": None, "gradient_checkpointing": False}
    launches: dict[str, dict[str, Any]] = {
        "FSDP": {"spread": "FSDP"},
        "ZeRO-3": {"spread": "ZeRO-3", "deepspeed_plugin": object()},
        "DeepSpeed": {"deepspeed_plugin": object()},
        "vLLM": {"use_vllm": True},
        "re-entrant checkpointing": {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
    }
    found = set()
    for name, args in launches.items():
        try:
            train_stage._refuse_launch(stream, stage, SimpleNamespace(**plain | args))
        except ConfigError:
            found.add(name)
    found -= {"ZeRO-3"} if "DeepSpeed" in found else set()
    assert found == set(NEEDS[need]) - {"packing", "full weights"}


class Launched(SimpleNamespace):
    """Trainer arguments and DeepSpeed's settings, as `refuse_edits` asks for them."""

    fp16 = fsdp = offload = zero3 = False

    @property
    def deepspeed_plugin(self) -> Any:
        here = SimpleNamespace(is_offload=lambda: self.offload, is_zero3=lambda: self.zero3, get_value=lambda key: True)
        return SimpleNamespace(hf_ds_config=here) if self.offload or self.zero3 else None


LAUNCHES = {"fp16": "fp16", "FSDP": "fsdp", "DeepSpeed with offload": "offload", "ZeRO-3": "zero3"}


@pytest.mark.parametrize("hook", HOOKS)
def test_refused_launches_are_those_that_are_refused(hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cpt.trainers.deepspeed import refuse_edits

    monkeypatch.setenv("RANK", "0")
    edits = type("Edits", (Method,), {hook: lambda self, *given: None, "__module__": __name__})
    method = edits(type="edits")
    found = [name for name, flag in LAUNCHES.items() if refuse_edits([method], Launched(**{flag: True}))]
    assert sorted(found) == sorted(REFUSED.get(hook, ()))


@pytest.mark.usefixtures("with_strangers")
def test_what_cannot_be_imported_is_a_line() -> None:
    problems = {found.name: found.problem for found in every()}
    assert problems == dict.fromkeys(registry.OURS) | {
        "gone": "ModuleNotFoundError: No module named 'no_such_package'",
        "odd": "json:dumps is no subclass of cpt.Method",
        "renamed": "AttributeError: module 'json' has no attribute 'Renamed'",
    }
    from cpt.cli import app

    listed = CliRunner().invoke(app, ["methods"])
    assert listed.exit_code == 0
    wide = max(map(len, problems)) + 2
    assert f"{'gone':{wide}}cannot be imported: ModuleNotFoundError" in listed.stdout
    assert f"{'hft':{wide}}pretrain sft rft sdft unlearn: Freeze a" in listed.stdout
    alone = CliRunner().invoke(app, ["methods", "gone"])
    assert alone.stdout.startswith("gone (no_such_package:Gone) cannot be imported:")
    assert [found["name"] for found in json.loads(CliRunner().invoke(app, ["methods", "--json"]).stdout)] == list(
        problems
    )


@pytest.mark.usefixtures("with_strangers")
def test_a_name_that_is_none_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"methods replya: is no method. Did you mean 'replay'\? Known: .*, gone, "):
        one("replya")


def test_it_fits_80_columns() -> None:
    shown = [method_table.text(every()), *map(method_table.page, every())]
    assert max(len(line) for text in shown for line in text.splitlines()) <= 80
    page = method_table.page(one("hft"))
    assert "  ratio          float, above 0, at most 1, default 0.5: share of elements\n" in page
    assert "absent at  ratio: 1.0, embeddings: trained, head: trained" in page


@pytest.mark.usefixtures("with_strangers")
def test_the_page_is_what_the_classes_say(root: Path) -> None:
    from cpt.cli import app

    made = CliRunner().invoke(app, ["methods", "--markdown"]).stdout
    assert (root / "docs" / "methods" / "index.md").read_text() == made, (
        "write it anew: cpt methods --markdown > docs/methods/index.md"
    )
    assert "gone" not in made
