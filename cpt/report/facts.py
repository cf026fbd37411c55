"""Tables of what a run did: cost, facts of stages and methods, metrics of the matrix, where all of it is from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cpt.report.heatmap import ABSENT, shown
from cpt.report.read import SHARES, RunView, StageFiles, as_list, as_object, finite, points
from cpt.report.scaffold import clip, isolated
from cpt.report.summary import LEVELS

COST = ("stage", "training, s", "evaluation, s", "share evaluating", "tokens", "tokens/s", "peak, GiB", "written, MB")
LONGEST = 300  # characters of a fact
COUNTED = {  # of a stage's rows, in words
    "dropped_too_long": "prompts left out: no room for a completion",
    "dropped_without_target": "rows left out: no answer within max_length",
    "truncated": "rows cut at max_length",
    "lost_characters": "characters that the tokenizer does not keep",
}


def cost(view: RunView) -> list[tuple[str, ...]]:
    """A row of COST for every stage that has cost anything, and their sum where there are several."""
    rows = [(stage, _cost(stage)) for stage in view.stages]
    known = [(stage, one) for stage, one in rows if any(value is not None for value in one)]
    lines = [_cost_line(stage.title, one) for stage, one in known]
    if len(known) > 1:
        lines.append(_cost_line("all", _sum([one for _, one in known])))
    return lines


def stage_facts(view: RunView) -> list[tuple[str, list[tuple[str, str]]]]:
    """(stage, its facts in words) for every stage that was begun."""
    return [(stage.title, list(_facts(stage))) for stage in view.stages[1:] if stage.is_begun]


def method_facts(view: RunView) -> list[tuple[str, str, str, str]]:
    """(stage, method, its settings, what it says of itself) for every method of every begun stage."""
    found = []
    for stage in view.stages[1:]:
        said = as_object(stage.facts.get("methods"))
        for settings in _methods(stage):
            name = str(settings.get("type"))
            given = {key: value for key, value in settings.items() if key != "type"}
            facts = said.get(name)
            did = ABSENT if not facts else in_words(facts)
            found.append((stage.title, name, in_words(_given(given)), did))
    return found


def metrics(view: RunView) -> list[tuple[str, str, str, str]]:
    """(measure, value, formula, items or the reason why it is undefined) of matrix.json's summary."""
    found = []
    for measure, by in as_object(view.matrix.get("summary")).items():
        for one in as_object(by).values():
            if not isinstance(one, dict) or "formula" not in one:
                continue
            value, formula = finite(one.get("value")), str(one["formula"])
            why = str(one.get("reason") or "the value is not a number") if value is None else f"n = {one.get('n')}"
            found.append((str(measure), _metric(value, formula, str(measure)), formula, why))
    return found


def other_measures(view: RunView, most: int) -> tuple[tuple[str, ...], list[tuple[str, ...]], int]:
    """What sets were measured by beside their first measure: header, rows, and how many rows more than `most` cells."""
    header = ("set, measure", *(row.title for row in view.rows))
    pairs = [
        (name, measure)
        for name in view.sets
        for measure in dict.fromkeys(m for row in view.rows for m in row.scores.get(name, {}))
        if measure != view.measures[name]
    ]
    fit = most // max(1, len(view.rows))
    rows = [
        (f"{isolated(name)}, {measure}", *(_shown(row, name, measure) for row in view.rows))
        for name, measure in pairs[:fit]
    ]
    return header, rows, len(pairs) - len(rows)


def _shown(row: StageFiles, name: str, measure: str) -> str:
    score = row.scores.get(name, {}).get(measure)
    return ABSENT if score is None else shown(score)


def provenance(view: RunView) -> list[tuple[str, str]]:
    """What the run was made of, as (name, value); absent ones are left out."""
    machine, model = as_object(view.info.get("machine")), view.stream.get("model")
    where = model.get("path") if isinstance(model, dict) else model
    said = [
        ("run", view.path.name),
        ("stream", view.name),
        ("created", view.info.get("created")),
        ("base", where),
        ("identity of the base", view.stages[0].record.get("identity") if view.stages else None),
        ("seed", view.stream.get("seed")),
        ("libraries", ", ".join(f"{name} {v}" for name, v in as_object(view.info.get("libraries")).items())),
        ("machine", ", ".join(f"{name} {value}" for name, value in machine.items())),
    ]
    said += [(f"libraries of {stage}", versions) for stage, versions in _other_libraries(view)]
    return [(name, clip(str(value), 600)) for name, value in said if value not in (None, "")]


