"""Every registered method: builds, moves what it declares, composes, accumulates, resumes, and can be absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import datasets
import pytest
import torch
from pydantic import PrivateAttr

from cpt.config import GENERATING, Stage
from cpt.data.stage_data import StageData
from cpt.data.tokens import IGNORED, TokenRows
from cpt.methods import registry
from cpt.methods.base import Method, StageInfo, Term
from cpt.methods.step import Step, Tensors
from cpt.train_stage import fresh_methods
from tests.contract.cases import CASES
from tests.contract.lab import TRAINING, Lab, configured, distance, equal

pytestmark = pytest.mark.contract

EACH = [(name, kind) for name, case in CASES.items() for kind in case.kinds(case.settings)]
BY_KIND = [
    (settings, kind)
    for case in CASES.values()
    for settings in (case.settings, *case.also, *case.not_rft, *case.not_lora)
    for kind in case.kinds(settings)
]
FORGETTING = [name for name, kind in EACH if kind == "unlearn" and registry.find(name).forgets]
BESIDE_TASK = [(name, kind) for name, kind in EACH if name not in FORGETTING]  # there a stage without it trains too
SETTINGS = [settings for settings, kind in BY_KIND if kind == "sft"]
ON_LORA = [settings for settings in SETTINGS if settings not in CASES[settings["type"]].not_lora]
FAINT = [(name, kind) for name, kind in EACH if CASES[name].vanishing]


@pytest.fixture
def lab(tmp_path: Path, tiny_tokenizer: Any, tiny_llama: Any) -> Lab:
    return Lab(tmp_path, tiny_tokenizer, tiny_llama)


def test_every_registered_method_has_a_case() -> None:
    assert set(registry.OURS) == set(CASES)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_round_trips_through_its_dump(settings: dict[str, Any]) -> None:
    stage = configured([settings], "sft", {}, CASES[settings["type"]].lora)
    again = Stage.model_validate(stage.model_dump(mode="json"))
    assert again == stage
    assert type(again.methods[0]) is registry.find(settings["type"])


@pytest.mark.parametrize(("name", "kind"), BESIDE_TASK)
def test_changes_the_outcome_and_only_what_it_declares(lab: Lab, name: str, kind: str) -> None:
    case = CASES[name]
    plain, with_it = (lab.stage(listed, kind, lora=case.lora) for listed in ([], [case.settings]))
    assert not equal(plain.after, with_it.after)
    trained = {tensor for tensor in plain.after if not case.lora or "lora_" in tensor}
    assert plain.moved() == trained
    if name == "hft":
        assert with_it.moved() < set(with_it.after)
        share = sum(with_it.after[n].numel() for n in with_it.moved()) / sum(t.numel() for t in with_it.after.values())
        assert share == pytest.approx(with_it.facts["methods"]["hft"]["trained_share"])
    else:
        assert with_it.moved() == trained


@pytest.mark.parametrize(("name", "kind"), BESIDE_TASK)
def test_absent_equals_not_listed(lab: Lab, name: str, kind: str) -> None:
    method = registry.find(name)
    assert method.absent is not None
    absent, how = CASES[name].settings | method.absent, {"dropout": 0.2, "lora": CASES[name].lora}
    assert equal(lab.stage(kind=kind, **how).after, lab.stage([absent], kind, **how).after)


@pytest.mark.parametrize(("name", "kind"), EACH)
def test_kill_and_resume_equals_uninterrupted(lab: Lab, tmp_path: Path, name: str, kind: str) -> None:
    settings, folder, how = [CASES[name].settings], tmp_path / "killed", {"dropout": 0.2, "lora": CASES[name].lora}
    whole = lab.stage(settings, kind, **how)
    first = lab.stage(settings, kind, folder=folder, stop_after=3, **how)
    assert first.stopped
    assert not equal(first.after, whole.after)
    second = lab.stage(settings, kind, folder=folder, **how)
    assert second.facts["resumed_from"] == "checkpoint-3"
    assert equal(second.after, whole.after)


@pytest.mark.parametrize(("settings", "kind"), [one for one in BY_KIND if one[1] != "pretrain"], ids=str)
def test_one_batch_equals_its_parts(lab: Lab, settings: dict[str, Any], kind: str) -> None:
    shapes = [{"per_device_train_batch_size": b, "gradient_accumulation_steps": a} for b, a in ((4, 1), (2, 2), (1, 4))]
    lora = CASES[settings["type"]].lora
    outcomes = [lab.stage([settings], kind, lora=lora, **shape).after for shape in shapes]
    assert distance(outcomes[0], outcomes[1]) < 5e-5  # rows differ in length: a mean of means is off by 1e-2
    assert distance(outcomes[0], outcomes[2]) < 5e-5


class Silent(Method):
    """Adds the rows that a replay would add, with nothing to learn in them, and the divisor they would bring."""

    type: Literal["silent"] = "silent"

    _lengths: dict[int, int] = PrivateAttr(default_factory=dict)

    def prepare_data(self, data: StageData, stage: StageInfo) -> None:
        """As replay, with every label ignored."""
        registry.find("replay").model_validate(CASES["replay"].settings).prepare_data(data, stage)
        rows = data.sources["replay"]
        labels = [list(row["labels"]) for row in rows.dataset]
        self._lengths.update({i: sum(label != IGNORED for label in row[1:]) for i, row in enumerate(labels)})
        columns = {"input_ids": rows.dataset["input_ids"], "labels": [[IGNORED] * len(row) for row in labels]}
        silent = datasets.Dataset.from_dict(columns, features=rows.dataset.features)
        data.sources["replay"] = TokenRows(silent, rows.counts)

    def weigh_tokens(self, step: Step) -> torch.Tensor:
        """task tokens / (task tokens + tokens that are silent here)."""
        silenced = sum(self._lengths[int(row)] for row in step.row[step.rows("replay")])
        return torch.full_like(step.log_probs, step.window["tokens"] / (step.window["tokens"] + silenced))


@pytest.mark.parametrize("name", [name for name, kind in FAINT if kind == "sft"])
def test_vanishing_strength_leaves_the_task_alone(lab: Lab, name: str) -> None:
    """At strength 1e-30 the hooks run and the arithmetic vanishes: what is left is the task's own gradient, under
    attention dropout, so that a consumed random number or a side effect would show."""
    case = CASES[name]
    faint, extra = case.settings | (case.vanishing or {}), [Silent()] if case.adds else []
    one = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0, "dropout": 0.2, "lora": case.lora}
    with_it, silent = lab.stage([faint], **one), lab.stage(extra=extra, **one)
    assert distance(with_it.before, with_it.after) > 1e-4
    assert distance(with_it.after, silent.after) < 1e-7
    other = lab.stage(extra=extra, **(one | {"dropout": 0.0}))
    assert distance(with_it.after, other.after) > 1e-6  # what another dropout mask would look like


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_preparing_the_model_draws_from_no_shared_generator(lab: Lab, settings: dict[str, Any]) -> None:
    stage = configured([settings], "sft", {}, CASES[settings["type"]].lora)
    (method,), data = fresh_methods(stage), lab.data(stage, TRAINING)
    info = StageInfo(1, "s", "sft", seed=1, batch_rows=4, **lab.lent(stage))
    model, before = lab.model(CASES[settings["type"]].lora), torch.random.get_rng_state()
    method.prepare_data(data, info)
    method.prepare_model(model, info)
    assert torch.random.get_rng_state().equal(before)


@pytest.mark.parametrize(("name", "kind"), [one for one in FAINT if one[1] in GENERATING])
def test_vanishing_strength_leaves_the_policy_alone(lab: Lab, name: str, kind: str) -> None:
    """There a method's rows have a forward of their own, after the policy's: at 1e-30 nothing is left of them."""
    case = CASES[name]
    faint, one = case.settings | (case.vanishing or {}), {"max_steps": 1, "weight_decay": 0.0, "dropout": 0.2}
    one["lora"] = case.lora
    with_it, plain = lab.stage([faint], kind, **one), lab.stage(kind=kind, **one)
    assert distance(with_it.before, with_it.after) > 1e-4
    assert equal(with_it.after, plain.after)
    more = one | {"max_steps": 3}  # what holds weights where they start says nothing in the first step
    assert not equal(lab.stage([case.settings], kind, **more).after, lab.stage(kind=kind, **more).after)


class ReferencePass(Method):
    """A look at the base through the disabled adapter, as a penalty against it would take."""

    type: Literal["reference_pass"] = "reference_pass"

    def loss_terms(self, step: Step) -> dict[str, Term]:
        """No term; PEFT switches requires_grad on for every adapter tensor when the block ends."""
        with torch.no_grad(), step.model.disable_adapter():
            step.model(**{key: step.inputs[key] for key in ("input_ids", "attention_mask")}, use_cache=False)
        return {}


@pytest.mark.parametrize("settings", ON_LORA, ids=str)
def test_lora_with_a_reference_pass_moves_only_what_is_declared(lab: Lab, settings: dict[str, Any]) -> None:
    quiet = lab.stage([settings], lora=True)
    looked = lab.stage([settings], lora=True, extra=[ReferencePass()])
    assert looked.moved() == quiet.moved()
    assert all("lora_" in name for name in looked.moved())
    adapters = {name for name in looked.after if "lora_" in name}
    if settings["type"] == "hft":
        assert looked.moved() < adapters
    else:
        assert looked.moved() == adapters
    assert equal(looked.after, quiet.after)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_same_stage_twice_gives_equal_bits(lab: Lab, settings: dict[str, Any]) -> None:
    how = {"dropout": 0.2, "lora": CASES[settings["type"]].lora}
    assert equal(lab.stage([settings], **how).after, lab.stage([settings], **how).after)


def test_both_methods_compose(lab: Lab) -> None:
    replay, hft = CASES["replay"].settings, CASES["hft"].settings
    both, alone = lab.stage([replay, hft]), lab.stage([hft])
    assert both.moved() == alone.moved()  # replay moves nothing that hft froze
    assert not equal(both.after, alone.after)
    assert equal(both.after, lab.stage([hft, replay]).after)


@pytest.mark.parametrize("training", [{}, {"packing": True, "max_length": 48}], ids=["loose", "packed"])
def test_every_batch_holds_its_share(lab: Lab, tmp_path: Path, training: dict[str, Any]) -> None:
    """Also through a stop and a resume, and far beyond the end of the replayed rows."""
    seen: list[int] = []

    class Count(Method):
        type: Literal["count"] = "count"

        def loss_terms(self, step: Step) -> dict[str, Term]:
            """Writes down what stands in each micro-batch."""
            seen.append(int(step.rows("replay").sum()))
            assert step.window["replay_rows"] == 2
            return {}

    shape = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 9} | training
    for stop in (4, None):
        lab.stage([CASES["replay"].settings], extra=[Count()], folder=tmp_path / "s", stop_after=stop, **shape)
    assert [sum(seen[i : i + 2]) for i in range(0, len(seen), 2)] == [2] * 9


# ---- methods that forget --------------------------------------------------------------------------------------


def likelihoods(lab: Lab, weights: dict[str, Any], name: str) -> tuple[float, float]:
    """Mean log-probability of the answers to forget and of their templates, under these weights."""
    model = lab.model()
    model.load_state_dict(weights, strict=False)
    data: Any = lab.data(configured([CASES[name].settings], "unlearn", TRAINING), TRAINING)
    found = []
    for rows in (data.sources["task"], data.all_templates):
        values = []
        for row in rows.dataset:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            with torch.no_grad():
                values.append(-float(model(ids, labels=labels).loss))
        found.append(sum(values) / len(values))
    return found[0], found[1]


@pytest.mark.parametrize("name", FORGETTING)
def test_it_forgets_and_keeps(lab: Lab, name: str) -> None:
    """Answers get less likely against templates than by the retain rows' loss alone, which is learned beside."""
    how: dict[str, Any] = {"kind": "unlearn", "dropout": 0.2, "learning_rate": 3e-3}
    once, again = (lab.stage([CASES[name].settings], **how) for _ in range(2))
    assert equal(once.after, again.after)
    assert once.moved() == set(once.after)
    faint = lab.stage([CASES[name].settings | {"weight": 1e-30}], **how)
    without, after = (likelihoods(lab, outcome.after, name) for outcome in (faint, once))
    assert after[0] - after[1] < without[0] - without[1] - 1e-3
    assert all("kept_loss" in line for line in once.lines if "loss" in line)
    assert distance(faint.before, faint.after) > 1e-3  # by the rows that are kept


