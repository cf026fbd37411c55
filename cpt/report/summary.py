"""A run's scores as tables on a terminal, one run or several side by side."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpt.errors import RunDirError
from cpt.report.read import points

WIDTH = 80  # columns of a terminal


def read(run: Path) -> dict[str, Any]:
    """matrix.json of a run directory. Raises RunDirError when nothing was measured yet, or it is damaged."""
    file = run / "matrix.json"
    if not file.is_file() and any((run / "stages").glob("*/eval/DONE")):
        raise RunDirError(f"{file}: is missing; `cpt resume {run}` writes it again")
    if not file.is_file():
        raise RunDirError(f"{run}: nothing was measured yet; `cpt run` writes {file.name} after stage 0")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunDirError(f"{file}: is damaged ({error}); `cpt resume {run}` writes it again") from error
    parts = {"tasks": list, "general": list, "rows": list, "summary": dict}
    if not isinstance(found, dict) or not all(isinstance(found.get(key), kind) for key, kind in parts.items()):
        raise RunDirError(f"{file}: is damaged (it is no matrix of scores); `cpt resume {run}` writes it again")
    return found


def as_json(runs: Sequence[Path]) -> dict[str, Any]:
    """The matrices of the runs by folder name, with the facts of their stages."""
    return {run.name: {"matrix": read(run), "stages": facts(run)} for run in runs}


def facts(run: Path) -> dict[str, Any]:
    """What each finished stage's record says: steps, seconds, tokens, memory, trained share, its methods."""
    found = {}
    for file in sorted(
        (run / "stages").glob("[0-9]*_*/DONE"), key=lambda file: int(file.parent.name.partition("_")[0])
    ):
        if ".superseded-" not in file.parent.name:
            found[file.parent.name] = json.loads(file.read_text(encoding="utf-8"))["facts"]
    return found


def primary(matrix: dict[str, Any], name: str) -> str | None:
    """The measure a set is read by: the first it was measured with."""
    return next(iter(matrix["rows"][0]["scores"].get(name, {})), None)


def forget(matrix: dict[str, Any]) -> list[str]:
    """Tests of unlearn stages; runs of earlier versions have none."""
    return matrix.get("forget", [])


def table(matrix: dict[str, Any]) -> list[list[str]]:
    """Header and one line per stage: every set by its primary measure, then the average of the general shares."""
    names = [name for name in [*matrix["tasks"], *forget(matrix), *matrix["general"]] if primary(matrix, name)]
    header = ["after stage", *names]
    general = _general_measure(matrix)
    if general:
        header.append("(general)")
    lines = [header]
    for row in matrix["rows"]:
        cells = [cell(row["scores"].get(name, {}).get(primary(matrix, name))) for name in names]
        if general:
            averages = matrix["summary"].get(general, {}).get("general_average", [])
            value = averages[row["index"]] if row["index"] < len(averages) else None
            cells.append("-" if value is None else points(value))
        lines.append([row["stage"], *cells])
    return lines


def _general_measure(matrix: dict[str, Any]) -> str | None:
    """The measure most general sets are read by, when it is a share (so that an average means something)."""
    measures = [m for name in matrix["general"] if (m := primary(matrix, name)) in ("exact_match", "acc")]
    return max(set(measures), key=measures.count) if measures else None


def cell(result: dict[str, Any] | None) -> str:
    """A result as the tables show it; `-` where there is no value."""
    if result is None or result["value"] is None:
        return "-"
    return points(result["value"]) if is_percent(result) else f"{result['value']:.3f}"


def is_percent(result: dict[str, Any]) -> bool:
    """Whether tables show the result in percent."""
    return result["definition"].startswith(("exact_match", "acc"))


def aligned(lines: list[list[str]], left: bool = False) -> str:
    """Columns as wide as their widest cell; the first to the left, the others to the right unless `left`.

    Columns beyond 80 characters go on below, each block with the first column; `left` columns are never broken off.
    """
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    blocks = [range(1, len(widths))] if left else _blocks(widths)
    return "\n\n".join("\n".join(_row(line, widths, block, left) for line in lines) for block in blocks)


