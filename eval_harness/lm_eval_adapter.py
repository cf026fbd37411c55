"""Tasks of lm-evaluation-harness (Gao et al. 2021) on a model in memory, scored by our engine, results in our schema.

Its prompts, data and metrics are its own; requests are encoded as its Hugging Face model encodes them, so the numbers
are the same. Importing this imports neither lm_eval nor torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eval_harness import prompts, results
from eval_harness.results import Result
from eval_harness.suggest import did_you_mean

if TYPE_CHECKING:
    from eval_harness.scoring import Progress, ShouldStop
    from eval_harness.sharding import Shard

SEED = 1234  # of few-shot draws, of numpy and of torch: lm-eval's defaults
PYTHON_SEED = 0
BLOCKS = 100  # of the jackknife
NOT_COMPUTED = "not_computed_by_the_task"
OF_RATIOS = ("perplexity", "weighted_perplexity", "bits_per_byte")  # aggregations that say something of one item
ELSEWHERE = ("dataset_path", "dataset_name", "dataset_kwargs", "metadata", "num_fewshot", "tag", "task", "task_alias")


class LmEvalError(ValueError):
    """A task that cannot be run: every problem, one a line."""


@dataclass(frozen=True, slots=True)
class LmEvalSet:
    """A task, or a group of tasks, of lm-evaluation-harness.

    name                  of the set in the results; a group's tasks are "name/task", its aggregate is "name"
    task                  lm-eval's name of the task, group or tag
    num_fewshot           None is the task's own
    include_path          folder of task files (YAML) of your own; they win over shipped ones of the same name
    limit                 at most so many documents of each task, the first ones
    group                 "task" for a column of the stream's matrix, "general" for an ability to be kept
    apply_chat_template   prompts as conversations, shots as turns
    system                a system message
    """

    name: str
    task: str
    num_fewshot: int | None = None
    include_path: str | None = None
    limit: int | None = None
    group: Literal["task", "general"] = "general"
    apply_chat_template: bool = False
    system: str | None = None


def check(sets: Sequence[LmEvalSet]) -> None:
    """Find every task and load its data; needs no model, so that a bad plan fails before one is loaded.

    Raises:
        LmEvalError: all problems, one a line: a missing package, an unknown task, data that are not here, ...
    """
    if not sets:
        return
    problems = [f"set {name!r}: given {n} times" for name, n in Counter(one.name for one in sets).items() if n > 1]
    with _undisturbed():
        for one in sets:
            try:
                _load(one)
            except LmEvalError as error:
                problems.append(str(error))
    if problems:
        raise LmEvalError("\n".join(problems))


def run(
    model: Any,
    tokenizer: Any,
    sets: Sequence[LmEvalSet],
    *,
    batch_tokens: int | None = None,
    should_stop: ShouldStop | None = None,
    progress: Progress | None = None,
    shard: Shard | None = None,
) -> dict[str, dict[str, Result]]:
    """Run lm-eval's tasks on a model.

    Args:
        batch_tokens, should_stop, progress, shard: as in `eval_harness.scoring.score`; progress is told of one kind of
            request of one set at a time.

    Returns:
        set name -> metric -> Result. A metric of a filter other than "none" is "metric,filter", as in lm-eval. Items
        are known by the hash of their document. The standard error is that of the mean over items, and the
        jackknife's for what is no mean. The global random states are as before.

    Raises:
        LmEvalError: as `check`; generation settings that we do not honour; a tokenizer that does not fit.
        ScoringError: NaN logits, a continuation without a token, a context too small for the answer.
        Interrupted: should_stop said so.
    """
    found: dict[str, dict[str, Result]] = {}
    with _undisturbed():
        from eval_harness.lm_eval_model import EngineLM

        loaded = [_load(one) for one in sets]
        for one, tasks in zip(sets, loaded, strict=True):
            if one.apply_chat_template and not tokenizer.chat_template:
                raise LmEvalError(f"set {one.name!r}: apply_chat_template: the tokenizer has no chat template")
            lm = EngineLM(
                model, tokenizer, batch_tokens=batch_tokens, should_stop=should_stop, progress=progress, shard=shard
            )
            found |= _Run(one, tasks, lm).results()
    return found


class _Run:
    """One set's tasks, run, and what lm-eval says of them as our results."""

    def __init__(self, one: LmEvalSet, loaded: Mapping[str, Any], lm: Any):
        from lm_eval.evaluator import evaluate

        self.one, self.lm = one, lm
        self.tasks, self.groups = loaded["tasks"], loaded.get("groups", {})
        self.settings = {name: _settings(task) for name, task in self.tasks.items()}  # before evaluate fills them in
        self.found = evaluate(
            lm,
            loaded,
            limit=one.limit,
            bootstrap_iters=0,  # standard errors are ours
            system_instruction=one.system,
            apply_chat_template=one.apply_chat_template,
            fewshot_as_multiturn=one.apply_chat_template,
        )

    def results(self) -> dict[str, dict[str, Result]]:
        """The groups' aggregates first."""
        of_tasks = {name: self._task(name) for name in self.tasks}
        of_groups = {name: self._group(name, of_tasks) for name in self.groups if name in self.found.get("groups", {})}
        every = {name: by for name, by in {**of_groups, **of_tasks}.items() if by}
        return {self.one.name if name == self.one.task else f"{self.one.name}/{name}": by for name, by in every.items()}

    def _task(self, name: str) -> dict[str, Result]:
        samples = self.found["samples"][name]
        keys = dict.fromkeys((metric, sample["filter"]) for sample in samples for metric in sample["metrics"])
        return {_key(metric, chosen): self._metric(name, metric, chosen) for metric, chosen in keys}

    def _metric(self, name: str, metric: str, chosen: str) -> Result:
        from lm_eval.api.metrics import mean

        of_filter = [sample for sample in self.found["samples"][name] if sample["filter"] == chosen]
        items = [(sample["doc_hash"][:16], sample[metric]) for sample in of_filter if metric in sample]
        better = self.tasks[name].higher_is_better().get(metric)
        notes = [*self._notes(name, len(of_filter)), *([] if better is not None else ["the task names no direction"])]
        result = _aggregated(items, self.tasks[name].aggregation().get(metric, mean))
        return replace(
            result,
            definition=self._definition(name, metric, chosen),
            higher_is_better=better is not False,
            excluded={NOT_COMPUTED: len(of_filter) - len(items)} if len(items) < len(of_filter) else {},
            note="; ".join([*filter(None, [result.note]), *notes]) or None,
        )

    def _definition(self, name: str, metric: str, chosen: str) -> str:
        shots = self.tasks[name].get_config("num_fewshot")
        said = [f"task={name}", f"filter={chosen}", f"{shots}-shot" + (f":seed{SEED}" if shots else "")]
        said += [prompts.definition(self.lm.tokenizer, "auto" if self.one.apply_chat_template else "none")]
        said += [] if self.one.system is None else [f"system:{_hash(self.one.system)}"]
        said += [f"settings={self.settings[name]}", f"lm_eval={self._version()}"]
        return f"lm_eval:{metric}@{self.tasks[name].VERSION}({','.join(said)})"

    def _notes(self, name: str, documents: int) -> Iterator[str]:
        cut = len(self.lm.truncated.get(name, ()))
        if cut:
            yield f"the context of {cut} of {documents} items was cut on the left to fit {self.lm.max_length} tokens"
        if self.lm.left_out_system:
            yield "the chat template refuses a system message; it was left out"

    def _group(self, name: str, of_tasks: Mapping[str, Mapping[str, Result]]) -> dict[str, Result]:
        group = self.groups[name]
        leaves = [task.task_name for task in group.get_all_tasks()]
        out = {}
        for rule in group.aggregate_metric_list:
            for key, value in self.found["groups"][name].items():
                metric, _, chosen = key.partition(",")
                if metric != rule.metric:
                    continue
                parts = {
                    leaf: of_tasks[leaf][_key(metric, chosen)]
                    for leaf in leaves
                    if _key(metric, chosen) in of_tasks[leaf]
                }
                out[_key(metric, chosen)] = self._aggregate(name, rule, chosen, value, parts)
        return out

    def _aggregate(self, name: str, rule: Any, chosen: str, value: Any, parts: Mapping[str, Result]) -> Result:
        """lm-eval's mean over tasks; its standard error from the tasks' own, which are independent.

        Items are kept where their mean is the value: weighted by size.
        """
        weights = [part.n if rule.weight_by_size else 1 for part in parts.values()]
        errors = [part.stderr for part in parts.values() if part.stderr is not None]
        stderr = None
        if len(errors) == len(parts):
            stderr = math.hypot(*(w * e for w, e in zip(weights, errors, strict=True))) / sum(weights)
        n = sum(part.n for part in parts.values())
        pooled = {f"{leaf}/{item}": one for leaf, part in parts.items() for item, one in part.per_item.items()}
        cut = sum(len(self.lm.truncated.get(leaf, ())) for leaf in parts)
        how = "weighted_by_size" if rule.weight_by_size else "unweighted"
        children = _hash("\n".join(part.definition for part in parts.values()))
        said = f"group={name},filter={chosen},mean of {len(parts)} tasks,{how},tasks={children}"
        return Result(
            value=float(value),
            n=n,
            stderr=stderr,
            definition=f"lm_eval:{rule.metric}@{self.groups[name].version}({said},lm_eval={self._version()})",
            higher_is_better=all(part.higher_is_better for part in parts.values()),
            per_item=pooled if rule.weight_by_size and len(pooled) == n else {},
            excluded=dict(sum((Counter(part.excluded) for part in parts.values()), Counter())),
            note=f"the context of {cut} of {n} items was cut on the left" if cut else None,
        )

    @staticmethod
    def _version() -> str:
        import lm_eval

        return lm_eval.__version__


