"""The infinite learning-rate schedule: a stage ends annealed, and the next goes on from where it was before that.

Source: arXiv 2503.02844 (cosine, inverse square root or linear cooldown to a constant; exponential anneal); the
alternative, re-warm and re-decay, arXiv 2403.08763, is an ordinary `lr_scheduler_type` in each stage.
"""

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from cpt.data.spec import Strict, refuse

if TYPE_CHECKING:
    from collections.abc import Callable

STATE = "pre_anneal"  # folder of a stage: weights and optimizer as they were before the anneal
STEEP = 10.0  # a of the inverse square root cooldown


class Schedule(Strict):
    """Warm-up, cooldown to a constant rate, constant, anneal. Shares are of the stage's steps, and of learning_rate."""

    type: Literal["infinite"]
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps from 0 up to learning_rate")
    cooldown: float = Field(0.1, ge=0, lt=1, description="share of the steps from there down to the constant rate")
    anneal: float = Field(0.2, gt=0, lt=1, description="share of the steps at the end, from the constant rate down")
    constant: float = Field(0.5, gt=0, le=1, description="the constant rate, as a share of learning_rate")
    least: float = Field(0.1, gt=0, le=1, description="the rate that the anneal ends at, as a share of learning_rate")
    shape: Literal["cosine", "inverse_sqrt", "linear"] = Field("cosine", description="of the cooldown")
    go_on: bool = Field(
        True, description="start at the constant rate from what the stage before was before its anneal, if it has one"
    )

    @model_validator(mode="after")
    def _fits(self) -> "Schedule":
        if self.warmup + self.cooldown + self.anneal > 1:
            whole = f"warmup, cooldown and anneal are {self.warmup + self.cooldown + self.anneal:g} of the steps"
            refuse((("anneal",), self.anneal, f"leaves too little: {whole}, at most 1"))
        if self.least > self.constant:
            refuse((("least",), self.least, f"must be at most constant ({self.constant:g}): an anneal goes down"))
        return self

    def anneal_step(self, steps: int) -> int:
        """Optimizer steps, of so many, that a stage takes before its anneal: one at least, where there are two."""
        return steps - max(1, min(round(self.anneal * steps), steps - 1))

    def factor(self, steps: int, goes_on: bool) -> "Callable[[int], float]":
        """Step (from 0, of `steps`) -> its rate as a share of learning_rate; continuous where one phase meets the next.

        goes_on: the stage starts in the constant phase.
        """
        end = self.anneal_step(steps)
        warm = 0 if goes_on else min(end, round(self.warmup * steps))
        cool = 0 if goes_on else min(end, warm + round(self.cooldown * steps))

        def at(step: int) -> float:
            if step < warm:
                return step / warm
            if step < cool:
                return self.constant + (1 - self.constant) * self._left((step - warm) / (cool - warm))
            if step <= end:
                return self.constant
            return float(self.constant * (self.least / self.constant) ** ((step - end) / (steps - end)))

        return at

    def _left(self, x: float) -> float:
        """What is left of the way down, 1 at x = 0 and 0 at x = 1."""
        if self.shape == "cosine":
            return (1 + math.cos(math.pi * x)) / 2
        if self.shape == "linear":
            return 1 - x
        return 1 - ((1 + STEEP * x) ** -0.5 - 1) / ((1 + STEEP) ** -0.5 - 1)


def _as_schedule(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


StageSchedule = Annotated[Schedule, BeforeValidator(_as_schedule, json_schema_input_type=str | Schedule)]


def goes_on(before: Schedule | None, here: Schedule | None) -> bool:
    """Whether a stage starts from what the stage before was before its anneal."""
    return before is not None and here is not None and here.go_on