def origins(view: RunView) -> list[tuple[str, ...]]:
    """(stage, kind, seed, data, rows, sha256 of the rows, identity, parent) of every begun stage."""
    found = []
    for stage in view.stages[1:]:
        data = as_object(stage.record.get("data"))
        if not stage.record:
            continue
        cells = (stage.kind, stage.record.get("seed"), data.get("label"), data.get("rows"))
        hashes = (data.get("sha256"), stage.record.get("identity"), stage.record.get("parent"))
        short = (ABSENT if one is None else str(one)[:12] for one in hashes)
        found.append((stage.title, *(ABSENT if c is None else str(c) for c in cells), *short))
    return found


def definitions(view: RunView) -> list[tuple[str, str, str]]:
    """(set, definition of the measure it is read by, items)."""
    found = []
    for name in view.sets:
        score = next((s for row in view.rows if (s := view.score(row, name))), None)
        if score:
            found.append((name, score.definition, ABSENT if score.n is None else str(score.n)))
    return found


def commands(view: RunView) -> list[tuple[str, tuple[str, ...]]]:
    """(what for, words of the command line)."""
    run, trained = str(view.path), [stage for stage in view.stages[1:] if stage.done is not None]
    found: list[tuple[str, tuple[str, ...]]] = []
    if not view.finished:
        found.append(("go on with this run", ("cpt", "resume", run)))
    found.append(("the same stream again, from its start", ("cpt", "run", str(view.path / "stream.yaml"), "--new")))
    found.append(("this page again", ("cpt", "report", run)))
    found.append(
        ("against another run, with intervals", ("cpt", "compare", run, "OTHER_RUN", "--html", "compare.html"))
    )
    if trained:
        name = trained[-1].name
        words = ("cpt", "export", run, "--stage", name, "--to", f"{name}_model")
        found.append(("the last model, to load elsewhere", words))
    return found


def undefined(view: RunView, most: int) -> list[str]:
    """Scores without a value, in words: the first `most`, and how many more there are."""
    said = [
        f"{isolated(name)} after {row.title}: {score.reason}"
        for row in view.rows
        for name in view.sets
        if (score := view.score(row, name)) is not None and score.value is None
    ]
    more = len(said) - most
    return said[:most] + ([f"{more} more are in matrix.json"] if more > 0 else [])


def in_words(fact: Any) -> str:
    """A fact as a line: `name value` of an object, values of a list, figures with thousands; clipped."""
    if isinstance(fact, Mapping):
        said = ", ".join(f"{isolated(str(key).replace('_', ' '))} {in_words(value)}" for key, value in fact.items())
    elif isinstance(fact, list | tuple):
        said = ", ".join(in_words(value) for value in fact)
    elif isinstance(fact, bool) or fact is None:
        said = {True: "yes", False: "no", None: ABSENT}[fact]
    elif isinstance(fact, int):
        said = f"{fact:,}"
    elif isinstance(fact, float):
        said = f"{fact:.4g}"
    else:
        said = str(fact)
    return clip(said, LONGEST)


def _given(settings: Any) -> Any:
    """Without what is not set: null, false and empty ones, at any depth."""
    if isinstance(settings, dict):
        return {key: _given(value) for key, value in settings.items() if value not in (None, False, "", [], {})}
    return [_given(value) for value in settings] if isinstance(settings, list) else settings


