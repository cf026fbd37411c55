"""What several stages answer to one prompt."""

from pathlib import Path

from cpt.config import Stream
from cpt.errors import DataError, RunDirError
from cpt.models import base_folder, base_tokenizer, open_model
from cpt.quiet import quiet
from cpt.run_dir import Run, StageDir
from eval_harness.errors import ScoringError
from eval_harness.generation import generate
from eval_harness.prompts import PromptError, prompt_ids
from eval_harness.rows import Row


def answers(run: Run, prompt: str, stages: list[str], max_new_tokens: int) -> list[tuple[str, str]]:
    """(stage, greedy answer) for each stage asked for, all when none is; the base is stage 0.

    Raises RunDirError for a stage that is not there, not finished, or whose weights were not kept.
    """
    stream = Stream.stored(run.path / "stream.yaml")
    tokenizer = base_tokenizer(stream)
    folders = [run.find(stage) for stage in stages] if stages else [f for f in run.stages() if _model(f, stream)]
    row = Row("completion", prompt=prompt)
    try:
        ids = prompt_ids(tokenizer, row, stream.evaluation.chat_template)
    except PromptError as error:
        raise DataError(f"the prompt cannot be rendered: {error}") from error
    found = []
    for folder in folders:
        path = _model(folder, stream)
        if path is None:
            raise RunDirError(f"{folder.path}: has no model: the stage is not finished, or its weights were not kept")
        try:
            with quiet():
                new = generate(open_model(path, stream.model), tokenizer, [ids], max_new_tokens)[0]
        except ScoringError as error:
            raise DataError(f"{folder.path.name}: {error}") from error
        found.append((folder.path.name, tokenizer.decode(new, skip_special_tokens=True).strip()))
    return found


def _model(folder: StageDir, stream: Stream) -> Path | None:
    if folder.path.name == "00_base":
        return base_folder(stream.model)
    return folder.model if folder.done() and folder.model.is_dir() else None
