"""How a stage asks a reward: what raises scores zero and is counted, what is no number stops the stage."""

import asyncio
import inspect
import math
import numbers
import threading
import traceback
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from cpt.errors import CptError, TrainingError
from cpt.rewards.text import Completion, text_of

LARGEST = 3.4028234663852886e38  # TRL adds rewards up in float32
EXPECTED = "a reward gives a list of one number for every completion, None where it does not apply"


class Scored:
    """A reward function as TRL calls it, `Scored(resolve(reward), label(reward), stage.name)`.

    A reward must be a function of its row: when it raises on a batch it is asked again row by row, and a row that
    raises again scores 0.0. What it logs through TRL's `log_extra` and `log_metric` is passed on only from calls
    that came back. Async functions are awaited, on one event loop of their own.

    calls: batches asked. rows: completions asked. raised: completions on which it raised, and so scored 0.0.
    first_error: the first error in one line, also where only the batch raised and none of its rows.
    """

    def __init__(self, function: Callable[..., Any], name: str, stage: str) -> None:
        self.__name__ = name  # what TRL's metrics call it
        self.stage = stage
        self._function = function
        self.restore({"calls": 0, "rows": 0, "raised": 0, "first_error": None})

    def state(self) -> dict[str, Any]:
        """The counts, as JSON: what must survive a kill."""
        return {"calls": self.calls, "rows": self.rows, "raised": self.raised, "first_error": self.first_error}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.calls: int = state["calls"]
        self.rows: int = state["rows"]
        self.raised: int = state["raised"]
        self.first_error: str | None = state["first_error"]

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        completion_ids: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """One number a completion, None where the reward does not apply; (B,) for B completions.

        Raises TrainingError when the function gives anything but a list of B finite numbers and Nones. Costs one
        call, and B more when it raises.
        """
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        self.calls += 1
        self.rows += len(completions)
        logged = Logged()
        try:
            rewards = self._ask(given, logged)
        except CptError:
            raise
        except (Exception, SystemExit) as error:
            self._note(error, f"on a batch of {len(completions)}")
            logged = Logged()
            rewards = self._row_by_row(given, logged)
        logged.pass_on(columns)
        return rewards

    def _row_by_row(self, given: dict[str, Any], logged: "Logged") -> list[float | None]:
        rows = len(given["completions"])
        rewards: list[float | None] = []
        for i in range(rows):
            row = {key: value[i : i + 1] if isinstance(value, list | tuple) else value for key, value in given.items()}
            one = Logged()
            try:
                rewards += self._ask(row, one)
            except CptError:
                raise
            except (Exception, SystemExit) as error:
                if not self.raised:
                    self.first_error = None  # the row says more than its batch
                self._note(error, f"on {_cut(repr(text_of(given['completions'][i])[:80]))}")
                self.raised += 1
                rewards.append(0.0)
            else:
                logged.take_row(one, i, rows)
        return rewards

    def _ask(self, given: dict[str, Any], logged: "Logged") -> list[float | None]:
        result = self._function(**(given | logged.callbacks(given)))
        if inspect.isawaitable(result):
            result = _wait(result)
        if isinstance(result, str | bytes | Mapping | set | frozenset) or not _iterable(result):
            raise self._wrong(f"gave {_cut(repr(result))} ({type(result).__name__})")
        values, rows = list(result), len(given["completions"])
        if len(values) != rows:
            raise self._wrong(f"gave {len(values)} scores for {rows} completions")
        return [self._number(value, f"completion {i + 1} of {rows}") for i, value in enumerate(values)]

    def _number(self, value: Any, place: str) -> float | None:
        if value is None:
            return None
        if getattr(value, "ndim", None) == 0:  # numpy's scalars, and tensors and arrays of no dimension
            value = value.item()
        if not isinstance(value, numbers.Real):  # a bool is one
            raise self._wrong(f"gave {_cut(repr(value))} ({type(value).__name__}) for {place}")
        try:
            number = float(value)
        except OverflowError:  # an int of more than 308 digits
            number = math.inf
        if not abs(number) <= LARGEST:  # nan is not, either
            raise self._wrong(f"gave {_cut(repr(value))} for {place}, which is not finite in float32")
        return number

    def _wrong(self, what: str) -> TrainingError:
        return TrainingError(f"stage {self.stage}, reward {self.__name__}: {what}; {EXPECTED}")

    def _note(self, error: BaseException, where: str) -> None:
        if self.first_error is None:
            frame = traceback.extract_tb(error.__traceback__, limit=-1)[0]
            place = f"{Path(frame.filename).name}:{frame.lineno}"
            self.first_error = f"{type(error).__name__}: {_cut(str(error), 300)} ({place}), {where}"


class Logged:
    """What a reward logs through TRL's callbacks, held back until its call came back."""

    def __init__(self) -> None:
        self.extra: dict[str, list[Any]] = defaultdict(list)
        self.metrics: list[tuple[str, float]] = []

    def callbacks(self, given: dict[str, Any]) -> dict[str, Any]:
        """In the place of TRL's callbacks, where there are any."""
        ours = {
            "log_extra": lambda column, values: self.extra[column].extend(values),
            "log_metric": lambda name, value: self.metrics.append((name, value)),
        }
        return {name: function for name, function in ours.items() if name in given}

    def take_row(self, one: "Logged", i: int, rows: int) -> None:
        """Add what row i logged; rows that logged nothing of a column, or raised, are None in it."""
        for column, values in one.extra.items():
            whole = self.extra.setdefault(column, [None] * rows)
            whole[i] = values[0] if values else None
        self.metrics += one.metrics

    def pass_on(self, columns: dict[str, Any]) -> None:
        """Give everything to TRL's callbacks."""
        for column, values in self.extra.items():
            columns["log_extra"](column, values)
        for name, value in self.metrics:
            columns["log_metric"](name, value)


def _iterable(value: Any) -> bool:
    try:
        iter(value)
    except TypeError:
        return False
    return True


def _cut(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """One loop for all calls, in a thread: a client that a function keeps open belongs to the loop it first met."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="async rewards", daemon=True).start()
    return loop


def _wait(awaitable: Awaitable[Any]) -> Any:
    async def result() -> Any:
        return await awaitable

    return asyncio.run_coroutine_threadsafe(result(), _loop()).result()
