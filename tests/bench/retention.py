"""What methods that keep what a model knew cost in a step, and what is recorded of it before.

On the Llama of `tests.bench.training`, at its batch of 4 x 128 tokens, with 2 of the 4 rows replayed where rows are.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import torch

from cpt.data.activations import record_regions
from cpt.data.recording import Recorder, backbone, launched, reading
from cpt.data.tokens import TokenRows
from cpt.methods.base import Method
from cpt.methods.distill import Distill
from cpt.methods.ewc import EWC
from cpt.methods.gere import GeRe
from cpt.methods.projection import Projection
from cpt.quiet import quiet
from tests.bench.figures import Figure, ratio_of
from tests.bench.timing import interleave, pin_allocator, steps_for
from tests.bench.training import SHAPE, adapted, llama, rows, stage

GENERAL: Any = {"rows": [{"text": "the bench gives random tokens in its place"}]}
AT_ONCE = 8  # rows of a forward pass while recording


def gere(repeats: int) -> list[Figure]:
    """A step with the margin against one with labels alone on the same rows, and against plain sft of as many rows."""
    margin = GeRe(general=GENERAL, ratio=0.5, keep="margin", weight=1.0)
    labels = GeRe(general=GENERAL, ratio=0.5, keep="labels")
    seconds = _side_by_side({"margin": [margin], "labels": [labels], "sft": []}, repeats)
    return [
        _ratio("gere step, margin / labels alone", seconds, "margin", "labels", 1.10),
        _ratio("gere step, margin / sft of as many rows", seconds, "margin", "sft", 1.15),
    ]


def distill(repeats: int) -> list[Figure]:
    """Against plain sft: likely tokens read from disk; the adapter switched off for a pass of its own."""
    cached = _side_by_side({"cached": [Distill(to="start")], "sft": []}, repeats)
    looked = _side_by_side({"adapter off": [Distill(to="start")], "LoRA sft": []}, repeats, adapted)
    return [
        _ratio("distill step, cached likely tokens / sft", cached, "cached", "sft", 1.15),
        _ratio("distill step, adapter switched off / LoRA sft", looked, "adapter off", "LoRA sft", 1.65),
    ]


def on_adapters(repeats: int) -> list[Figure]:
    """Against a LoRA step without: a subspace of rank 64 beside every adapter; the pull of EWC on it."""
    clear = Projection(general=GENERAL, energy=1.0, max_rank=64)
    sides: dict[str, list[Method]] = {"projection": [clear], "ewc": [EWC(general=GENERAL, rows=4)], "LoRA sft": []}
    seconds = _side_by_side(sides, repeats, adapted)
    return [
        _ratio("projection step, rank 64 / LoRA sft", seconds, "projection", "LoRA sft", 1.15),
        _ratio("ewc step on an adapter / LoRA sft", seconds, "ewc", "LoRA sft", 1.05),
    ]


def recording(repeats: int) -> list[Figure]:
    """Regions of general rows in two passes and in one, against a forward pass over them; and what they take.

    The noise of batch shapes is measured on 16 rows, whatever their number: the bench's tokens are cut into four times
    as many rows, for on 64 rows that would be half a pass, on the thousand of a real set it is a thirtieth.
    """
    with TemporaryDirectory() as folder, quiet():
        pin_allocator()
        model, general = llama().eval(), _quarters(rows())

        def record(passes: int, number: int) -> Path:
            target = Path(folder) / f"{passes}-{number}"
            about: dict[str, Any] = {"rows": []}
            record_regions(Recorder(model, general, target, **launched()), about, passes=passes)
            return target

        sides: dict[str, Callable[[int], Any]] = {
            "forward": lambda number: _forward(model, general),
            "two passes": partial(record, 2),
            "one pass": partial(record, 1),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(repeats + 1):
            for name, run in sides.items():
                began = time.perf_counter()
                run(number)
                if number:  # the first one of each allocates
                    seconds[name].append(time.perf_counter() - began)
        kept = sum(file.stat().st_size for file in (Path(folder) / "2-0").glob("regions-*"))
    learned = sum(len(labels) - 1 for labels in general["labels"])
    full = learned * SHAPE["hidden_size"] * 4
    return [
        _ratio("recording regions, two passes / one forward pass", seconds, "two passes", "forward", 2.3),
        _ratio("recording regions, one pass / one forward pass", seconds, "one pass", "forward", 1.3),
        Figure("recorded regions / the activations in float32", kept / full, "x", most=1.1 / 16),
    ]


def _quarters(whole: datasets.Dataset) -> datasets.Dataset:
    """Every row as four."""
    size = len(whole[0]["input_ids"]) // 4
    parts = [ids[at : at + size] for ids in whole["input_ids"] for at in range(0, 4 * size, size)]
    return datasets.Dataset.from_dict({"input_ids": parts, "labels": parts})


def _forward(model: Any, general: Any) -> None:
    with reading(model):
        for first in range(0, len(general), AT_ONCE):
            ids = torch.tensor(general[first : first + AT_ONCE]["input_ids"])
            backbone(model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def _side_by_side(
    sides: dict[str, list[Method]], repeats: int, open_model: Callable[[], Any] = llama
) -> dict[str, list[float]]:
    """Seconds per step of each block, of stages that differ in their methods alone."""
    with TemporaryDirectory() as folder, quiet():
        runs = {
            name: partial(
                stage,
                Path(folder) / name,
                steps_for(repeats),
                methods=[type(method).model_validate(method.model_dump()) for method in methods],
                open_model=open_model,
                general=lambda *_: TokenRows(rows()),
                memory=Path(folder) / "memory",
            )
            for name, methods in sides.items()
        }
        return interleave(runs, repeats)[0]


def _ratio(name: str, seconds: dict[str, list[float]], one: str, other: str, most: float) -> Figure:
    return ratio_of(name, seconds[one], seconds[other], (one, other), most=most)
