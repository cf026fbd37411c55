"""The contract of a method: its fields are what YAML may set, its hooks are what it does to a stage.

A method overrides only the hooks it needs. Hooks run in fixed phases, in YAML order inside a phase:
data, model, token weights (they multiply), loss terms (they add), gradients (`add` before `mask`),
weights (`add` before `mask`), end of stage. The instance in the configuration is never trained with: each
stage makes a fresh one from its fields, so state lives in private attributes and starts clean.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from cpt.errors import DataError
from cpt.suggest import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from cpt.data.rewritten import Generate
    from cpt.data.sources import Loaded
    from cpt.data.stage_data import StageData
    from cpt.methods.step import Step, Tensors


@dataclass(frozen=True)
class Term:
    """One addition to the loss, as a sum: the seam divides, once, so that accumulation and ranks agree.

    total:  scalar tensor, the *sum* over this micro-batch, with gradient.
    over:   what the sum is divided by, counted over the whole effective batch and all ranks: "tokens",
            "rows", "<origin>_tokens" or "<origin>_rows" (origin: "task" or a source that a method added). A term
            that is a mean of its micro-batch is over "batches"; it is not the same under another accumulation.
    weight: factor of the term.
    """

    total: "Tensor"
    over: str
    weight: float = 1.0


@dataclass(frozen=True)
class StageInfo:
    """What a method may know of the stage it works in.

    seed is the stage's own; `earlier` holds the rows that each stage before it trained on, as (name, rows), and
    `identities` what those stages are known by, `base` what the stream's base is; `parent` is the one of these that the
    stage starts from.
    `batch_rows` is the size of the effective batch (per device x accumulation x ranks), `epoch_steps` how many of them
    go through the task's rows once. `memory` is the folder for
    what outlives a stage (`cpt.data.memory`). `losses(rows)` are the mean token losses of rows under the weights that
    the stage starts from. `record(model, rows, name, of=, who=)` gives what the stream's base, or those weights,
    compute on token rows (`cpt.data.activations`), recorded once per run; model is the one that `prepare_model` got.
    key= is the identity of that model, make=False gives None where nothing is recorded of it yet.
    `device` is what the stage trains on: a model is on it once a method has put it there, or the trainer.
    `adapters_off` says what the model is without its adapters: "base", "start", both or neither. `open_base()` loads
    the stream's base. `rows` are those that the stage trains on, as read; `rendering` says how prompts are rendered.
    `generate(max_new_tokens=...)` has the weights that the stage starts from write answers (`cpt.data.rewritten`).
    """

    index: int
    name: str
    kind: str
    seed: int
    batch_rows: int
    world: int = 1
    device: Any = "cpu"
    epoch_steps: float = 0.0
    earlier: tuple[tuple[str, "Loaded"], ...] = ()
    identities: "Mapping[str, str]" = field(default_factory=dict)
    base: str = ""
    parent: str = ""
    stream_seed: int = 0
    adapters_off: frozenset[str] = frozenset()
    open_base: "Callable[[], nn.Module] | None" = None
    memory: "Path | None" = None
    rows: "Loaded | None" = None
    rendering: str = ""
    generate: "Callable[..., Generate] | None" = None
    losses: "Callable[[Loaded], list[float]] | None" = None
    record: "Callable[..., Any] | None" = None

    def rows_of(self, stages: "Literal['all'] | Sequence[str] | None") -> "dict[str, Loaded]":
        """Rows of the earlier stages that a method names, by name; of all, or of none. Without what was forgotten."""
        known = dict(self.earlier)
        return {name: known[name] for name in (known if stages == "all" else stages or []) if name in known}


def whole_share(ratio: float, batch_rows: int) -> list[str]:
    """What is wrong with a share of rows of every effective batch of this size: it must be whole and leave room."""
    n, exact = round(ratio * batch_rows), ratio * batch_rows
    if n >= batch_rows:
        return [f"leaves no room for task rows in an effective batch of {batch_rows}"]
    if n < 1 or abs(n - exact) > 0.01:
        near = sorted({max(1, int(exact)), min(batch_rows - 1, max(1, int(exact) + 1))})
        ways = " or ".join(f"{k / batch_rows:.4g} ({k} row{'s' * (k > 1)})" for k in near)
        return [f"of {batch_rows} rows is {exact:g} rows, not a whole number: use {ways}"]
    return []


def replay_problems(
    ratio: float,
    batch_rows: int,
    wanted: object,
    earlier: Sequence[str],
    per_stage: float | None = None,
    in_all: float | None = None,
) -> list[tuple[str, str]]:
    """What is wrong with a share of rows of earlier stages: it must be whole, the stages known, the budget no smaller.

    per_stage, in_all: at most so many rows, of each stage or of all; what a share of a stage is nobody knows yet.
    """
    found = [("ratio", text) for text in whole_share(ratio, batch_rows)]
    stages = len(earlier) if wanted == "all" else len(wanted) if isinstance(wanted, list) else 0
    known = per_stage if per_stage is None or per_stage >= 1 else None
    budgets = {"rows_in_all": in_all, "rows_per_stage": known and known * stages}
    share, rows = round(ratio * batch_rows), next(((k, n) for k, n in budgets.items() if n is not None), None)
    if rows and stages and rows[1] < share and not found:
        text = f"keeps {rows[1]:g} rows in all, fewer than the {share} of every effective batch: raise it"
        found = [(rows[0], text)]
    return found + unknown_stages(wanted, earlier)


def unused(method: "Method", fields: "Mapping[str, str | None]") -> list[tuple[tuple[str], Any, str]]:
    """Fields that were given a value and do nothing: field -> why it is not used, or None where it is."""
    own = type(method).model_fields
    given = {key: getattr(method, key) for key in fields if getattr(method, key) != own[key].default}
    return [((key,), value, f"{fields[key]}: leave it out") for key, value in given.items() if fields[key]]


def unknown_stages(wanted: object, earlier: Sequence[str]) -> list[tuple[str, str]]:
    """What is wrong with the stages that a field `earlier` names: they must come before."""
    known = ", ".join(earlier) or "none"
    return [
        ("earlier", f"{name!r} is no earlier stage.{did_you_mean(name, earlier)} Earlier stages: {known}.")
        for name in (wanted if isinstance(wanted, list) else [])
        if name not in earlier
    ]


def named_tensors(names: Iterable[str], patterns: list[str], place: str) -> set[str]:
    """Names of tensors that a pattern names: as a whole, or as parts of the dotted path (`layers.0`, `mlp`, `lm_head`).

    Raises DataError for a pattern that none of them has.
    """
    found = {
        pattern: {name for name in names if fnmatch(name, pattern) or f".{pattern}." in f".{name}."}
        for pattern in patterns
    }
    if missing := [pattern for pattern, these in found.items() if not these]:
        parts = sorted({".".join(name.split(".")[i:j]) for name in names for i, j in _spans(name)})
        near = did_you_mean(missing[0], parts)
        raise DataError(f"{place} = {missing[0]!r}: no tensor of the model is called so.{near}")
    return set().union(*found.values())


def _spans(name: str) -> list[tuple[int, int]]:
    n = name.count(".") + 1
    return [(i, j) for i in range(n) for j in range(i + 1, min(i + 3, n) + 1)]


class Method(BaseModel):
    """Base class of every method. `type` is its name in YAML; the docstring heads its documentation page."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: str

    kinds: ClassVar[frozenset[str]] = frozenset({"sft", "pretrain"})  # stage kinds where it makes sense
    order: ClassVar[str] = "add"  # "mask" runs after every "add": a penalty must not push a masked entry
    owns_requires_grad: ClassVar[bool] = False  # two owners in one stage are refused
    forgets: ClassVar[bool] = (
        False  # its terms are the loss of the rows to forget: one in an unlearn stage, alone there
    )
    absent: ClassVar[dict[str, Any] | None] = None  # the setting at which it does nothing, None if it has none

    @property
    def active(self) -> bool:
        """False at the setting that makes the method absent: the seam then never sees it."""
        return self.absent is None or any(getattr(self, key) != value for key, value in self.absent.items())

    @property
    def label(self) -> str:
        """What logs and records call it: its `name`, where it has that field, or its type."""
        return str(getattr(self, "name", self.type))

    @property
    def needs(self) -> frozenset[str]:
        """What it takes beside its hooks: "hidden" (Step.hidden and Step.head), "blocks" (Step.blocks), "base" (what
        StageInfo.record gives: not under ZeRO-3, FSDP or packing), "whole" (the whole model, before training or at
        other weights: not under ZeRO-3 or FSDP), "base without adapter", "start without adapter" (the model with its
        adapters off is that one), "adapter" (a new LoRA, whose weights are final only after `finish_stage`: not with
        vLLM), "own passes" (the model is run between the trainer's passes: not under DeepSpeed, FSDP or
        re-entrant checkpointing), "template" (beside every row to forget its prompt with another answer), "retain" (the
        stage's retain rows)."""
        return frozenset()

    @property
    def edits(self) -> frozenset[str]:
        """What it changes after the backward pass: "gradients", "weights", or "drops": it takes gradients away."""
        hooks = {"gradients": "edit_gradients", "weights": "edit_weights"}
        return frozenset(of for of, hook in hooks.items() if getattr(type(self), hook) is not getattr(Method, hook))

    def blocks_read(self, count: int) -> list[int]:
        """With "blocks" in `needs`: numbers, from 0, of the blocks whose outputs it reads, in a model of so many."""
        return []

    def check(self, batch_rows: int, earlier: Sequence[str]) -> list[tuple[str, str]]:
        """Problems as (field, sentence), with an effective batch of this size and the names of the stages before."""
        return []

    def check_rows(self, loaded: "Loaded") -> list[tuple[str, str]]:
        """Problems of the stage's own rows as (field, sentence), before the first stage of a run trains."""
        return []

    def quotas(self, batch_rows: int) -> dict[str, int]:
        """Rows of each source that `prepare_data` will add, in an effective batch of this size; 0: no fixed number."""
        return {}

    def prepare_data(self, data: "StageData", stage: StageInfo) -> None:
        """Add row sources and their exact share of every effective batch."""

    def prepare_model(self, model: "nn.Module", stage: StageInfo) -> "nn.Module":
        """Freeze or wrap; runs on the weights the stage starts from, before the optimizer exists."""
        return model

    def weigh_tokens(self, step: "Step") -> "Tensor | None":
        """(rows, tokens - 1) factors of the stage's own token losses, or None for ones. No gradient."""
        return None

    def loss_terms(self, step: "Step") -> dict[str, Term]:
        """Additions to the loss by name; the names are logged."""
        return {}

    def edit_gradients(self, gradients: "Tensors", stage: StageInfo) -> None:
        """Once per optimizer step, on reduced gradients, before clipping."""

    def edit_weights(self, weights: "Tensors", stage: StageInfo) -> None:
        """After each optimizer step."""

    def finish_stage(self, model: "nn.Module", stage: StageInfo) -> None:
        """The trainer is gone; the model is plain and about to be saved."""

    def state_dict(self) -> "dict[str, Tensor]":
        """Tensors that must survive a kill; written beside each checkpoint."""
        return {}

    def load_state_dict(self, state: "dict[str, Tensor]") -> None:
        """Take back what `state_dict` gave."""

    def facts(self) -> dict[str, Any]:
        """What the stage's record should say of this method once it is prepared (JSON values)."""
        return {}

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a misspelt hook, and a field that hides one: both would be silent no-ops."""
        super().__pydantic_init_subclass__(**kwargs)
        public = {name for name in vars(cls) if not name.startswith(("_", "model_"))}
        strangers = public - set(cls.model_fields) - CONTRACT
        hidden = set(cls.__annotations__) & HOOKS
        if strangers or hidden:
            raise TypeError(
                f"{cls.__name__}: {sorted(strangers | hidden)} is neither a field nor a hook of the contract. "
                f"Hooks: {', '.join(sorted(HOOKS))}. Start private names with an underscore."
            )


HOOKS = frozenset(
    {"active", "check", "check_rows", "quotas", "prepare_data", "prepare_model", "weigh_tokens", "loss_terms"}
    | {"edit_gradients", "edit_weights", "finish_stage", "state_dict", "load_state_dict", "facts"}
)
CONTRACT = HOOKS | {
    "type",
    "label",
    "kinds",
    "order",
    "owns_requires_grad",
    "forgets",
    "needs",
    "edits",
    "absent",
    "blocks_read",
}
