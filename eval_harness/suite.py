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

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import yaml

from eval_harness.combine import CombineError, check_combined
from eval_harness.generation import Generation
from eval_harness.items import EvalSet
from eval_harness.lm_eval_adapter import LmEvalSet
from eval_harness.measure import default_measures
from eval_harness.measures import MEASURES
from eval_harness.prompts import Prompting
from eval_harness.rows import Row, RowError, canonical
from eval_harness.sources import SourceError, find_task, read_rows
from eval_harness.suite_keys import ORIGINS
from eval_harness.suite_keys import problems as of_set
from eval_harness.tasks import Task

SHIPPED = Path(__file__).parent / "suites"
TOP = ("description", "sets", "combined")


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
    _, content = _checked(name_or_path)
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
    path, content = _checked(name_or_path)
    suite = Suite(content.get("description", ""))
    reading = _Reading(path.parent, limit, data, seed)
    problems = []
    for name, spec in content["sets"].items():
        try:
            if "lm_eval" in spec:
                suite.lm_eval.append(reading.lm_eval_set(str(name), spec))
            else:
                suite.sets.append(reading.eval_set(str(name), spec))
        except (SourceError, RowError) as error:
            problems += [f"{path}: sets.{name}: {line}" for line in str(error).splitlines()]
    suite.combined = {str(name): reading.combined(spec) for name, spec in content.get("combined", {}).items()}
    if not problems:
        try:
            check_combined(suite.combined, {one.name: one.measures or default_measures(one.rows) for one in suite.sets})
        except CombineError as error:
            problems += [f"{path}: {line}" for line in str(error).splitlines()]
    if problems:
        raise SuiteError("\n".join(problems))
    return suite


@dataclass(frozen=True, slots=True)
class _Reading:
    """What decides how sets are read, beside their own keys."""

    folder: Path
    limit: int | None
    data: str | Path | None
    seed: int | None

    def eval_set(self, name: str, spec: Mapping[str, Any]) -> EvalSet:
        task = find_task(spec["task"]) if "task" in spec else None
        rows, place = self._rows(spec, spec.get("split", "test"), _limit(self.limit, spec), spec.get("shuffle", False))
        measures = tuple(spec["measures"]) if "measures" in spec else (task.measures if task else None)
        problems = list(_unfit(measures or (), rows, place))
        if problems:
            raise RowError("\n".join(problems))
        prompting = self._prompting(spec, task)
        return EvalSet(
            name,
            rows,
            measures,
            prompting=prompting,
            generation=_generation(spec, task, self.seed),
            fewshot=self._shots(spec, task) if prompting.num_fewshot else [],
            **{key: spec[key] for key in ("group", "exact_match") if key in spec},
        )

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

    def _rows(
        self, spec: Mapping[str, Any], split: str, limit: int | None, shuffle: bool
    ) -> tuple[list[Row], Sequence[str]]:
        """Rows, and the place of each."""
        origin = {key: spec[key] for key in (*ORIGINS, "config", "revision") if key in spec}
        if "file" in origin:
            origin["file"] = self.folder / origin["file"]
        raw = read_rows(**origin, split=split, data=self.data)
        order = list(range(len(raw)))
        if shuffle:
            Random(0).shuffle(order)
        source = next(str(origin[key]) for key in ORIGINS if key in origin)
        places = [f"{source}: row {position}" for position in order[:limit]]
        rows = []
        for position, place in zip(order, places, strict=False):
            try:
                rows.append(canonical(raw[position], spec.get("fields")))
            except RowError as error:
                raise RowError(f"{place}: {error}") from error
        return rows, places

    def _shots(self, spec: Mapping[str, Any], task: Task | None) -> list[Row]:
        if "fewshot_file" in spec:
            fields = {"fields": spec["fields"]} if "fields" in spec else {}
            return self._rows({"file": spec["fewshot_file"], **fields}, "train", None, False)[0]
        split = spec.get("fewshot_split") or (task.fewshot_split if task else "train")
        return self._rows(spec, split, None, False)[0]

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


def _unfit(measures: Sequence[str], rows: Sequence[Row], places: Sequence[str]) -> Iterator[str]:
    """The first row, by its place, that a measure cannot be taken of."""
    for name in measures:
        if name not in MEASURES:
            near = difflib.get_close_matches(name, MEASURES, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            yield f"measures: {name!r}: unknown: {hint}known: {', '.join(MEASURES)}"
            continue
        measure = MEASURES[name]
        for row, place in zip(rows, places, strict=True):
            lacking = [need for need in measure.needs if not getattr(row, need)]
            if row.kind not in measure.kinds or lacking:
                needed = f"without {' and '.join(lacking)}" if lacking else f"of the form {row.kind}"
                yield f"{place}: {name} is not defined for a row {needed}"
                break


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


def _checked(name_or_path: str) -> tuple[Path, dict[str, Any]]:
    path = _find(name_or_path)
    content = _read(path)
    sets, combined = content.get("sets"), content.get("combined", {})
    if not isinstance(sets, dict) or not sets:
        raise SuiteError(f"{path}: `sets` must map at least one name to its source")
    problems = [problem for name, spec in sets.items() for problem in of_set(f"sets.{name}", spec)]
    if not isinstance(combined, dict) or not all(isinstance(spec, dict) for spec in combined.values()):
        problems.append(f"combined = {combined!r}: must map each name to {{measure: ..., ...}}")
    else:
        problems += [f"combined.{name}: is the name of a set; give it another" for name in combined if name in sets]
    if problems:
        raise SuiteError("\n".join(f"{path}: {problem}" for problem in problems))
    return path, content


def _find(name_or_path: str) -> Path:
    if name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not path.is_file():
            raise SuiteError(f"{path}: no such file")
        return path
    path = SHIPPED / f"{name_or_path}.yaml"
    names = [one.stem for one in sorted(SHIPPED.glob("*.yaml"))]
    if name_or_path not in names:
        near = difflib.get_close_matches(name_or_path, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise SuiteError(
            f"suite {name_or_path!r}: unknown: {hint}known: {', '.join(names)}; a file's name ends in .yaml"
        )
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SuiteError(f"{path}: not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise SuiteError(f"{path}: must be a mapping with `sets`")
    unknown = sorted(set(map(str, content)) - set(TOP))
    if unknown:
        raise SuiteError(f"{path}: unknown keys {', '.join(unknown)}; allowed: {', '.join(TOP)}")
    return content
