"""What an unlearning stage teaches in the place of an answer: a line of refusals, drawn by counter for every row."""

from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from cpt.data.spec import Strict, refuse

REFUSALS = Path(__file__).parents[1] / "assets" / "refusals"


class Template(Strict):
    """The answers that stand in the place of forgotten ones, and how often a row gets another one."""

    lines: Literal["unknown", "polite", "copyright"] | list[str] = Field(
        "unknown", description="which refusals: TOFU's hundred of not knowing, of politeness, of copyright; or your own"
    )
    redraw: Literal["epoch", "never"] = Field("epoch", description="a line for every row anew at every pass, or once")

    @model_validator(mode="after")
    def _something_to_say(self) -> "Template":
        if not isinstance(self.lines, str) and (not self.lines or not all(line.strip() for line in self.lines)):
            refuse((("lines",), self.lines, "every template needs words"))
        return self

    @property
    def texts(self) -> list[str]:
        """The lines themselves."""
        return shipped(self.lines) if isinstance(self.lines, str) else self.lines

    def drawn(self, seed: int, turn: int, rows: int) -> list[str]:
        """A line for each of so many rows, at one pass over them: a function of (seed, turn, row) alone."""
        from cpt.data.sampler import generator

        turn = turn if self.redraw == "epoch" else 0
        picks = generator(seed, "template", turn).integers(len(self.texts), size=rows)
        return [self.texts[pick] for pick in picks]


@cache
def shipped(name: str) -> list[str]:
    """The lines of a file that travels with the package."""
    return (REFUSALS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
