"""Replay: train on earlier or general rows beside the task's own, in a fixed share of every batch.

General-sample replay as in GeRe's label fitting (arXiv 2508.04676), task replay as in continual learning
at large. Cost: the replayed rows; at a fixed number of epochs a ratio r makes the stage 1 / (1 - r) longer.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from cpt.data.spec import Name, Sources, refuse
from cpt.methods.base import Method, StageInfo, whole_share
from cpt.suggest import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

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
    general: Sources | None = Field(None, description="ordinary rows that stand for what the base can do")
    earlier: Literal["all"] | list[Name] | None = Field(None, description="stages whose rows to replay")
    rows_per_stage: int | None = Field(None, gt=0, description="at most this many rows of each earlier stage")
    weight: float = Field(1.0, gt=0, description="factor on the token losses of replayed rows")
    name: Name = Field("replay", description="what logs call these rows; two replays need two names")

    kinds: ClassVar[frozenset[str]] = frozenset({"sft", "pretrain", "rft"})
    absent: ClassVar[dict[str, Any]] = {"ratio": 0.0}

    _facts: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _something_to_replay(self) -> "Replay":
        if self.active and not self.general and not self.earlier:
            refuse((("general",), None, "nothing to replay: give `general` rows, `earlier: all`, or both"))
        return self

    def _rows(self, batch_rows: int) -> int:
        return round(self.ratio * batch_rows)

    def quotas(self, batch_rows: int) -> dict[str, int]:
        """The replayed rows, under this method's name."""
        return {self.name: self._rows(batch_rows)} if self.active else {}

    def check(self, batch_rows: int, earlier: Sequence[str]) -> list[tuple[str, str]]:
        """The share must be whole and leave room for the task; the stages to replay must come before."""
        if not self.active:
            return []
        wanted = self.earlier if isinstance(self.earlier, list) else []
        known = ", ".join(earlier) or "none"
        return [("ratio", text) for text in whole_share(self.ratio, batch_rows)] + [
            ("earlier", f"{name!r} is no earlier stage.{did_you_mean(name, earlier)} Earlier stages: {known}.")
            for name in wanted
            if name not in earlier
        ]

    def prepare_data(self, data: "StageData", stage: StageInfo) -> None:
        """Add the replay rows under this method's name."""
        from cpt.data.tokens import joined

        place = f"stages.{stage.name}.methods.{self.name}"
        parts = [data.load(self.general, f"{place}.general", None)] if self.general else []
        known = dict(stage.earlier)
        for name in known if self.earlier == "all" else self.earlier or []:
            parts.append(data.load(known[name], f"{place}.earlier.{name}", self.rows_per_stage))
        if not parts:
            self._facts["note"] = "no earlier stage to replay"
            return
        rows = joined(parts)
        data.add(self.name, rows, self._rows(stage.batch_rows))
        self._facts |= {"rows": len(rows.dataset), "rows_per_batch": self._rows(stage.batch_rows)}

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
