"""How far a stage in training is, with its loss, the methods' terms by name, tokens a second and the time left."""

import time
from collections.abc import Callable, Collection
from typing import Any

Say = Callable[[str], None]

PARTS = 5  # of a stage: where nothing can move, a line is said in each of them
EVERY = 60.0  # seconds: and a line at least that often, as far as the trainer logs


class StageProgress:
    """Told of each optimizer step and of each line the trainer logs.

    say: has `moving` where a line can move (`cpt.terminal.Terminal`); elsewhere it gets a line now and then.
    methods: whose loss terms to show; the seam logs them as `method/term`.
    """

    def __init__(
        self, name: str, methods: Collection[str], say: Say, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name, self.methods, self.say, self.clock = name, methods, say, clock
        self.steps = self.reached = self.first = 0
        self.began = self.said = clock()
        self.due = 0.0  # share of the stage at which a line is said next
        self.tokens: tuple[float, float] | None = None  # when, how many
        self.values = ""

    def at(self, step: int, steps: int) -> None:
        """After so many optimizer steps of all; called with those of the checkpoint before the first."""
        if not self.steps:
            self.steps, self.first, self.began = steps, step, self.clock()
        self.reached = step
        if moving := getattr(self.say, "moving", None):
            moving(self.name, step, self.steps, self.values, self._left())

    def log(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        if "loss" not in line:
            return
        self.reached = line["step"]
        self.values = "  ".join([*self._terms(line), *self._rate(line)])
        if hasattr(self.say, "moving") or not self.steps:
            return
        share = self.reached / self.steps
        if share >= self.due or self.clock() - self.said >= EVERY:
            self.due, self.said = (int(share * PARTS) + 1) / PARTS, self.clock()
            self.say(f"  {share:4.0%}  step {self.reached} of {self.steps}  {self.values}  {self._left()}".rstrip())

    def end(self) -> None:
        """Nothing moves any more."""
        if still := getattr(self.say, "still", None):
            still()

    def _terms(self, line: dict[str, Any]) -> list[str]:
        terms = [name for name in line if name.partition("/")[0] in self.methods]
        known = [name for name in ("loss", "reward", "kl", *terms) if line.get(name) is not None]
        return [f"{name} {line[name]:.4g}" for name in known]

    def _rate(self, line: dict[str, Any]) -> list[str]:
        """Tokens a second since the line before."""
        if "num_tokens" not in line:
            return []
        now, before = (self.clock(), float(line["num_tokens"])), self.tokens
        self.tokens = now
        if before is None or now[0] <= before[0]:
            return []
        return [f"{(now[1] - before[1]) / (now[0] - before[0]):,.0f} tokens/s"]

    def _left(self) -> str:
        """Time left, by the pace since this launch began; nothing after the last step or before the second."""
        done, to_do = self.reached - self.first, self.steps - self.reached
        if done < 2 or not to_do:
            return ""
        return f"{duration((self.clock() - self.began) / done * to_do)} left"


def counting(name: str, say: Say) -> Callable[[int, int], None] | None:
    """A function of (done, total) that moves a line, or None where none can."""
    moving = getattr(say, "moving", None)
    return (lambda done, total: moving(name, done, total, "")) if moving else None


def still(say: Say) -> None:
    """Take a moving line away, where there is one."""
    getattr(say, "still", lambda: None)()


def duration(seconds: float) -> str:
    """1:05, or 2:00:05, or 3 days 2:00:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02d}:{seconds:02d}" if hours or days else f"{minutes}:{seconds:02d}"
    return f"{days} day{'s' * (days > 1)} {clock}" if days else clock
