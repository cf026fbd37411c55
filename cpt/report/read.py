"""A run directory as it lies there, finished or not, whole or not: what is missing or damaged is said, not raised."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from cpt.report.scaffold import isolated

DRIFT = "drift"  # the file of a stage's drift among its sets
SURE = 1.959964  # standard errors to either side that hold 95 %
TAIL = 0.025
SHARES = ("exact_match", "acc")  # definitions that tables show in per cent


@dataclass(frozen=True)
class Score:
    """One result of matrix.json. value is None where it is undefined, and `reason` says why."""

    value: float | None
    reason: str | None
    n: int | None
    stderr: float | None
    definition: str
    higher_is_better: bool
    note: str | None = None

    @classmethod
    def of(cls, raw: Any) -> Score | None:
        """None where `raw` is no result at all."""
        if not isinstance(raw, Mapping) or "value" not in raw:
            return None
        note = raw.get("note") if isinstance(raw.get("note"), str) else None
        given = raw["value"]
        value, reason = finite(given), None
        if value is None:
            is_nan = (isinstance(given, float) and not math.isfinite(given)) or "value is nan" in (note or "")
            reason = "NaN: the value is not a number" if is_nan else note or "undefined, and its file does not say why"
        n, definition = raw.get("n"), raw.get("definition")
        return cls(
            value,
            reason,
            n if isinstance(n, int) else None,
            finite(raw.get("stderr")),
            definition if isinstance(definition, str) else "",
            raw.get("higher_is_better") is not False,
            note,
        )

    @property
    def is_percent(self) -> bool:
        return self.definition.startswith(SHARES)

    @property
    def is_nan(self) -> bool:
        return self.reason is not None and self.reason.startswith("NaN")

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 %: 1.96 standard errors to either side; where all items are alike (a share of 0 or 1), the exact binomial
        one (Clopper and Pearson 1934)."""
        if self.value is None or self.stderr is None or self.n is None or self.n < 2:
            return None
        if self.is_percent and self.value in (0.0, 1.0):
            reach = TAIL ** (1 / self.n)
            return (reach, 1.0) if self.value else (0.0, 1 - reach)
        if not self.stderr:
            return None
        low, high = self.value - SURE * self.stderr, self.value + SURE * self.stderr
        return (max(low, 0.0), min(high, 1.0)) if self.is_percent else (low, high)


@dataclass
class StageFiles:
    """What one stage's folder holds. index 0 is the base."""

    index: int
    name: str
    folder: Path
    kind: str
    record: dict[str, Any] = field(default_factory=dict)
    done: dict[str, Any] | None = None
    measured: dict[str, Any] | None = None
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    within: dict[str, Any] | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    curve_head: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its folder's name."""
        return f"{self.index:02d}_{self.name}"

    @property
    def title(self) -> str:
        """What the report calls it; a name from right to left does not move its number."""
        return f"{self.index} {isolated(self.name)}"

    @property
    def facts(self) -> dict[str, Any]:
        return as_object((self.done or {}).get("facts"))

    @property
    def eval_facts(self) -> dict[str, Any]:
        return as_object((self.measured or {}).get("facts"))

    def items_of(self, name: str) -> Path | None:
        """Where a set's items are; None for a name that is no file's."""
        file = self.folder / "eval" / f"{name}.json"
        return file if file.name == f"{name}.json" and len(file.name.encode()) < 256 else None

    @property
    def is_base(self) -> bool:
        return self.index == 0

    @property
    def is_trained(self) -> bool:
        return self.is_base or self.done is not None

    @property
    def is_over(self) -> bool:
        """Trained, and measured on all that was asked for, which may be nothing."""
        nothing_asked = self.measured is not None and not as_list(self.measured.get("sets"))
        return self.is_trained and bool(self.scores or nothing_asked)

    @property
    def is_begun(self) -> bool:
        return bool(self.record or self.metrics)

    @property
    def reached(self) -> int:
        """Optimizer steps, as far as they are logged."""
        return max((int(line["step"]) for line in self.metrics), default=0)

    @property
    def steps(self) -> int | None:
        """Optimizer steps that the stage takes in all; None where no file says it yet."""
        asked = as_object(self.record.get("training")).get("max_steps")
        known = (self.facts.get("steps"), self.curve_head.get("steps"), asked)
        return next((step for step in known if isinstance(step, int) and step > 0), None)

    @property
    def state(self) -> str:
        if self.is_over:
            return (
                "measured" if self.scores else "nothing to measure" if self.is_base else "trained, nothing to measure"
            )
        if self.is_trained:
            return "not measured yet" if self.is_base else "trained, not measured yet"
        if not self.is_begun:
            return "to do"
        of = f" of {self.steps}" if self.steps else ""
        return f"in training or stopped: step {self.reached}{of}"