def _cost(stage: StageFiles) -> tuple[float | None, ...]:
    """Seconds in all, of training, of evaluation after it and within it, tokens, their seconds, peak, bytes."""
    facts = stage.facts
    tokens, train = finite(facts.get("tokens")), finite(facts.get("train_seconds"))
    within = finite(as_object(facts.get("within")).get("seconds")) if facts else None
    evaluated = finite(stage.eval_facts.get("seconds"))
    return (
        finite(facts.get("seconds")),
        train,
        evaluated,
        within,
        tokens,
        finite(facts.get("peak_gib")),
        finite(facts.get("bytes_written")),
    )


def _sum(rows: Sequence[tuple[float | None, ...]]) -> tuple[float | None, ...]:
    """Of every column; memory is the highest. What no stage knows is not known."""
    columns = [[value for value in column if value is not None] for column in zip(*rows, strict=True)]
    return tuple(
        None if not column else max(column) if place == 5 else math.fsum(column) for place, column in enumerate(columns)
    )


def _cost_line(name: str, one: tuple[float | None, ...]) -> tuple[str, ...]:
    whole, train, evaluated, within, tokens, peak, written = one
    rate = tokens / train if tokens is not None and train else None
    spent = (evaluated or 0.0) + (within or 0.0)
    total = (whole or train or 0.0) + (evaluated or 0.0)
    known = evaluated is not None or within is not None
    return (
        name,
        _figure(train),
        _figure(spent if known else None),
        f"{100 * spent / total:.0f} %" if known and total else ABSENT,
        _figure(tokens, 0),
        _figure(rate, 0),
        ABSENT if peak is None else f"{peak:.2f}",
        ABSENT if written is None else _figure(written / 1e6),
    )


def _figure(value: float | None, digits: int = 1) -> str:
    return ABSENT if value is None else f"{value:,.{digits if value < 1000 else 0}f}"


def _facts(stage: StageFiles) -> Iterator[tuple[str, str]]:
    facts = stage.facts
    yield "state", stage.state
    if steps := facts.get("steps"):
        again = f", went on from {facts['resumed_from']}" if facts.get("resumed_from") else ""
        yield "optimizer steps", f"{in_words(steps)}{again}"
    trained, parameters = finite(facts.get("trained_parameters")), finite(facts.get("parameters"))
    if trained is not None and parameters:
        yield "trained parameters", f"{trained:,.0f} of {parameters:,.0f} ({100 * trained / parameters:.3g} %)"
    for name, rows in as_object(facts.get("rows")).items():
        yield f"rows, {isolated(name)}", _rows(as_object(rows))
    for name, found in as_object(facts.get("rewards")).items():
        yield f"reward {name}", in_words(found)
    within = as_object(facts.get("within"))
    if "left_out" in within:
        yield "not scored while it trained", in_words(within["left_out"])
    if processes := facts.get("processes"):
        yield "processes", f"{in_words(processes)} ({facts.get('distributed_type', ABSENT)})"
    if overlap := as_object(stage.record.get("overlap")):
        yield "test rows found in its training rows", in_words(overlap)
    if stage.facts.get("lineage") not in (None, stage.label):
        yield "model", in_words(stage.facts["lineage"])


def _rows(rows: Mapping[str, Any]) -> str:
    counted = [f"{in_words(rows[key])} {text}" for key, text in COUNTED.items() if rows.get(key)]
    return "; ".join([in_words(rows.get("rows")), *counted])


def _metric(value: float | None, formula: str, measure: str) -> str:
    if value is None:
        return ABSENT
    sign = "" if formula.split(" = ")[0] in LEVELS else "+"
    text = points(value, sign) if measure in SHARES else f"{value:{sign}.3f}"
    return text.replace("-", "\u2212")


def _other_libraries(view: RunView) -> Iterator[tuple[str, str]]:
    """Stages that were finished with other versions than the run began with."""
    begun = as_object(view.info.get("libraries"))
    for stage in view.stages:
        own = as_object((stage.done or {}).get("libraries"))
        unlike = [f"{name} {version}" for name, version in own.items() if begun.get(name) != version]
        if unlike:
            yield stage.title, ", ".join(unlike)


def _methods(stage: StageFiles) -> list[dict[str, Any]]:
    return [one for one in as_list(as_object(stage.record.get("stage")).get("methods")) if isinstance(one, dict)]
