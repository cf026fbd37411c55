"""Hand a stage's model to somebody else: plain files with a card of how it was made and what it scores."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from cpt.config import Stream
from cpt.errors import RunDirError
from cpt.models import open_merged, save_model
from cpt.run_dir import Run, StageDir
from eval_harness.lineage import FILE
from eval_harness.loading import load_tokenizer, made_of

Form = Literal["plain", "merged", "adapter"]


def export(run: Run, stage: str, to: Path, merge: bool = False) -> Path:
    """Write a stage's model to a new folder with a README.md, in a form that loads where cpt is not installed.

    Plain weights are copied, for AutoModelForCausalLM. Of adapters, merge makes plain weights in the base's own
    dtype; without it, one adapter on the base becomes a PEFT folder, for AutoPeftModelForCausalLM.
    Raises RunDirError when the stage is not finished, its weights were not kept or are damaged, the folder is not
    empty, or more than one adapter on the base would have to be one; DataError when the weights beneath are gone.
    """
    folder = run.find(stage)
    if folder.done() is None:
        raise RunDirError(f"{folder.path}: has no model of its own to export (the base, or a stage not finished)")
    if not folder.model.is_dir():
        raise RunDirError(f"{folder.model}: the weights were not kept (retention.models: last)")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RunDirError(f"{to}: is a file, or not empty; name a new folder")
    folder.verify_model()
    form = _form(folder, merge)
    write = {"plain": _copy, "merged": _write_merged, "adapter": _write_adapter}[form]
    aside = to.with_name(f".{to.name}.partial")  # a folder that was cut off must not look like a model
    shutil.rmtree(aside, ignore_errors=True)
    write(run, folder, aside)
    (aside / "README.md").write_text(model_card(run, folder, form), encoding="utf-8")
    aside.replace(to)  # over an empty folder too
    return to


def _form(folder: StageDir, merge: bool) -> Form:
    made = made_of(folder.model)
    if not made.adapters:
        return "plain"
    if merge:
        return "merged"
    if made.stage is None and len(made.adapters) == 1:
        return "adapter"
    raise RunDirError(f"{folder.path}: is {made.describe()}, more than one adapter on the base: export with --merge")


def _copy(run: Run, folder: StageDir, to: Path) -> None:
    shutil.copytree(folder.model, to, dirs_exist_ok=True)


def _write_merged(run: Run, folder: StageDir, to: Path) -> None:
    stream = Stream.stored(run.path / "stream.yaml")
    tokenizer = load_tokenizer(folder.model, trust_remote_code=stream.model.trust_remote_code)
    save_model(open_merged(folder.model, stream.model), tokenizer, to)


def _write_adapter(run: Run, folder: StageDir, to: Path) -> None:
    only = made_of(folder.model).adapters[0]
    shutil.copytree(folder.model, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns(FILE, "adapters"))
    shutil.copytree(folder.model / "adapters" / only.name, to, dirs_exist_ok=True)


def model_card(run: Run, folder: StageDir, form: Form = "plain") -> str:
    """What the model is, what it was trained on, stage by stage, what it scores, how to load it."""
    stages = run.stages()
    upto = stages[: 1 + [path.path for path in stages].index(folder.path)]
    base = (run.stage(0, "base").record() or {}).get("model", "?")
    library = ["library_name: peft", f"base_model: {base}"] if form == "adapter" else ["library_name: transformers"]
    header = ["---", *library, "pipeline_tag: text-generation", "tags: [cpt]", "---"]
    lines = [*header, "", f"# {run.name}, after stage {folder.path.name}", "", f"Base model: {base}", ""]
    lines += _adapter_lines(folder, form)
    lines += [
        "## How it was made",
        "",
        "| stage | kind | trains | data | rows | methods | steps |",
        "|---|---|---|---|---|---|---|",
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
    kind = "AutoPeftModelForCausalLM" if form == "adapter" else "AutoModelForCausalLM"
    if form == "adapter":
        lines += ["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer", ""]
    else:
        lines += ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += [f'model = {kind}.from_pretrained("THIS_FOLDER")']
    lines += ['tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")', "```", ""]
    return "\n".join(lines)


def _adapter_lines(folder: StageDir, form: Form) -> list[str]:
    """What the model is made of, and what merging changed."""
    if form == "plain":
        return []
    made = made_of(folder.model)
    lines = [f"Made of: {made.describe()}", ""]
    if form == "merged" and made.quantization:
        held = f"on weights held in {made.quantization}"
        lines += [f"The newest adapter was trained, and the scores below were measured, {held}. Here it is merged into"]
        lines += ["the weights as they were before that: scores differ a little.", ""]
    return lines


def _stage_line(folder: StageDir) -> str:
    record, done = folder.record() or {}, folder.done() or {}
    methods = "; ".join(_method_words(method) for method in record["stage"]["methods"]) or "none"
    data = record["data"]
    steps = done["facts"]["steps"]
    trains = _trained_words(record["stage"].get("adapter"))
    about = (record["name"], record["kind"], trains, data["label"], data["rows"], methods, steps)
    return f"| {' | '.join(map(str, about))} |"


def _trained_words(adapter: dict[str, Any] | None) -> str:
    if adapter is None:
        return "full weights"
    if adapter["mode"] == "continue":
        return "LoRA, continued"
    merged = ", the others merged" if adapter["mode"] == "merge_then_new" else ""
    return f"LoRA, new (r {adapter['lora']['r']}){merged}"


def _method_words(method: dict[str, Any]) -> str:
    fields = {k: v for k, v in method.items() if k != "type" and isinstance(v, int | float | str)}
    return f"{method['type']} {json.dumps(fields)}"


def _score_line(name: str, measure: str, result: dict[str, Any]) -> str:
    value = "undefined" if result["value"] is None else f"{result['value']:.4f}"
    spread = "" if result["stderr"] is None else f" ± {result['stderr']:.4f}"
    return f"| {name} | {measure} | {value}{spread} | {result['n']} | {result['definition']} |"
