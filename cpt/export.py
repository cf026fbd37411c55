"""Hand a stage's model to somebody else: plain files with a card of how it was made and what it scores."""

import json
import shutil
from pathlib import Path
from typing import Any

from cpt.errors import RunDirError
from cpt.run_dir import Run, StageDir


def export(run: Run, stage: str, to: Path) -> Path:
    """Copy `stages/NN_NAME/model` to a new folder and write its README.md.

    The folder loads with AutoModelForCausalLM and AutoTokenizer where cpt is not installed. Raises RunDirError
    when the stage is not finished, its weights were not kept or are damaged, or the folder is not empty.
    """
    folder = run.find(stage)
    if folder.done() is None:
        raise RunDirError(f"{folder.path}: has no model of its own to export (the base, or a stage not finished)")
    if not folder.model.is_dir():
        raise RunDirError(f"{folder.model}: the weights were not kept (retention.models: last)")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RunDirError(f"{to}: is a file, or not empty; name a new folder")
    folder.verify_model()
    shutil.copytree(folder.model, to, dirs_exist_ok=True)
    (to / "README.md").write_text(model_card(run, folder), encoding="utf-8")
    return to


def model_card(run: Run, folder: StageDir) -> str:
    """What the model is, what it was trained on, stage by stage, what it scores, how to load it."""
    stages = run.stages()
    upto = stages[: 1 + [path.path for path in stages].index(folder.path)]
    base = (run.stage(0, "base").record() or {}).get("model", "?")
    header = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [cpt]", "---"]
    lines = [*header, "", f"# {run.name}, after stage {folder.path.name}", "", f"Base model: {base}", ""]
    lines += [
        "## How it was made",
        "",
        "| stage | kind | data | rows | methods | steps |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_stage_line(path) for path in upto if path.done()]
    lines += [
        "",
        "## What it scores",
        "",
        "| set | measure | value | n | definition |",
        "|---|---|---|---|---|",
    ]
    for name, measures in folder.results().items():
        lines += [_score_line(name, measure, result) for measure, result in measures.items()]
    libraries = ", ".join(f"{name} {version}" for name, version in (folder.done() or run.info)["libraries"].items())
    lines += ["", f"Made with {libraries}.", "", "## Load it", "", "```python"]
    lines += ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += ['model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")']
    lines += ['tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")', "```", ""]
    return "\n".join(lines)


def _stage_line(folder: StageDir) -> str:
    record, done = folder.record() or {}, folder.done() or {}
    methods = "; ".join(_method_words(method) for method in record["stage"]["methods"]) or "none"
    data = record["data"]
    steps = done["facts"]["steps"]
    return f"| {record['name']} | {record['kind']} | {data['label']} | {data['rows']} | {methods} | {steps} |"


def _method_words(method: dict[str, Any]) -> str:
    fields = {k: v for k, v in method.items() if k != "type" and isinstance(v, int | float | str)}
    return f"{method['type']} {json.dumps(fields)}"


def _score_line(name: str, measure: str, result: dict[str, Any]) -> str:
    value = "undefined" if result["value"] is None else f"{result['value']:.4f}"
    spread = "" if result["stderr"] is None else f" ± {result['stderr']:.4f}"
    return f"| {name} | {measure} | {value}{spread} | {result['n']} | {result['definition']} |"