@pytest.mark.parametrize("name", FORGETTING)
def test_an_adapter_forgets(lab: Lab, name: str) -> None:
    """A removable one: nothing else moves."""
    outcome = lab.stage([CASES[name].settings], "unlearn", lora=True)
    assert outcome.moved() == {tensor for tensor in outcome.after if "lora_" in tensor}


# ---- the seam's other hooks, by methods made up here ---------------------------------------------------------


def without_first_row(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, a matrix with its first row zero."""
    return tensor if tensor.ndim != 2 else torch.cat([torch.zeros_like(tensor[:1]), tensor[1:]])


class Shrink(Method):
    """A penalty as a term, a gradient mask, and a weight edit, all of which can be checked exactly."""

    type: Literal["shrink"] = "shrink"
    strength: float = 0.0
    mask: bool = False
    decay: float = 1.0

    _steps: int = PrivateAttr(default=0)

    def loss_terms(self, step: Step) -> dict[str, Term]:
        """Negative log-likelihood once more: at strength s the gradient is (1 + s) times the plain one."""
        return {"again": Term(-step.log_probs.sum(), "tokens", self.strength)} if self.strength else {}

    def edit_gradients(self, gradients: Tensors, stage: StageInfo) -> None:
        """Zero the first row of every matrix."""
        if self.mask:
            gradients.map(lambda name, gradient: without_first_row(gradient))

    def edit_weights(self, weights: Tensors, stage: StageInfo) -> None:
        """Multiply everything; count the steps."""
        self._steps += 1
        if self.decay != 1.0:
            weights.map(lambda name, weight: weight * self.decay)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """How many steps were seen."""
        return {"steps": torch.tensor(self._steps)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on counting."""
        self._steps = int(state["steps"])


SGD = {"optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0, "max_steps": 1}


def test_a_term_adds_its_gradient(lab: Lab) -> None:
    plain, doubled = lab.stage(**SGD), lab.stage(extra=[Shrink(strength=1.0)], **SGD)
    for name, before in plain.before.items():
        torch.testing.assert_close(doubled.after[name] - before, 2 * (plain.after[name] - before), atol=5e-7, rtol=1e-3)
    assert doubled.lines[0]["shrink/again"] == pytest.approx(plain.lines[0]["loss"], rel=1e-3)


def test_a_term_does_not_depend_on_accumulation(lab: Lab) -> None:
    method = Shrink(strength=0.5)
    whole = lab.stage(extra=[method], per_device_train_batch_size=4)
    parts = lab.stage(extra=[method], per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert distance(whole.after, parts.after) < 2e-5
    logged = [[line["shrink/again"] for line in o.lines if "shrink/again" in line] for o in (whole, parts)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)


def test_a_gradient_mask_is_exact_with_adamw_and_clipping(lab: Lab) -> None:
    masked = lab.stage(extra=[Shrink(mask=True)], weight_decay=0.0, gradient_accumulation_steps=2)
    for name, after in masked.after.items():
        if after.ndim == 2:
            assert after[0].equal(masked.before[name][0])
            assert not after[1:].equal(masked.before[name][1:])


def test_a_weight_edit_follows_every_step(lab: Lab) -> None:
    plain, edited = lab.stage(**SGD), lab.stage(extra=[Shrink(decay=0.5)], **SGD)
    assert all(edited.after[name].equal(plain.after[name] * 0.5) for name in plain.after)


def test_a_methods_state_survives_a_kill(lab: Lab, tmp_path: Path) -> None:
    first = Shrink()
    lab.stage(extra=[first], folder=tmp_path / "k", stop_after=3)
    second = Shrink()
    lab.stage(extra=[second], folder=tmp_path / "k")
    assert (first._steps, second._steps) == (3, 4)


def test_a_misspelt_hook_and_a_field_over_a_hook_are_refused() -> None:
    with pytest.raises(TypeError, match="loss_term"):

        class Misspelt(Method):
            def loss_term(self) -> None: ...

    with pytest.raises(TypeError, match="weigh_tokens"):

        class Hidden(Method):
            weigh_tokens: float = 1.0
