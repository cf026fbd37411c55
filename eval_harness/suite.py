"""A suite: named sets of rows, how they are asked and what is measured on them, from a YAML file.

    description: what it is for, and what it costs
    sets:
      NAME: {task | file | hub: ..., config: ..., revision: ..., split: test, fields: {...}, limit: 200, shuffle: false,
             measures: [...], group: task | general, exact_match: one_pass | generate,
             chat_template: auto | none, system: TEXT, strip_reasoning: true | PATTERN,
             num_fewshot: 5, fewshot_split: train | fewshot_file: FILE, fewshot_seed: 0,
             generate: {max_new_tokens: 64, stop: [...], temperature: 0, top_p: 1, top_k: 0, seed: 0}}
      NAME: {lm_eval: TASK, num_fewshot: 5, include_path: FOLDER, limit: 200, group: ..., chat_template: ...,
             system: ...}
    combined:
      NAME: {measure: model_utility, sets: {retain: SET, real_authors: SET, world_facts: SET}}
      NAME: {measure: forget_quality, set: SET, reference: FILE}, ... (see `eval_harness.combine`)

What a set leaves out is its task's (see `eval_harness.tasks`). Files and folders are looked for relative to the
suite's own file. docs/evaluate.md says what every key means.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import yaml

from eval_harness import strict_yaml
from eval_harness.combine import CombineError, check_combined
from eval_harness.generation import Generation
from eval_harness.items import EvalSet
from eval_harness.lm_eval_adapter import LmEvalSet
from eval_harness.measure import MeasureError, check, default_measures
from eval_harness.measures import MEASURES
from eval_harness.prompts import Prompting
from eval_harness.rows import Row, RowError, canonical
from eval_harness.sources import SourceError, find_task, read_rows
from eval_harness.suggest import did_you_mean
from eval_harness.suite_keys import ORIGINS
from eval_harness.suite_keys import problems as of_set
from eval_harness.tasks import Task

SHIPPED = Path(__file__).parent / "suites"
TOP = ("description", "sets", "combined")
SHOWN = 3  # bad rows of a set that are named; the others are counted


class SuiteError(ValueError):
    """A suite that cannot be used: every problem, one a line."""


@dataclass(slots=True)
class Suite:
    """What a suite's file says, with all rows read.

    sets       that eval_harness.measure.measure takes
    lm_eval    that eval_harness.lm_eval_adapter.run takes
    combined   that eval_harness.combine.combine takes
    """

    description: str
    sets: list[EvalSet] = field(default_factory=list)
    lm_eval: list[LmEvalSet] = field(default_factory=list)
    combined: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Of all sets."""
        return [one.name for one in self.sets] + [one.name for one in self.lm_eval]


def shipped() -> dict[str, str]:
    """Name -> description of the suites of this package."""
    return {path.stem: _read(path).get("description", "") for path in sorted(SHIPPED.glob("*.yaml"))}


def outline(name_or_path: str, *, limit: int | None = None) -> list[tuple[str, str, int | None]]:
    """Every set's name, origin and number of rows, without reading any: None where only the rows themselves tell.

    Raises:
        SuiteError: unknown suite, or its file cannot be used.
    """
    path, content = _opened(name_or_path)
    problems = [*_of_top(content), *(line for name, spec in content["sets"].items() for line in _of_keys(name, spec))]
    _refuse(path, problems)
    return [(str(name), *_outlined(spec, limit)) for name, spec in content["sets"].items()]


def load_suite(
    name_or_path: str, *, limit: int | None = None, data: str | Path | None = None, seed: int | None = None
) -> Suite:
    """A suite with its rows.

    Args:
        name_or_path: a shipped suite's name, or a YAML file.
        limit: at most so many rows of each set; a set's own smaller limit stays. They are the first ones, of a set
            with `shuffle` the first of a fixed random order, so that a smaller limit is a part of a larger one.
        data: folder of files that win over the hub for tasks, see `eval_harness.sources.read_rows`.
        seed: of shots and of sampled continuations, for sets that name none; None is 0.

    Raises:
        SuiteError: unknown suite, unknown keys or values, sources without rows, rows of no known form or without what
            their measures need: all problems, one a line, each with its place.
    """
    path, content = _opened(name_or_path)
    suite = Suite(content.get("description", ""))
    reading = _Reading(path.parent, limit, data, seed)
    problems = list(_of_top(content))
    unread: dict[str, tuple[str, ...]] = {}  # of a set that cannot be read no combined quantity shall complain
    for name, spec in content["sets"].items():
        wrong = list(_of_keys(name, spec)) or list(reading.put(suite, str(name), spec))
        unread |= {str(name): tuple(MEASURES)} if wrong else {}
        problems += wrong
    if _is_mapping_of_mappings(content.get("combined", {})):
        suite.combined = {str(name): reading.combined(spec) for name, spec in content.get("combined", {}).items()}
        measures = {one.name: one.measures or default_measures(one.rows) for one in suite.sets}
        try:
            check_combined(suite.combined, measures | unread)
        except CombineError as error:
            problems += str(error).splitlines()
    _refuse(path, problems)
    return suite


