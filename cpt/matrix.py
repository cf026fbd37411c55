"""The score matrix: rows are stages, columns are measurements; with the continual metrics of each measure."""

from typing import Any

from cpt.config import Stream
from cpt.run_dir import Run, StageDir
from cpt.stability_gap import Trained, stability_gap
from eval_harness.metrics import continual

SCHEMA = 1


def matrix(stream: Stream, run: Run, folders: list[StageDir]) -> dict[str, Any]:
    """All scores of the stages measured so far, as JSON. Holds no times: equal runs give equal bytes.

    rows[i].scores[set][measure] = {value, n, stderr, definition, higher_is_better}; `summary[measure]` holds
    AP, BWT, FWT, forgetting and the general difference, each naming its formula; tests of unlearn stages (`forget`) are
    in none of these. rows[i].within is the stability gap
    of a stage that was scored while it trained.
    """
    groups = {name: group for name, (group, _) in stream.eval_sources().items()}
    tasks = [stage.name for stage in stream.stages if stage.test and stage.kind != "unlearn"]
    forget = [stage.name for stage in stream.stages if stage.test and stage.kind == "unlearn"]
    rows, trained = [], list[Trained]()
    for folder in folders:
        number, _, name = folder.path.name.partition("_")
        scores = {key: {m: _short(r) for m, r in by.items()} for key, by in folder.results().items()}
        row: dict[str, Any] = {"stage": name, "index": int(number), "scores": scores}
        if done := folder.done():
            trained.append(Trained.read(name, done["facts"]["steps"], folder.path))
            if gap := stability_gap(trained, tasks):
                row["within"] = gap
        rows.append(row)
    general = [name for name, group in groups.items() if group == "general"]
    return {
        "schema": SCHEMA,
        "stream": stream.name,
        "tasks": tasks,
        "forget": forget,
        "general": general,
        "rows": rows,
        "summary": {m: _summary(m, rows, stream, tasks, general) for m in _measures(rows, {*tasks, *forget, *general})},
    }


def _short(result: dict[str, Any]) -> dict[str, Any]:
    keys = ("value", "n", "stderr", "definition", "higher_is_better", "excluded", "note")
    return {key: result[key] for key in keys}


def _measures(rows: list[dict[str, Any]], sets: set[str]) -> list[str]:
    return list(dict.fromkeys(m for row in rows for name, by in row["scores"].items() if name in sets for m in by))


def _values(row: dict[str, Any], names: list[str], measure: str) -> list[float | None]:
    return [row["scores"].get(name, {}).get(measure, {}).get("value") for name in names]


def _summary(
    measure: str, rows: list[dict[str, Any]], stream: Stream, tasks: list[str], general: list[str]
) -> dict[str, Any]:
    """Continual metrics over the tasks that have this measure, once all their stages are there.

    R has one row for the base and one per task, right after the stage that teaches it; the last row is the
    end of the stream.
    """
    mine = [t for t in tasks if rows[0]["scores"].get(t, {}).get(measure) is not None]
    wide = [g for g in general if rows[0]["scores"].get(g, {}).get(measure) is not None]
    higher = next(by[measure]["higher_is_better"] for by in rows[0]["scores"].values() if measure in by)
    found: dict[str, Any] = {}
    if mine and len(rows) == len(stream.stages) + 1:
        taught = [i for i, stage in enumerate(stream.stages, start=1) if stage.name in mine]
        picked = [rows[0], *(rows[i] for i in taught[:-1]), rows[-1]]
        scores = [_values(row, mine, measure) for row in picked]
        found["average_performance"] = _as_json(continual.average_performance(scores))
        for level in (continual.mean_average_performance, continual.plasticity):
            found[level.__name__] = _as_json(level(scores))
        for formula in (continual.bwt_gem, continual.fwt_gem, continual.forgetting_max):
            found[formula.__name__] = _as_json(formula(scores, higher_is_better=higher))
    if wide:
        by_stage = [dict(zip(wide, _values(row, wide, measure), strict=True)) for row in rows]
        averages = [[v for v in by.values() if v is not None] for by in by_stage]
        found["general_average"] = [sum(v) / len(v) if v else None for v in averages]
        found["general_delta"] = _as_json(continual.general_delta(by_stage, higher_is_better=higher))
    return found


def _as_json(summary: Any) -> dict[str, Any]:
    return {"value": summary.value, "formula": summary.formula, "n": summary.n, "reason": summary.reason}
