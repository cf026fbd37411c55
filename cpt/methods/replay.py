"""Replay: train on earlier or general rows beside the task's own, in a fixed share of every batch.

General-sample replay as in GeRe's label fitting (arXiv 2508.04676), task replay as in continual learning
at large. Cost: the replayed rows; at a fixed number of epochs a ratio r makes the stage 1 / (1 - r) longer.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from cpt.data.spec import Name, Sources, refuse
from cpt.methods.base import Method, StageInfo, replay_problems, unknown_stages

if TYPE_CHECKING:
    from torch import Tensor

    from cpt.data.sources import Loaded
    from cpt.data.stage_data import StageData
    from cpt.methods.step import Step


class Replay(Method):
    """Mix general rows, or rows of earlier stages, or both, into every effective batch.

    The share is exact: ratio x effective batch must be a whole number of rows and every batch holds that many,
    through epoch ends and resume; with packing it counts packed rows. General rows protect what the base
    could do; rows of earlier stages protect those stages; neither protects the other. In an rft stage, whose
    batch is completions, the rows come on top: their mean token loss, times `weight`, is added to the policy's.
    """

    type: Literal["replay"] = "replay"
    ratio: float = Field(0.25, ge=0, lt=1, description="share of every effective batch; 0 switches it off")
    by: Literal["rows", "tokens"] = Field(
        "rows", description="what ratio is a share of: rows, exactly; tokens, on average over batches"
    )
    general: Sources | None = Field(None, description="ordinary rows that stand for what the base can do")
    earlier: Literal["all"] | list[Name] | None = Field(None, description="stages whose rows to replay")
    select: Literal["random", "highest_loss", "lowest_loss", "reservoir", "balanced"] = Field(
        "random", description="which rows of earlier stages are kept; losses are of the weights the stage starts from"
    )
    rows_per_stage: float | None = Field(
        None, gt=0, description="at most this many rows of each earlier stage, or below 1 this share of them"
    )
    rows_in_all: int | None = Field(None, gt=0, description="budget of reservoir and balanced over all earlier stages")
    weight: float = Field(1.0, gt=0, description="factor on the token losses of replayed rows")
    name: Name = Field("replay", description="what logs call these rows; two replays need two names")

    kinds: ClassVar[frozenset[str]] = frozenset({"sft", "pretrain", "rft", "sdft", "unlearn"})
    absent: ClassVar[dict[str, Any]] = {"ratio": 0.0}

    _facts: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _something_to_replay(self) -> "Replay":
        if self.active and not self.general and not self.earlier:
            refuse((("general",), None, "nothing to replay: give `general` rows, `earlier: all`, or both"))
        refuse(*self._budget_problems())
        return self

    def _budget_problems(self) -> list[tuple[tuple[str], Any, str]]:
        over_all = self.select in ("reservoir", "balanced")
        if over_all and self.rows_in_all is None:
            return [(("rows_in_all",), None, f"select: {self.select} shares out a budget over stages: give it")]
        if over_all and self.rows_per_stage is not None:
            return [
                (("rows_per_stage",), self.rows_per_stage, f"select: {self.select} goes by rows_in_all: leave it out")
            ]
        if not over_all and self.rows_in_all is not None:
            return [(("rows_in_all",), self.rows_in_all, "is shared out by select: reservoir or balanced")]
        if self.select != "random" and not self.earlier:
            return [(("select",), self.select, "chooses among rows of earlier stages: give `earlier: all`")]
        whole = self.rows_per_stage is None or self.rows_per_stage < 1 or self.rows_per_stage.is_integer()
        return (
            [] if whole else [(("rows_per_stage",), self.rows_per_stage, "must be a whole number, or a share below 1")]
        )

    def _rows(self, batch_rows: int) -> int:
        return round(self.ratio * batch_rows)

    def quotas(self, batch_rows: int) -> dict[str, int]:
        """The replayed rows, under this method's name."""
        return {self.name: self._rows(batch_rows) if self.by == "rows" else 0} if self.active else {}

    def check(self, batch_rows: int, earlier: Sequence[str]) -> list[tuple[str, str]]:
        """The share must be whole and leave room for the task; the stages to replay must come before."""
        if not self.active:
            return []
        if self.by == "tokens":
            return unknown_stages(self.earlier, earlier)
        budgets = (None, None) if self.general else (self.rows_per_stage, self.rows_in_all)
        return replay_problems(self.ratio, batch_rows, self.earlier, earlier, *budgets)

    def prepare_data(self, data: "StageData", stage: StageInfo) -> None:
        """Add the replay rows under this method's name."""
        from cpt.data.tokens import joined

        place = f"stages.{stage.name}.methods.{self.name}"
        parts = [data.load(self.general, f"{place}.general", None)] if self.general else []
        for kept in self._earlier(stage):
            parts.append(data.load(kept, f"{place}.earlier.{kept.label}", None))
        if not parts:
            self._facts["note"] = "no earlier stage to replay"
            return
        rows = joined(parts)
        self._facts["rows"] = len(rows.dataset)
        if self.by == "tokens":
            data.add(self.name, rows, None, share_of_tokens=self.ratio)
            self._facts["share_of_tokens"] = self.ratio
        else:
            data.add(self.name, rows, self._rows(stage.batch_rows))
            self._facts["rows_per_batch"] = self._rows(stage.batch_rows)

    def _earlier(self, stage: StageInfo) -> "list[Loaded]":
        """The rows of earlier stages within the budget, kept in the run's memory."""
        from cpt.data.memory import Memory, chosen

        parts = list(stage.rows_of(self.earlier).values())
        if self.rows_in_all is not None:
            kept = chosen(parts, self.select, self.rows_in_all, stage.stream_seed)
        else:
            kept = chosen(parts, self.select, self.rows_per_stage, stage.seed, stage.losses)
        if stage.memory is None:
            return kept
        memory, about = Memory(stage.memory), {"select": self.select}
        return [memory.keep_rows(f"{self.name}-{stage.name}", part, about) for part in kept]

    def weigh_tokens(self, step: "Step") -> "Tensor | None":
        """`weight` on replayed rows, 1 elsewhere."""
        if self.weight == 1.0 or self.name not in step.names:
            return None
        factors = step.mask.new_ones(step.mask.shape, dtype=step.log_probs.dtype)
        factors[step.rows(self.name)] = self.weight
        return factors

    def facts(self) -> dict[str, Any]:
        """Rows held and rows per batch."""
        return dict(self._facts)