@dataclass(slots=True)
class _Read:
    """Rows with the place of each, and what is wrong with the others."""

    rows: list[Row] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    def problems(self) -> Iterator[str]:
        yield from self.bad[:SHOWN]
        if len(self.bad) > SHOWN:
            yield f"{len(self.bad) - SHOWN} more rows cannot be read either"


@dataclass(frozen=True, slots=True)
class _Reading:
    """What decides how sets are read, beside their own keys."""

    folder: Path
    limit: int | None
    data: str | Path | None
    seed: int | None

    def put(self, suite: Suite, name: str, spec: Mapping[str, Any]) -> Iterator[str]:
        """Read a set into the suite; what is wrong with it instead."""
        try:
            if "lm_eval" in spec:
                suite.lm_eval.append(self.lm_eval_set(name, spec))
            else:
                suite.sets.append(self.eval_set(name, spec))
        except (SourceError, RowError) as error:
            yield from (f"sets.{name}: {line}" for line in str(error).splitlines())

    def eval_set(self, name: str, spec: Mapping[str, Any]) -> EvalSet:
        """Raises SourceError or RowError: all problems of the set, one a line."""
        task = find_task(spec["task"]) if "task" in spec else None
        read = self._rows(spec, spec.get("split", "test"), _limit(self.limit, spec), spec.get("shuffle", False))
        measures = tuple(spec["measures"]) if "measures" in spec else (task.measures if task else None)
        prompting = self._prompting(spec, task)
        shots = self._shots(spec, task) if prompting.num_fewshot else _Read()
        one = EvalSet(
            name,
            read.rows,
            measures,
            prompting=prompting,
            generation=_generation(spec, task, self.seed),
            fewshot=shots.rows,
            **{key: spec[key] for key in ("group", "exact_match") if key in spec},
        )
        unfit = dict(_unfit(measures or (), read))
        problems = [*read.problems(), *shots.problems(), *unfit.values()]
        if read.rows:
            fit = tuple(measure for measure in measures or () if measure not in unfit)
            problems += _of_plan(replace(one, measures=fit or None))
        if problems:
            raise RowError("\n".join(problems))
        return one

    def lm_eval_set(self, name: str, spec: Mapping[str, Any]) -> LmEvalSet:
        include = spec.get("include_path")
        return LmEvalSet(
            name,
            spec["lm_eval"],
            num_fewshot=spec.get("num_fewshot"),
            include_path=None if include is None else str(self.folder / include),
            limit=_limit(self.limit, spec),
            apply_chat_template=spec.get("chat_template") == "auto",
            **{key: spec[key] for key in ("group", "system") if key in spec},
        )

    def combined(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        file = spec.get("reference")
        return {**spec, "reference": str(self.folder / file)} if isinstance(file, str) else dict(spec)

    def _rows(self, spec: Mapping[str, Any], split: str, limit: int | None, shuffle: bool) -> _Read:
        origin = {key: spec[key] for key in (*ORIGINS, "config", "revision") if key in spec}
        if "file" in origin:
            origin["file"] = self.folder / origin["file"]
        raw = read_rows(**origin, split=split, data=self.data)
        order = list(range(len(raw)))
        if shuffle:
            Random(0).shuffle(order)
        source = next(str(origin[key]) for key in ORIGINS if key in origin)
        read = _Read()
        for position in order[:limit]:
            place = f"{source}: row {position}"
            try:
                read.rows.append(canonical(raw[position], spec.get("fields")))
                read.places.append(place)
            except RowError as error:
                read.bad.append(f"{place}: {error}")
        return read

    def _shots(self, spec: Mapping[str, Any], task: Task | None) -> _Read:
        if "fewshot_file" in spec:
            fields = {"fields": spec["fields"]} if "fields" in spec else {}
            return self._rows({"file": spec["fewshot_file"], **fields}, "train", None, False)
        split = spec.get("fewshot_split") or (task.fewshot_split if task else "train")
        return self._rows(spec, split, None, False)

    def _prompting(self, spec: Mapping[str, Any], task: Task | None) -> Prompting:
        given = {key: spec[key] for key in ("chat_template", "system", "num_fewshot", "fewshot_seed") if key in spec}
        own = {"chat_template": task.chat_template, "num_fewshot": task.num_fewshot} if task else {}
        seeded = {"fewshot_seed": self.seed} if self.seed is not None else {}
        return Prompting(**{**own, **seeded, **given}, strip_reasoning=_reasoning(spec.get("strip_reasoning")))


def _generation(spec: Mapping[str, Any], task: Task | None, seed: int | None) -> Generation:
    settings = {**(task.generate if task else {}), **spec.get("generate", {})}
    if settings.get("temperature") and seed is not None:  # greedy text has no seed, and its definition none
        settings = {"seed": seed, **settings}
    return Generation(**{**settings, "stop": tuple(settings.get("stop", ()))})


def _reasoning(given: Any) -> str | None:
    if given is not True:
        return given or None
    from eval_harness.metrics.text import REASONING

    return REASONING


def _limit(limit: int | None, spec: Mapping[str, Any]) -> int | None:
    return min((one for one in (limit, spec.get("limit")) if one is not None), default=None)


def _unfit(measures: Sequence[str], read: _Read) -> Iterator[tuple[str, str]]:
    """Every measure that is unknown, or cannot be taken of some of the rows: the first by its place, and how many."""
    for name in measures:
        if name not in MEASURES:
            hint = did_you_mean(name, MEASURES)
            yield name, f"measures: {name!r}: unknown: {hint}known: {', '.join(MEASURES)}"
            continue
        reasons = [_why_not(name, row) for row in read.rows]
        found = [(place, why) for place, why in zip(read.places, reasons, strict=True) if why]
        if found:
            (place, why), more = found[0], f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            yield name, f"{place}{more}: {name} is not defined for a row {why}"


def _why_not(name: str, row: Row) -> str | None:
    """What keeps a measure from a row; None where it can be taken."""
    measure = MEASURES[name]
    lacking = [need for need in measure.needs if not getattr(row, need)]
    if lacking:
        return f"without {' and '.join(lacking)}"
    return None if row.kind in measure.kinds else f"of the form {row.kind}"


def _of_plan(one: EvalSet) -> list[str]:
    """What `eval_harness.measure.check` says of a set, without its name."""
    try:
        check([one])
    except MeasureError as error:
        return [line.removeprefix(f"set {one.name!r}: ") for line in str(error).splitlines()]
    return []


def _outlined(spec: Mapping[str, Any], limit: int | None) -> tuple[str, int | None]:
    least = _limit(limit, spec)
    if "lm_eval" in spec:
        return f"lm_eval {spec['lm_eval']}", least
    if "task" not in spec:
        return next(f"{key} {spec[key]}" for key in ORIGINS if key in spec), least
    split = spec.get("split", "test")
    task = find_task(spec["task"])
    if task is None:
        rows: int | None = len(read_rows(task=spec["task"], split=split))
    else:
        rows = task.test_rows if split == "test" else None
    known = [one for one in (rows, least) if one is not None]
    return f"task {spec['task']}", min(known, default=None)


def _opened(name_or_path: str) -> tuple[Path, dict[str, Any]]:
    path = _find(name_or_path)
    content = _read(path)
    if not isinstance(content.get("sets"), dict) or not content["sets"]:
        raise SuiteError(f"{path}: `sets` must map at least one name to its source")
    return path, content


def _of_top(content: Mapping[str, Any]) -> Iterator[str]:
    combined = content.get("combined", {})
    if not _is_mapping_of_mappings(combined):
        yield f"combined = {combined!r}: must map each name to {{measure: ..., ...}}"
        return
    twice = [name for name in combined if name in content["sets"]]
    yield from (f"combined.{name}: is the name of a set; give it another" for name in twice)


def _of_keys(name: Any, spec: Any) -> Iterator[str]:
    return of_set(f"sets.{name}", spec)


def _is_mapping_of_mappings(content: Any) -> bool:
    return isinstance(content, dict) and all(isinstance(one, dict) for one in content.values())


def _refuse(path: Path, problems: Sequence[str]) -> None:
    if problems:
        raise SuiteError("\n".join(f"{path}: {problem}" for problem in problems))


def _find(name_or_path: str) -> Path:
    if name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not path.is_file():
            raise SuiteError(f"{path}: no such file")
        return path
    path = SHIPPED / f"{name_or_path}.yaml"
    names = [one.stem for one in sorted(SHIPPED.glob("*.yaml"))]
    if name_or_path not in names:
        hint = did_you_mean(name_or_path, names)
        raise SuiteError(
            f"suite {name_or_path!r}: unknown: {hint}known: {', '.join(names)}; a file's name ends in .yaml"
        )
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        content = strict_yaml.load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SuiteError(f"{path}: not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise SuiteError(f"{path}: must be a mapping with `sets`")
    unknown = sorted(set(map(str, content)) - set(TOP))
    if unknown:
        raise SuiteError(f"{path}: unknown keys {', '.join(unknown)}; allowed: {', '.join(TOP)}")
    return content