def _blocks(widths: Sequence[int]) -> list[range]:
    """Which columns after the first stand side by side."""
    begin, used, blocks = 1, widths[0], list[range]()
    for column, width in enumerate(widths[1:], start=1):
        if used + 2 + width > WIDTH and column > begin:
            blocks.append(range(begin, column))
            begin, used = column, widths[0]
        used += 2 + width
    return [*blocks, range(begin, len(widths))]


def _row(line: Sequence[str], widths: Sequence[int], columns: range, left: bool) -> str:
    cells = [line[i].ljust(widths[i]) if left else line[i].rjust(widths[i]) for i in columns]
    return "  ".join([line[0].ljust(widths[0]), *cells]).rstrip()


def summary_lines(matrix: dict[str, Any]) -> list[str]:
    """AP, BWT, FWT, forgetting and general difference of the shares, by their formulas' names, in points."""
    lines = []
    for measure, found in matrix["summary"].items():
        metrics = [metric for metric in found.values() if isinstance(metric, dict)]
        if measure not in ("exact_match", "acc") or not metrics:
            continue
        defined = [_metric(metric) for metric in metrics if metric["value"] is not None]
        missing = [metric["formula"].split(" = ")[0] for metric in metrics if metric["value"] is None]
        lines.append(f"{measure}: {', '.join(defined) or '-'}")
        if missing:
            lines.append(f"  undefined: {', '.join(missing)}")
    return [*lines, "(formulas and reasons: matrix.json, summary)"] if lines else []


WITHIN = {"min_acc": "min-ACC", "wc_acc": "WC-ACC", "wf_10": "WF^10", "wp_10": "WP^10", "min_general": "worst general"}


WITHIN_SAID = "(what was lost on the way and came back: docs/within_stage.md says what each is)"


def within_table(matrix: dict[str, Any]) -> list[list[str]]:
    """Header and one line per stage that was scored while it trained: its stability gap, in points of a share."""
    scored = [row for row in matrix["rows"] if "within" in row]
    measure = next((m for m in ("exact_match", "acc") for row in scored if m in row["within"]["measures"]), None)
    if measure is None:
        return []
    lines = [[f"within stage ({measure})", *WITHIN.values(), "rows", "every"]]
    for row in scored:
        found = row["within"]["measures"].get(measure, {})
        values = [found.get(key, {}).get("value") for key in WITHIN]
        cells = ["-" if value is None else points(value) for value in values]
        lines.append([row["stage"], *cells, str(row["within"]["rows"]), f"{row['within']['every']} steps"])
    return lines


LEVELS = ("AP", "MAA", "P")  # scores; the others are changes, and carry a sign


def _metric(metric: dict[str, Any]) -> str:
    name = metric["formula"].split(" = ")[0]
    return f"{name} {points(metric['value'], '' if name in LEVELS else '+')}"


def text(runs: Sequence[Path]) -> str:
    """Every run's table and metrics; with several runs, their general averages and AP side by side."""
    matrices = {run.name: read(run) for run in runs}
    parts = []
    for name, matrix in matrices.items():
        parts += [name, aligned(table(matrix)), *summary_lines(matrix), ""]
        parts += [aligned(gap), WITHIN_SAID, ""] if (gap := within_table(matrix)) else []
    if len(matrices) > 1:
        parts += ["general average after each stage, then AP and forgetting (exact match, %)"]
        parts += [aligned(side_by_side(matrices))]
    return "\n".join(parts).rstrip()


def side_by_side(matrices: dict[str, dict[str, Any]]) -> list[list[str]]:
    """One line per run: general average after each stage, then average performance and forgetting."""
    longest = max(matrices.values(), key=lambda matrix: len(matrix["rows"]))
    header = ["run", *(row["stage"] for row in longest["rows"]), "AP", "forgetting"]
    lines = [header]
    for matrix in matrices.values():
        found = matrix["summary"].get("exact_match", {})
        general = found.get("general_average", [])
        cells = [f"{100 * v:.1f}" if v is not None else "-" for v in general]
        cells += ["-"] * (len(longest["rows"]) - len(cells))
        for metric in ("average_performance", "forgetting_max"):
            value = found.get(metric, {}).get("value")
            cells.append("-" if value is None else points(value))
        lines.append([matrix["stream"], *cells])
    return lines
