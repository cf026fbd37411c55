"""`cpt report RUN`: a run as one self-contained page and as markdown for a pull request, from its files, at any time.

The page keeps a size whatever was run: of many sets, stages and logged lines it shows as much as fits, counts the rest
and names the file that has it. A run that is not finished, or whose files are damaged, gets a page that says so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cpt.errors import RunDirError
from cpt.report import curves, examples, facts
from cpt.report.curves import Limits
from cpt.report.headline import Headline, headline
from cpt.report.heatmap import heat_map
from cpt.report.markdown import markdown
from cpt.report.read import RunView, StageFiles, read
from cpt.report.scaffold import clip, page, shell
from cpt.report.summary import WITHIN

LARGEST = 1_900_000  # bytes of a page
LIMITS = (
    Limits(cells=8000, tasks=120, points=240, rows=40, stages=60, lines=400, titled=True),
    Limits(cells=8000, tasks=100, points=100, rows=12, stages=20, lines=200, titled=False),
    Limits(cells=8000, tasks=24, points=60, rows=8, stages=8, lines=100, titled=False),
    Limits(cells=3000, tasks=12, points=40, rows=5, stages=3, lines=40, titled=False),
)
FOLDER, HTML, MARKDOWN = "report", "report.html", "report.md"
EXAMPLES = 60  # in all
MOST_STREAM = 60_000  # characters of stream.yaml


def write(run: str | os.PathLike[str]) -> Path:
    """Write RUN/report/report.html and RUN/report/report.md; gives the page.

    Raises:
        RunDirError: the folder is no run directory, or it cannot be written.
    """
    path = Path(run)
    if not (path / "stages").is_dir() and not (path / "run.json").is_file():
        raise RunDirError(f"{path}: is no run directory (neither run.json nor stages/ is in it)")
    view = read(path)
    head = headline(view)
    folder = path / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        _replace(folder / MARKDOWN, markdown(view, head))
        _replace(folder / HTML, html(view, head))
    except OSError as error:
        raise RunDirError(f"{folder}: the report cannot be written ({error.strerror}); make it writable") from error
    return folder / HTML


def html(view: RunView, head: Headline | None = None, largest: int = LARGEST) -> str:
    """The page as text, by the first of LIMITS that makes it no larger than `largest` bytes."""
    head = head or headline(view)
    turned = examples.turned(view, EXAMPLES)
    text = ""
    for limits in LIMITS:
        content = _content(view, head, limits, turned)
        text = page(f"{view.name}: report", "report.html", styles=("report.css",), **content)
        if len(text.encode()) <= largest:
            break
    return text


def _content(
    view: RunView, head: Headline, limits: Limits, turned: tuple[list[examples.Turned], list[str]]
) -> Mapping[str, Any]:
    gap_measure, gaps = curves.gap_rows(view)
    tasks, general = (
        [name for name in names if name in view.measures] for names in ([*view.tasks, *view.forget], view.general)
    )
    others, other_rows, others_left = facts.other_measures(view, limits.cells // 5)
    listed: dict[str, Sequence[Any]] = {
        "gaps": gaps,
        "methods": facts.method_facts(view),
        "stage_facts": facts.stage_facts(view),
        "cost": facts.cost(view),
        "origins": facts.origins(view),
        "turned": turned[0][::-1],
        "metrics": facts.metrics(view),
        "definitions": facts.definitions(view),
    }
    return {
        **{name: lines[-limits.lines :] for name, lines in listed.items()},
        "left": {name: max(0, len(lines) - limits.lines) for name, lines in listed.items()},
        "view": view,
        "head": head,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "map": heat_map(view, limits.cells),
        "undefined": facts.undefined(view, 12),
        "others": others,
        "other_rows": other_rows,
        "others_left": others_left,
        "tasks": curves.task_figures(view, limits),
        "tasks_left": max(0, len(tasks) - limits.tasks),
        "task_numbers": curves.numbers_over_stages(view, tasks, limits.cells),
        "general": curves.general_figures(view, limits),
        "general_left": max(0, len(general) - limits.tasks),
        "general_numbers": curves.numbers_over_stages(view, general, limits.cells),
        "within": curves.within_figure(view, limits),
        "gap_measure": gap_measure,
        "gap_names": tuple(WITHIN.values()),
        "drift": curves.drift_figures(view, limits),
        "drift_numbers": curves.drift_numbers(view),
        "training": _training(view, limits),
        "training_left": max(0, sum(bool(s.metrics) for s in view.stages) - limits.stages),
        "cost_names": facts.COST,
        "turned_notes": turned[1],
        "provenance": facts.provenance(view),
        "commands": [(what, shell(*words)) for what, words in facts.commands(view)],
        "stream": _stream(view),
    }


def _training(view: RunView, limits: Limits) -> list[dict[str, Any]]:
    """The newest stages that have logged something, the one in training first of all."""
    logged = [stage for stage in view.stages if stage.metrics][-limits.stages :]
    return [{"stage": one, "figures": curves.training_figures(one, limits), "seen": _last_seen(one)} for one in logged]


def _last_seen(stage: StageFiles) -> str:
    """When a stage that is not finished logged last: whether it still trains, no file says."""
    file = stage.folder / "metrics.jsonl"
    if stage.is_trained or not file.is_file():
        return ""
    return datetime.fromtimestamp(file.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _stream(view: RunView) -> str:
    try:
        return clip((view.path / "stream.yaml").read_text(encoding="utf-8", errors="replace"), MOST_STREAM)
    except OSError:
        return ""


def _replace(file: Path, text: str) -> None:
    """Whole or not at all: somebody may have the page open."""
    aside = file.with_name(f".{file.name}.partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)