def _aggregated(items: Sequence[tuple[str, Any]], aggregate: Callable[[list[Any]], Any]) -> Result:
    """lm-eval's value over items, without what its caller fills in."""
    from lm_eval.api.metrics import mean

    if aggregate is mean:
        return results.from_items(items, definition="", higher_is_better=True)
    values = [value for _, value in items]
    found, called = _number(aggregate(values)), getattr(aggregate, "__name__", "aggregation")
    per_item = {}
    if called in OF_RATIOS:
        per_item = results.unique_ids((name, aggregate([value])) for name, value in items)
    note = f"{called} over all items, no mean; standard error by jackknife"
    if found is None:
        note = f"lm-eval's {called} gave no number"
    return Result(found, len(items), jackknife(aggregate, values), "", True, per_item, note=note)


def jackknife(aggregate: Callable[[list[Any]], Any], items: Sequence[Any]) -> float | None:
    """Standard error of any statistic of the items: delete-a-group jackknife (Tukey 1958), at most 100 groups.

        sqrt( (g - 1) / g  sum over groups of (statistic without the group - mean of these)^2 )

    With a group an item, that of a mean is sample standard deviation / sqrt(n). None for fewer than two items, and
    where the statistic of a part is not a finite number.
    """
    groups = min(len(items), BLOCKS)
    if groups < 2:
        return None
    edges = [len(items) * at // groups for at in range(groups + 1)]
    parts = [_number(aggregate([*items[:low], *items[high:]])) for low, high in pairwise(edges)]
    values = [value for value in parts if value is not None and math.isfinite(value)]
    if len(values) < groups:
        return None
    mean = math.fsum(values) / groups
    return math.sqrt((groups - 1) / groups * math.fsum((value - mean) ** 2 for value in values))


def _load(one: LmEvalSet) -> Mapping[str, Any]:
    """lm-eval's task objects with their data, shots set and seeded.

    Raises:
        LmEvalError: every problem of this set, one a line.
    """
    problems = list(_problems(one))
    if problems:
        raise LmEvalError("\n".join(problems))
    manager = _manager(one)
    try:
        loaded = manager.load(one.task)
    except Exception as error:  # whatever a task file, its code or its data raise
        said = " ".join(str(error).split())[:300]
        raise LmEvalError(
            f"set {one.name!r}: task {one.task!r} cannot be loaded: {type(error).__name__}: {said}. Without network "
            "its data must be in the cache of datasets, or in local files that a task file in include_path names"
        ) from error
    for name, task in loaded["tasks"].items():
        own = task.get_config("num_fewshot")
        if own == 0 and one.num_fewshot:
            raise LmEvalError(
                f"set {one.name!r}: num_fewshot = {one.num_fewshot}: task {name!r} is fixed at 0 shots; leave it out"
            )
        task.set_config("num_fewshot", (own or 0) if one.num_fewshot is None else one.num_fewshot)
        task.set_fewshot_seed(SEED)
    return loaded


def _problems(one: LmEvalSet) -> Iterator[str]:
    if one.num_fewshot is not None and one.num_fewshot < 0:
        yield f"set {one.name!r}: num_fewshot = {one.num_fewshot!r}: must be 0 or more"
    if one.limit is not None and one.limit < 1:
        yield f"set {one.name!r}: limit = {one.limit!r}: must be a whole number of at least 1"
    if one.include_path is not None and not Path(one.include_path).is_dir():
        yield f"set {one.name!r}: include_path = {one.include_path!r}: no such folder"


def _manager(one: LmEvalSet) -> Any:
    """The tasks that the set's is found among: local files alone where they suffice, for the shipped index is slow."""
    from lm_eval.tasks import TaskManager

    local = TaskManager(include_path=one.include_path, include_defaults=False) if one.include_path else None
    if local is not None and _complete(local.task_index, one.task):
        return local
    names = [*(local.all_tasks if local else ()), *_shipped().all_tasks]
    if one.task not in names:
        hint = did_you_mean(one.task, names, most=3)
        where = f" or in {one.include_path} (a file that is not readable YAML is skipped)" if one.include_path else ""
        raise LmEvalError(f"set {one.name!r}: task {one.task!r}: not among lm-eval's tasks{where}. {hint}".rstrip())
    if local is None or one.task not in local.task_index:
        return _shipped()
    return TaskManager(include_path=one.include_path)


def _complete(index: Mapping[str, Any], name: str) -> bool:
    """Whether a name and all that it stands for are in the index."""
    entry = index.get(name)
    if entry is None:
        return False
    members = (entry.cfg or {}).get("task")
    return not isinstance(members, list) or all(_complete(index, one) for one in members if isinstance(one, str))


@cache
def _shipped() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """lm-eval's random seeds inside, the caller's states after it; no log lines, no progress bars.

    Raises:
        LmEvalError: the package is not installed.
    """
    if find_spec("lm_eval") is None:
        raise LmEvalError("tasks of lm-evaluation-harness need its package: pip install 'cpt[lm-eval]'")
    variables = set(os.environ)  # lm_eval, and what it imports, set some for the whole process
    import datasets
    import numpy
    import torch
    from lm_eval.api import task

    of_python, of_numpy = random.getstate(), numpy.random.get_state()
    logger, bar, bars = logging.getLogger("lm_eval"), task.tqdm, not datasets.are_progress_bars_disabled()
    level = logger.level
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            random.seed(PYTHON_SEED)
            numpy.random.seed(SEED)
            torch.manual_seed(SEED)
            logger.setLevel(logging.ERROR)
            task.tqdm = partial(bar, disable=True)
            datasets.disable_progress_bars()
            yield
    finally:
        random.setstate(of_python)
        numpy.random.set_state(of_numpy)
        logger.setLevel(level)
        task.tqdm = bar
        if bars:
            datasets.enable_progress_bars()
        for name in set(os.environ) - variables:
            del os.environ[name]


def _settings(task: Any) -> str:
    """6 hex digits of the task's own settings but its data and its number of shots: a local file has no version."""
    config = {key: value for key, value in task.dump_config().items() if key not in ELSEWHERE}
    text = json.dumps(config, sort_keys=True, default=lambda value: getattr(value, "__name__", str(value)))
    return _hash(re.sub(r" at 0x[0-9a-f]+", "", text))


def _key(metric: str, chosen: str) -> str:
    return metric if chosen == "none" else f"{metric},{chosen}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