@dataclass
class RunView:
    """All that a report shows of a run. problems: files that are missing or damaged, in words."""

    path: Path
    info: dict[str, Any]
    stream: dict[str, Any]
    matrix: dict[str, Any]
    stages: list[StageFiles]
    tasks: list[str]
    general: list[str]
    forget: list[str]
    superseded: list[str]
    problems: list[str]

    @property
    def name(self) -> str:
        return str(self.stream.get("name") or self.info.get("name") or self.path.name)

    @property
    def rows(self) -> list[StageFiles]:
        """Stages with scores: the rows of the matrix."""
        return [stage for stage in self.stages if stage.scores]

    @cached_property
    def measures(self) -> dict[str, str]:
        """Set -> the measure it is read by: the first it was measured with."""
        found: dict[str, str] = {}
        for stage in self.stages:
            for name, by in stage.scores.items():
                if by:
                    found.setdefault(name, next(iter(by)))
        return found

    @property
    def sets(self) -> list[str]:
        """Tasks, tests of unlearn stages, general sets, as far as any stage was measured on them."""
        return [name for name in [*self.tasks, *self.forget, *self.general] if name in self.measures]

    @property
    def finished(self) -> bool:
        return bool(self.stages) and all(stage.is_over for stage in self.stages)

    def score(self, stage: StageFiles, name: str) -> Score | None:
        """Of a set by its measure; None where it was not measured."""
        return stage.scores.get(name, {}).get(self.measures.get(name, ""))

    def taught(self, task: str) -> StageFiles | None:
        """The stage that teaches a task, once it was measured after it."""
        return next((stage for stage in self.rows if stage.name == task and not stage.is_base), None)

    def before(self, stage: StageFiles) -> StageFiles | None:
        """The row before; None for the first."""
        return max((row for row in self.rows if row.index < stage.index), key=lambda row: row.index, default=None)


def read(path: Path) -> RunView:
    """Everything of a run that its files hold; costs about a second for 60 stages of 100 sets."""
    problems: list[str] = []
    info = _json(path / "run.json", problems) or {}
    stream = _stream(path / "stream.yaml", problems)
    matrix = _json(path / "matrix.json", problems)
    folders, superseded = _folders(path / "stages")
    stages = [_stage(index, *about, problems) for index, about in sorted(_expected(path, stream, folders).items())]
    if matrix is None and any(stage.measured for stage in stages):
        problems.append("matrix.json: scores are read from the stages' own files instead; `cpt resume` writes it again")
    _add_scores(path, matrix or {}, stages, problems)
    tasks, forget, general = _sets(matrix or {}, stream, stages)
    return RunView(path, info, stream, matrix or {}, stages, tasks, general, forget, superseded, problems)


def points(share: float, sign: str = "") -> str:
    """A share, or a change of one, in per cent; halves that rounding has moved by a last bit are halves again."""
    return f"{round(100 * share, 9):{sign}.1f}"


def finite(value: Any) -> float | None:
    """The number, or None where it is none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def as_object(raw: Any) -> dict[str, Any]:
    """The object, or an empty one where it is none."""
    return raw if isinstance(raw, dict) else {}


def as_list(raw: Any) -> list[Any]:
    """The list, or an empty one where it is none."""
    return raw if isinstance(raw, list) else []


def results(file: Path) -> dict[str, Any]:
    """An eval/SET.json; empty where it cannot be read."""
    return _json(file, []) or {}


def _stage(index: int, name: str, kind: str, folder: Path, problems: list[str]) -> StageFiles:
    stage = StageFiles(index, name, folder, kind)
    if not folder.is_dir():
        return stage
    stage.record = _json(folder / "stage.json", problems) or {}
    stage.kind = str(stage.record.get("kind") or kind)
    stage.done = _json(folder / "DONE", problems, required=False)
    stage.measured = _json(folder / "eval" / "DONE", problems, required=False)
    stage.metrics = [line for line in _lines(folder / "metrics.jsonl", problems) if isinstance(line.get("step"), int)]
    lines = _lines(folder / "within.jsonl", problems)
    stage.curve_head = lines[0] if lines else {}
    stage.curve = [line for line in lines if isinstance(line.get("step"), int) and isinstance(line.get("scores"), dict)]
    return stage


def _expected(
    path: Path, stream: Mapping[str, Any], folders: Mapping[int, tuple[str, Path]]
) -> dict[int, tuple[str, str, Path]]:
    """index -> (name, kind, folder): the base, the stream's stages, and what else lies there."""
    found = {0: ("base", "base", path / "stages" / "00_base")}
    for index, stage in enumerate(as_list(stream.get("stages")), start=1):
        name = str(as_object(stage).get("name", index))
        found[index] = (name, str(as_object(stage).get("kind", "")), path / "stages" / f"{index:02d}_{name}")
    for index, (name, folder) in folders.items():
        found.setdefault(index, (name, "", folder))
    return found


