"""Run directories written by hand: what a run leaves behind, with scores that a test chooses."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

SCRIPT = "<script>document.title='owned'"
OWNED = "</title><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
ARABIC = "القراءة"
MISSING = None  # not measured: the matrix has no such cell
Cells = Mapping[str, Sequence[float | None]]  # set -> its value after every stage, the base first
ITEMS = 8
LIBRARIES = {"cpt": "0.1.0", "torch": "2.13.0"}

# A matrix with a NaN, a cell that was not measured, a name that is code and one from right to left; and as it is shown.
TASKS = ("people", SCRIPT, ARABIC)
STAGES = ("base", *TASKS)
MEASURES = {"text": "bits_per_byte"}
HAND: Cells = {
    "people": [0.0, 0.75, 0.5, 0.25],
    SCRIPT: [0.25, 0.25, 1.0, math.nan],
    ARABIC: [0.0, MISSING, 0.5, 0.875],
    "facts": [1.0, 1.0, 0.75, 0.5],
    "text": [0.5, 0.625, 1.25, 2.0],
}
SHOWN = {  # shares in per cent
    ("base", "people"): "0.0", ("people", "people"): "75.0", (SCRIPT, "people"): "50.0", (ARABIC, "people"): "25.0",
    ("base", SCRIPT): "25.0", ("people", SCRIPT): "25.0", (SCRIPT, SCRIPT): "100.0", (ARABIC, SCRIPT): "NaN",
    ("base", ARABIC): "0.0", ("people", ARABIC): "-", (SCRIPT, ARABIC): "50.0", (ARABIC, ARABIC): "87.5",
    ("base", "facts"): "100.0", ("people", "facts"): "100.0", (SCRIPT, "facts"): "75.0", (ARABIC, "facts"): "50.0",
    ("base", "text"): "0.500", ("people", "text"): "0.625", (SCRIPT, "text"): "1.250", (ARABIC, "text"): "2.000",
}  # fmt: skip


def write_run(
    folder: Path,
    cells: Cells,
    tasks: Sequence[str],
    *,
    stream: str = "by_hand",
    seed: int = 0,
    measures: Mapping[str, str] | None = None,
    ratio: float = 0.25,
    steps: int = 20,
    items: int = ITEMS,
) -> Path:
    """A finished run; gives its folder.

    Args:
        cells: shares are eighths (`items` 0/1 items each, an even number); NaN is written as JSON's NaN.
        tasks: names of the stages, each tested by the set of its name; the other sets are general.
        measures: set -> measure where it is not exact_match.
        ratio, steps: what replay and training are set to.
    """
    rows = []
    for index, stage in enumerate(["base", *tasks]):
        scores = {name: by_row[index] for name, by_row in cells.items() if by_row[index] is not MISSING}
        results = {name: _result(value, (measures or {}).get(name), items) for name, value in scores.items()}
        _stage(folder / "stages" / f"{index:02d}_{stage}", index, stage, results, steps)
        bare = {name: {m: _without_items(r) for m, r in result.items()} for name, result in results.items()}
        rows.append({"stage": stage, "index": index, "scores": bare})
    general = [name for name in cells if name not in tasks]
    averages = [
        _average([cells[name][row] for name in general if name not in (measures or {})]) for row in range(len(rows))
    ]
    summary = {"exact_match": {"general_average": averages}}
    matrix = {"schema": 1, "stream": stream, "tasks": list(tasks), "general": general, "rows": rows, "summary": summary}
    _json(folder / "matrix.json", matrix)
    machine = {"python": "3.11.7", "system": "Linux x86_64", "cores": 2}
    made = {"name": stream, "created": "2026-01-02T03:04:05+00:00", "schema": 1, "libraries": LIBRARIES}
    _json(folder / "run.json", made | {"machine": machine})
    methods = [{"type": "replay", "ratio": ratio}]
    stages = [{"name": name, "kind": "sft", "data": [], "methods": methods, "training": {}} for name in tasks]
    training = {"learning_rate": 1e-3, "max_steps": steps}
    plan = {"general": {name: {} for name in general}}
    content = {"name": stream, "model": {"path": "tiny-world"}, "seed": seed, "training": training}
    (folder / "stream.yaml").write_text(
        yaml.safe_dump(content | {"stages": stages, "evaluation": plan}, allow_unicode=True, sort_keys=False)
    )
    return folder


def _result(value: float | None, measure: str | None, items: int) -> dict[str, Any]:
    """The set's results: of items that are right or wrong, or else a quarter above and below the value by turns."""
    assert value is not None
    is_share = measure is None
    right = 0 if math.isnan(value) else round(value * items)
    values = [float(i < right) if is_share else value * (1.25 if i % 2 else 0.75) for i in range(items)]
    spread = math.sqrt(value * (1 - value)) if is_share else abs(value) / 4
    result = {
        "value": value,
        "n": items,
        "stderr": spread / math.sqrt(items - 1),
        "definition": f"{measure or 'exact_match'}@1(by_hand)",
        "higher_is_better": is_share,
        "per_item": {f"row-{i}": item for i, item in enumerate(values)},
        "excluded": {},
        "note": "the value is nan" if math.isnan(value) else None,
    }
    return {measure or "exact_match": result}


def _without_items(result: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "per_item"}


def _average(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _stage(folder: Path, index: int, name: str, results: Mapping[str, Any], steps: int) -> None:
    """One stage's folder: what was trained, what was logged, what was measured."""
    record: dict[str, Any] = {"identity": f"{index:064x}", "kind": "sft", "name": name, "seed": index}
    if index:
        record |= {"parent": f"{index - 1:064x}", "stage": {"methods": [{"type": "replay", "ratio": 0.25}]}}
        record["data"] = {"label": f"made/{name}:train", "rows": 800, "sha256": f"{index + 7:064x}"}
    _json(folder / "stage.json", record)
    for set_name, result in results.items():
        _json(folder / "eval" / f"{set_name}.json", result)
    measured = {"sets": list(results), "facts": {"seconds": 1.5, "measured": list(results)}}
    _json(folder / "eval" / "DONE", {"plan": "0" * 64, "finished": "2026-01-02T03:05:00+00:00"} | measured)
    if not index:
        return
    lines = [
        {"step": step, "loss": 2 / step + 0.1, "learning_rate": 1e-3, "replay": 1 / step, "num_tokens": 700.0 * step}
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = {"steps": steps, "train_seconds": 10.0, "tokens": 700 * steps, "bytes_written": 2_000_000}
    facts |= {"peak_gib": 0.5, "seconds": 11.0, "methods": {"replay": {"rows": 100}}, "parameters": 541536}
    facts |= {"trained_parameters": 541536, "processes": 1, "rows": {"task": {"rows": 800}}, "resumed_from": None}
    done = {"identity": record["identity"], "finished": "2026-01-02T03:04:30+00:00", "libraries": LIBRARIES}
    _json(folder / "DONE", done | {"facts": facts, "model": {}})


def _json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
