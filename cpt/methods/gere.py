"""GeRe: replay a small fixed set of general texts, and keep the base's activations on them where they were.

Paper: General Samples Replay, arXiv 2508.04676. Cost: the replayed rows; with `keep: margin` two forward passes over
the general rows once per base, two bits per token and hidden dimension on disk, and no extra pass in a step.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr

from cpt.data.spec import Name, Sources
from cpt.methods.base import Method, StageInfo, Term, whole_share

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from cpt.data.activations import Recording
    from cpt.data.stage_data import StageData
    from cpt.methods.step import Step


class GeRe(Method):
    """Replay general rows in an exact share of every batch; optionally keep the base's activations on them.

    The token losses of the task's and of the general rows count one half each, whatever their share. `keep: margin`
    adds the threshold margin: of each hidden dimension the base's regions low, middle and high are recorded once, and
    an activation outside of its region is pulled back. Of the base at every stage, not of the stage before.
    """

    type: Literal["gere"] = "gere"
    general: Sources = Field(description="ordinary rows that stand for what the base can do; about 1,000 in the paper")
    ratio: float = Field(0.25, ge=0, lt=1, description="share of every effective batch; 0 switches it off")
    keep: Literal["labels", "margin"] = Field("margin", description="what is kept of the general rows")
    weight: float | Literal["dynamic"] = Field(
        100.0, description="of the margin; dynamic: as large as the token loss was in the step before"
    )
    at_most: float = Field(100.0, gt=0, description="the largest dynamic weight")
    name: Name = Field("gere", description="what logs call these rows")

    kinds: ClassVar[frozenset[str]] = frozenset({"sft", "pretrain", "rft"})
    absent: ClassVar[dict[str, Any]] = {"ratio": 0.0}

    _rows: Any = PrivateAttr(None)
    _recording: "Recording | None" = PrivateAttr(None)
    _facts: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def needs(self) -> frozenset[str]:
        """Hidden states and what the base computed, for the margin."""
        return frozenset({"hidden", "base"}) if self.keep == "margin" else frozenset()

    def quotas(self, batch_rows: int) -> dict[str, int]:
        """The general rows, under this method's name."""
        return {self.name: round(self.ratio * batch_rows)} if self.active else {}

    def check(self, batch_rows: int, earlier: "Sequence[str]") -> list[tuple[str, str]]:
        """The share must be a whole number of rows and leave room for the task's."""
        return [("ratio", text) for text in whole_share(self.ratio, batch_rows)] if self.active else []

    def prepare_data(self, data: "StageData", stage: StageInfo) -> None:
        """Add the general rows."""
        rows = data.load(self.general, f"stages.{stage.name}.methods.{self.name}.general", None)
        data.add(self.name, rows, round(self.ratio * stage.batch_rows))
        self._rows = rows.dataset
        self._facts |= {"rows": len(rows.dataset), "rows_per_batch": round(self.ratio * stage.batch_rows)}

    def prepare_model(self, model: "nn.Module", stage: StageInfo) -> "nn.Module":
        """Record the base's regions, once for all stages."""
        if self.keep == "margin":
            assert stage.record is not None
            self._recording = stage.record(model, self._rows, self.name)
        return model

    def weigh_tokens(self, step: "Step") -> "Tensor | None":
        """(B, T-1): task and general rows one half each of the mean token loss."""
        mine = step.window.get(f"{self.name}_tokens", 0.0)
        others = step.window["tokens"] - mine
        if not (mine and others):  # in rft the task's rows are no part of the token loss
            return None
        factors = step.log_probs.new_full(step.mask.shape, step.window["tokens"] / (2 * others))
        factors[step.rows(self.name)] = step.window["tokens"] / (2 * mine)
        return factors

    def loss_terms(self, step: "Step") -> dict[str, Term]:
        """The margin: mean over tokens of general rows and hidden dimensions."""
        if self._recording is None:
            return {}
        from cpt.losses.threshold_margin import margins

        over = f"{self.name}_tokens"
        mine = step.rows(self.name) & step.mask.any(1)  # not the copies without labels that fill up a batch
        hidden = step.hidden[mine][:, :-1][step.mask[mine]]  # (N, H) of the positions that predict a learned token
        codes = self._recording.regions(step.row[mine].tolist(), hidden.device)
        outside = margins(hidden, codes, *self._recording.thresholds(hidden.device))
        factors = self.weigh_tokens(step)
        losses = -step.log_probs.detach() if factors is None else -step.log_probs.detach() * factors
        step.note("token_loss", Term(losses.sum(), "tokens"))
        step.note("distance", Term(outside.detach().sum(), over, 1 / hidden.shape[1]))
        step.note("outside", Term((outside > 0).sum().float(), over, 1 / hidden.shape[1]))
        return {"margin": Term(outside.sum(), over, self._weight(step) / hidden.shape[1])}

    def _weight(self, step: "Step") -> float:
        if self.weight != "dynamic":
            return self.weight
        before = step.previous
        if f"{self.type}/distance" not in before:
            return 1.0
        return min(before[f"{self.type}/token_loss"] / (before[f"{self.type}/distance"] + 1e-8), self.at_most)

    def facts(self) -> dict[str, Any]:
        """Rows held and rows per batch."""
        return dict(self._facts)