def _folders(stages: Path) -> tuple[dict[int, tuple[str, Path]], list[str]]:
    found, superseded = {}, []
    for folder in sorted(stages.glob("[0-9]*_*")) if stages.is_dir() else []:
        number, _, name = folder.name.partition("_")
        if ".superseded-" in name:
            superseded.append(folder.name)
        elif number.isdigit() and folder.is_dir():
            found[int(number)] = (name, folder)
    return found, superseded


def _add_scores(path: Path, matrix: Mapping[str, Any], stages: Sequence[StageFiles], problems: list[str]) -> None:
    """From matrix.json; of a measured stage that it does not hold yet, from the stage's own files."""
    rows = {row["index"]: row for row in as_list(matrix.get("rows")) if isinstance(as_object(row).get("index"), int)}
    for stage in stages:
        row = rows.get(stage.index)
        if row is not None:
            stage.scores = _scores(as_object(row.get("scores")))
            stage.within = row["within"] if isinstance(row.get("within"), dict) else None
        elif stage.measured is not None:
            files = [stage.folder / "eval" / f"{name}.json" for name in as_list(stage.measured.get("sets"))]
            stage.scores = _scores({file.stem: _json(file, problems) for file in files})


def _scores(raw: Mapping[str, Any]) -> dict[str, dict[str, Score]]:
    found = {
        str(name): {str(measure): score for measure, one in as_object(by).items() if (score := Score.of(one))}
        for name, by in raw.items()
    }
    return {name: by for name, by in found.items() if by}


def _sets(
    matrix: Mapping[str, Any], stream: Mapping[str, Any], stages: Sequence[StageFiles]
) -> tuple[list[str], list[str], list[str]]:
    """Names of tasks, of tests of unlearn stages, of general sets, by the matrix or the stream; the rest is general."""
    planned = [as_object(stage) for stage in as_list(stream.get("stages"))]
    unlearn = [str(stage.get("name")) for stage in planned if stage.get("test") and stage.get("kind") == "unlearn"]
    forget = [str(name) for name in as_list(matrix.get("forget"))] or unlearn
    tested = [stage.get("name") for stage in planned if stage.get("test")]
    tasks = as_list(matrix.get("tasks")) or [name for name in tested if name not in forget]
    general = as_list(matrix.get("general")) or list(as_object(as_object(stream.get("evaluation")).get("general")))
    tasks, general = [str(name) for name in tasks], [str(name) for name in general]
    measured = [name for stage in stages for name in stage.scores]
    others = [name for name in dict.fromkeys(measured) if name not in {*tasks, *forget, *general, DRIFT}]
    trained = {stage.name for stage in stages}
    return [*tasks, *(n for n in others if n in trained)], forget, [*general, *(n for n in others if n not in trained)]


def _stream(file: Path, problems: list[str]) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{file.name}: is missing; stages are known by their folders only")
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"{file.name}: cannot be read ({_first_line(error)}); stages are known by their folders only")
        return {}
    return as_object(found)


def _json(file: Path, problems: list[str], required: bool = True) -> dict[str, Any] | None:
    """An object; None where there is none. A file that is there and is no JSON object is a problem."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if required:
            problems.append(f"{_short(file)}: is missing")
        return None
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{_short(file)}: cannot be read ({_first_line(error)})")
        return None
    if isinstance(found, dict):
        return found
    problems.append(f"{_short(file)}: holds {type(found).__name__}, not an object")
    return None


def _lines(file: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Lines of JSON; an unfinished last line is being written, others that cannot be read are a problem."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        problems.append(f"{_short(file)}: cannot be read ({_first_line(error)})")
        return []
    *lines, _ = text.split("\n")
    found = list(_objects(lines))
    if len(found) < len(lines):
        problems.append(f"{_short(file)}: {len(lines) - len(found)} of {len(lines)} lines cannot be read")
    return found


def _objects(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue  # counted by the caller
        if isinstance(found, dict):
            yield found


def _short(file: Path) -> str:
    """The file within its run."""
    _, stages, tail = file.as_posix().rpartition("/stages/")
    return f"stages/{tail}" if stages else file.name


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
