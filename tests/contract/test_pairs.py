"""The pairs of methods that docs and recipes recommend: each leaves its trace; they accumulate and resume as one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt.methods.registry import OURS
from tests.contract.cases import CASES
from tests.contract.lab import GENERAL_ROWS, Lab, distance, equal

pytestmark = pytest.mark.contract

GENERAL = {"type": "replay", "ratio": 0.25, "general": {"rows": GENERAL_ROWS}}
EARLIER = {"type": "replay", "ratio": 0.25, "earlier": "all", "name": "earlier"}
HFT, GERE, DER = CASES["hft"].settings, CASES["gere"].settings, CASES["der"].settings | {"ratio": 0.25}
PAIRS: list[list[dict[str, Any]]] = [
    [HFT, GENERAL],
    [HFT, GERE],
    [GENERAL, EARLIER],
    [HFT, GENERAL, EARLIER],
    [GERE, EARLIER],
    [GERE, DER],
    [CASES["eaft"].settings, GENERAL],
    [CASES["rewrite"].settings, GENERAL],
    [CASES["rewrite"].settings, GERE],
    [CASES["distill"].settings, GENERAL],
    [CASES["projection"].settings, GENERAL],
]


FORGETTING = {name: CASES[name].settings for name in ("flat", "npo", "grad_ascent")}
PAIRS += [
    [FORGETTING["flat"], GERE],
    [FORGETTING["flat"], HFT],
    [FORGETTING["npo"], GENERAL],
    [FORGETTING["npo"], EARLIER],
    [FORGETTING["grad_ascent"], CASES["l2_sp"].settings],
    [FORGETTING["grad_ascent"], CASES["ewc"].settings],
]


def kind(pair: list[dict[str, Any]]) -> str:
    return "unlearn" if any(one in FORGETTING.values() for one in pair) else "sft"


def types(pair: list[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(sorted(one["type"] for one in pair))


def on_lora(pair: list[dict[str, Any]]) -> bool:
    return any(CASES[one["type"]].lora for one in pair)


@pytest.fixture
def lab(tmp_path: Path, tiny_tokenizer: Any, tiny_llama: Any) -> Lab:
    return Lab(tmp_path, tiny_tokenizer, tiny_llama)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(types(pair)))
def test_each_leaves_its_trace(lab: Lab, pair: list[dict[str, Any]]) -> None:
    how: dict[str, Any] = {"kind": kind(pair), "lora": on_lora(pair)}
    whole = lab.stage(pair, **how).after
    for one in pair:
        if one not in FORGETTING.values():  # without which the stage is none
            others = [other for other in pair if other is not one]
            assert not equal(lab.stage(others, **how).after, whole), one["type"]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(types(pair)))
def test_kill_and_resume_equals_uninterrupted(lab: Lab, tmp_path: Path, pair: list[dict[str, Any]]) -> None:
    how: dict[str, Any] = {"kind": kind(pair), "dropout": 0.2, "lora": on_lora(pair)}
    whole = lab.stage(pair, **how)
    assert lab.stage(pair, folder=tmp_path / "killed", stop_after=3, **how).stopped
    assert equal(lab.stage(pair, folder=tmp_path / "killed", **how).after, whole.after)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(types(pair)))
def test_one_batch_equals_its_parts(lab: Lab, pair: list[dict[str, Any]]) -> None:
    whole, parts = (
        lab.stage(
            pair, kind(pair), lora=on_lora(pair), per_device_train_batch_size=4 // n, gradient_accumulation_steps=n
        ).after
        for n in (1, 4)
    )
    assert distance(whole, parts) < 5e-5


def recommended() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every stage of docs and recipes with several of our methods: file, and types in order."""
    for file in [Path("README.md"), *Path("docs").rglob("*.md"), *Path("recipes").glob("*.yaml")]:
        text = file.read_text(encoding="utf-8")
        for block in [text] if file.suffix == ".yaml" else re.findall(r"```yaml[^\n]*\n(.*?)```", text, re.DOTALL):
            for listed in lists_of_methods(yaml.safe_load(block)):
                found = sorted(one if isinstance(one, str) else one["type"] for one in listed)
                if len(found) > 1 and OURS.keys() >= set(found):
                    yield str(file), tuple(found)


def lists_of_methods(raw: Any) -> Iterator[list[Any]]:
    if isinstance(raw, list):
        for one in raw:
            yield from lists_of_methods(one)
    if isinstance(raw, dict):
        methods = raw.get("methods")
        yield from [methods] if isinstance(methods, list) else []
        yield from (methods or {}).values() if isinstance(methods, dict) else []  # of a sweep
        for one in raw.values():
            yield from lists_of_methods(one)


def test_what_docs_and_recipes_combine_is_tried_here() -> None:
    found = dict((pair, file) for file, pair in recommended())
    assert len(found) >= 4
    assert {pair: file for pair, file in found.items() if pair not in map(types, PAIRS)} == {}
