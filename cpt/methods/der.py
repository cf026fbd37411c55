"""DER++: replay rows of earlier stages, and hold the logits that the model gave them when it had just learned them.

Paper: Dark Experience Replay, Buzzega et al. 2020 (arXiv 2004.07211). Cost: the replayed rows; one forward pass over
the rows of each stage once it is finished, 8 bytes per likely token and learned token on disk; nothing of note in a
step.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from cpt.data.spec import Name, refuse
from cpt.methods.base import Method, StageInfo, Term, replay_problems

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cpt.data.stage_data import StageData
    from cpt.data.tokens import TokenRows
    from cpt.methods.step import Step


class DER(Method):
    """Replay rows of earlier stages; add the squared distance to the log-probabilities that they had at their end.

    The task's loss, the replayed rows' loss (`beta`) and the distance (`alpha`) are three means, each over its own
    tokens, so that the two strengths do not hang on `ratio`. Kept are the likely tokens' log-probabilities, once a
    stage; its logits up to the constant that a distribution does not see.
    """

    type: Literal["der"] = "der"
    ratio: float = Field(0.25, ge=0, lt=1, description="share of every effective batch; 0 switches it off")
    earlier: Literal["all"] | list[Name] = Field("all", description="stages whose rows to replay")
    rows_per_stage: Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="at most this many rows of each earlier stage, or below 1 this share of them"
    )
    alpha: float = Field(0.1, ge=0, description="of the squared distance to the log-probabilities kept")
    beta: float = Field(0.5, ge=0, description="of the replayed rows' own token loss")
    top_k: int = Field(32, gt=0, description="likely tokens that are kept")
    name: Name = Field("der", description="what logs and the run's memory call these rows")

    absent: ClassVar[dict[str, Any]] = {"ratio": 0.0}

    _parts: "dict[str, TokenRows]" = PrivateAttr(default_factory=dict)
    _recordings: dict[str, Any] = PrivateAttr(default_factory=dict)
    _facts: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _counts_for_something(self) -> "DER":
        if self.active and not (self.alpha or self.beta):
            refuse((("alpha",), 0.0, "and beta = 0: the replayed rows would count nothing; give one, or ratio: 0"))
        return self

    @property
    def needs(self) -> frozenset[str]:
        """Hidden states and what a model computed on single rows; for beta alone neither."""
        return frozenset({"hidden", "base"}) if self.alpha else frozenset()

    def quotas(self, batch_rows: int) -> dict[str, int]:
        """The replayed rows, under this method's name."""
        return {self.name: round(self.ratio * batch_rows)} if self.active else {}

    def check(self, batch_rows: int, earlier: Sequence[str]) -> list[tuple[str, str]]:
        """The share must be whole and leave room for the task; the stages to replay must come before."""
        if not self.active:
            return []
        return replay_problems(self.ratio, batch_rows, self.earlier, earlier, self.rows_per_stage)

    def prepare_data(self, data: "StageData", stage: StageInfo) -> None:
        """Add the rows. Which are kept of a stage follows from the stream's seed: every later stage keeps the same."""
        from cpt.data.memory import Memory, per_stage
        from cpt.data.sources import part_of
        from cpt.data.tokens import joined

        for name, loaded in stage.rows_of(self.earlier).items():
            kept = part_of(loaded, per_stage(loaded.rows, self.rows_per_stage, stage.stream_seed, None))
            if stage.memory is not None:
                kept = Memory(stage.memory).keep_rows(f"{self.name}-{name}", kept, {"by": self.type})
            place = f"stages.{stage.name}.methods.{self.name}.earlier.{name}"
            self._parts[name] = data.load(kept, place, None)
        if not self._parts:
            self._facts["note"] = "no earlier stage to replay"
            return
        rows_of_all, share = joined(list(self._parts.values())), self.quotas(stage.batch_rows)[self.name]
        data.add(self.name, rows_of_all, share)
        self._facts |= {"rows": len(rows_of_all.dataset), "rows_per_batch": share}

    def prepare_model(self, model: "nn.Module", stage: StageInfo) -> "nn.Module":
        """Record the rows of the stage just finished; take what was recorded of those before it."""
        if not (self.alpha and self._parts):
            return model
        made = {name: self._recorded(model, name, stage) for name in self._parts}
        self._recordings = {name: recording for name, (_, recording) in made.items()}
        self._facts["logits_of"] = {name: at for name, (at, _) in made.items()}
        if late := {name: at for name, at in self._facts["logits_of"].items() if at != name}:
            told = ", ".join(f"{name} (those after {at} are kept)" for name, at in late.items())
            self._facts["note"] = f"no logits were recorded when these stages ended: {told}"
        return model

    def _recorded(self, model: "nn.Module", name: str, stage: StageInfo) -> tuple[str, Any]:
        """After which stage, and what: of the first model since the stage's end that its rows were recorded of.

        The model at hand is the last of them, for where nothing was recorded.
        """
        assert stage.record is not None
        since = list(stage.identities)[list(stage.identities).index(name) :]
        # With a schedule that goes on, a stage starts from another state of the one before than its finished model.
        state = stage.parent.removeprefix(stage.identities[since[-1]])
        ask = partial(stage.record, model, self._parts[name], f"{self.name}-{name}", of="top_k", who="start")
        for at in since:
            for end in dict.fromkeys(("", state)):
                key = stage.identities[at] + end
                if (found := ask(key=key, make=key == stage.parent, k=self.top_k)) is not None:
                    return at + end, found
        raise AssertionError(f"{stage.parent} is no state of {since[-1]}")

    def weigh_tokens(self, step: "Step") -> "Tensor | None":
        """(B, T-1): the mean over all other rows' tokens, and `beta` times that over the replayed rows'."""
        mine = step.window.get(f"{self.name}_tokens", 0.0)
        others = step.window["tokens"] - mine
        if not (mine and others):
            return None
        factors = step.log_probs.new_full(step.mask.shape, step.window["tokens"] / others)
        factors[step.rows(self.name)] = self.beta * step.window["tokens"] / mine
        return factors

    def loss_terms(self, step: "Step") -> dict[str, Term]:
        """The squared distance of log-probabilities: mean over likely tokens, and over replayed ones."""
        first, total = 0, step.log_probs.new_zeros(())
        for name, recording in self._recordings.items():
            count = len(self._parts[name].dataset)
            rows = step.rows(self.name) & (step.row >= first) & (step.row < first + count) & step.mask.any(1)
            total, first = total + self._apart(step, rows, recording, first), first + count
        return {"logits": Term(total, f"{self.name}_tokens", self.alpha)} if self._recordings else {}

    def _apart(self, step: "Step", rows: "Tensor", recording: Any, first: int) -> "Tensor":
        """Sum over the learned tokens of rows of one stage, numbered from `first`."""
        from cpt.losses.distances import mean_square
        from cpt.losses.divergences import log_probs_beside

        assert step.head is not None
        where = step.mask[rows]
        tokens, kept = recording.top_k((step.row[rows] - first).tolist(), step.hidden.device)
        label, known = step.inputs["labels"][rows][:, 1:][where], step.log_probs[rows][where]
        mine = log_probs_beside(step.head, step.hidden[rows][:, :-1][where], tokens, label, known)
        return mean_square(mine, kept).sum()

    def facts(self) -> dict[str, Any]:
        """Rows held, rows per batch, and after which stage each stage's logits were recorded."""
        return dict(self._facts)
