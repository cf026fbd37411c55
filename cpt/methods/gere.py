"""GeRe: replay a small fixed set of general texts, and keep what the base computes on them where it was.

Paper: General Samples Replay, arXiv 2508.04676. Cost: the replayed rows; beyond labels one or two forward passes over
the general rows once per base, and of the base on disk, for every learned token, two bits (`margin`), 16 or 32 bits
(`l1`, `l2`) per hidden dimension, or 8 bytes per likely token (`kl`). No extra pass in a step.
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from cpt.data.spec import Name, Source, Sources, refuse
from cpt.methods.base import Method, StageInfo, Term, unused, whole_share

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from cpt.data.stage_data import StageData
    from cpt.methods.step import Step

GENERAL = Source(hub="HuggingFaceTB/cosmopedia-100k", limit=1000)  # Apache-2.0
TEMPERATURE = 2.0  # of the divergence, on both sides
WEIGHTS = {"margin": 10.0, "kl": 1.0, "l1": 1.0, "l2": 1.0}  # from a scan on the tiny world: docs/log.md
RECORDED = {"margin": "regions", "l1": "features", "l2": "features", "kl": "top_k"}


class GeRe(Method):
    """Replay general rows; keep what the base computes on them, of the base at every stage.

    The token losses of the task's and of the general rows count one half each, whatever their share. Beside them the
    threshold margin (`keep: margin`) pulls back an activation that left its region: of each hidden dimension the
    regions low, middle and high are recorded once. `l1` and `l2` keep the activations themselves, `kl` the
    distribution over the likely tokens, `labels` nothing but the rows.
    """

    type: Literal["gere"] = "gere"
    general: Sources = Field(
        [GENERAL], description="ordinary rows for what the base can do; default: 1,000 texts of cosmopedia-100k"
    )
    ratio: Annotated[float, Field(ge=0, lt=1)] | Literal["shuffled"] = Field(
        0.25, description="share of every effective batch, 0 switches it off; shuffled: among the task's rows"
    )
    keep: Literal["labels", "margin", "kl", "l1", "l2"] = Field("margin", description="what is kept on general rows")
    weight: Annotated[float, Field(ge=0)] | Literal["dynamic"] | None = Field(
        None,
        description="of what is kept, by default 10 for the margin and 1 for the others; dynamic: as large as the "
        "token loss was in the step before",
    )
    at_most: float = Field(100.0, gt=0, description="the largest dynamic weight")
    mean: Literal["entries", "violators"] = Field(
        "entries", description="of the margin; violators, as published: of those outside, and batch by batch"
    )
    of: Literal["base", "start"] = Field("base", description="whose activations: start refreshes them at every stage")
    passes: Literal[1, 2] = Field(2, description="over general rows to record regions; 1 takes room on disk meanwhile")
    top_k: int = Field(64, gt=0, description="likely tokens that kl keeps of the base; the others are one")
    name: Name = Field("gere", description="what logs call these rows")

    kinds: ClassVar[frozenset[str]] = frozenset({"sft", "pretrain", "rft", "sdft", "unlearn"})
    absent: ClassVar[dict[str, Any]] = {"ratio": 0.0}

    _rows: Any = PrivateAttr(None)
    _recording: Any = PrivateAttr(None)
    _facts: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _nothing_that_does_nothing(self) -> "GeRe":
        other = f"means nothing with keep: {self.keep}"
        kept, margin = None if self.keep != "labels" else other, None if self.keep == "margin" else other
        dynamic = None if self.weight == "dynamic" else "bounds weight: dynamic alone"
        likely = None if self.keep == "kl" else other
        fields = {"weight": kept, "of": kept, "mean": margin, "passes": margin, "top_k": likely, "at_most": dynamic}
        refuse(*unused(self, fields))
        return self

    @property
    def needs(self) -> frozenset[str]:
        """Hidden states and what the base computed, for all but labels."""
        return frozenset({"hidden", "base"}) if self.keep != "labels" else frozenset()

    def quotas(self, batch_rows: int) -> dict[str, int]:
        """The general rows, under this method's name."""
        share = 0 if self.ratio == "shuffled" else round(self.ratio * batch_rows)
        return {self.name: share} if self.active else {}

    def check(self, batch_rows: int, earlier: "Sequence[str]") -> list[tuple[str, str]]:
        """The share must be a whole number of rows and leave room for the task's."""
        if not self.active or self.ratio == "shuffled":
            return []
        return [("ratio", text) for text in whole_share(self.ratio, batch_rows)]

    def prepare_data(self, data: "StageData", stage: StageInfo) -> None:
        """Add the general rows."""
        self._rows = data.load(self.general, f"stages.{stage.name}.methods.{self.name}.general", None)
        share = self.quotas(stage.batch_rows)[self.name] or None
        data.add(self.name, self._rows, share)
        self._facts |= {"rows": len(self._rows.dataset), "rows_per_batch": share or "shuffled"}

    def prepare_model(self, model: "nn.Module", stage: StageInfo) -> "nn.Module":
        """Record the base, once for all stages, or the stage's start."""
        if self.keep != "labels":
            assert stage.record is not None
            how: dict[str, Any] = {"of": RECORDED[self.keep], "who": self.of}
            how |= {"passes": self.passes} if self.keep == "margin" else {}
            how |= {"k": self.top_k, "temperature": TEMPERATURE} if self.keep == "kl" else {}
            self._recording = stage.record(model, self._rows, self.name, **how)
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
        """How far the general rows are from the recording: mean over tokens, and over hidden dimensions."""
        if self._recording is None:
            return {}
        rows = step.rows(self.name) & step.mask.any(1)  # not the copies without labels that fill up a batch
        hidden = step.hidden[rows][:, :-1][step.mask[rows]]  # (N, H) of the positions that predict a learned token
        distance = self._recording.apart(step.row[rows].tolist(), hidden, step.head)  # (N, H), of kl (N, 1)
        distance = distance.square() if self.keep == "l2" else distance
        over, entries = f"{self.name}_tokens", distance.shape[1]
        factors = step.factors
        losses = -step.log_probs.detach() if factors is None else -step.log_probs.detach() * factors
        step.note("token_loss", Term(losses.sum(), "tokens"))
        step.note("distance", Term(distance.detach().sum(), over, 1 / entries))
        step.note("outside", Term((distance > 0).sum().float(), over, 1 / entries))
        if self.keep == "margin" and self.mean == "violators":
            return {self.keep: Term(distance.sum() / (distance > 0).sum().clamp_min(1), "batches", self._weight(step))}
        return {self.keep: Term(distance.sum(), over, self._weight(step) / entries)}

    def _weight(self, step: "Step") -> float:
        if self.weight is None:
            return WEIGHTS[self.keep]
        if self.weight != "dynamic":
            return self.weight
        before = step.previous
        if f"{self.name}/distance" not in before:
            return 1.0
        apart = before[f"{self.name}/distance"]
        if self.keep == "margin" and self.mean == "violators":
            apart /= before[f"{self.name}/outside"] or 1.0
        return min(before[f"{self.name}/token_loss"] / (apart + 1e-8), self.at_most)

    def facts(self) -> dict[str, Any]:
        """Rows held and rows per batch."""
        return dict(self._facts)
