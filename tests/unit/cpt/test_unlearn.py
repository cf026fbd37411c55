"""Unlearning stages: what stands beside what, what the loss is made of, templates by counter, and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from cpt import ConfigError, DataError, Stream, run
from cpt.config import forgetters
from cpt.data.forgetting import MOST, passes, template_rows
from cpt.data.sampler import MixedSampler, Turns
from cpt.data.templates import Template, shipped
from cpt.methods.base import Method, Term
from cpt.methods.step import Step
from eval_harness.rows import Row
from tests.contract.lab import GENERAL_ROWS, TASK_ROWS, TRAINING, Lab, configured


@pytest.fixture
def lab(tmp_path: Path, tiny_tokenizer: Any, tiny_llama: Any) -> Lab:
    return Lab(tmp_path, tiny_tokenizer, tiny_llama)


class Look(Method):
    """Writes down every micro-batch."""

    type: Literal["look"] = "look"

    def loss_terms(self, step: Step) -> dict[str, Term]:
        SEEN.append(step)
        return {}


SEEN: list[Step] = []


def test_a_row_and_its_template_share_the_prompt_and_the_forward(lab: Lab) -> None:
    SEEN.clear()
    shape = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 9}
    lab.stage([{"type": "flat"}], "unlearn", extra=[Look()], **shape)
    assert len(SEEN) == 18
    for step in SEEN:
        forget, template = step.rows("forget"), step.rows("template")
        assert forget.sum() == template.sum()
        assert len(step.origin) == 2 + forget.sum()  # the batch's own two, and the templates
        for one, other in zip(step.inputs["input_ids"][forget], step.inputs["input_ids"][template], strict=True):
            prompt = (one != other).nonzero()[0].item() if not one.equal(other) else len(one)
            assert prompt >= 1
        assert (step.row[template] % len(TASK_ROWS)).equal(step.row[forget])
    for first in range(0, 18, 2):
        window = SEEN[first].window
        both = SEEN[first : first + 2]
        for name in ("forget", "template", "retain"):
            assert window[f"{name}_rows"] == sum(int(step.rows(name).sum()) for step in both)
            assert window[f"{name}_tokens"] == sum(int(step.mask[step.rows(name)].sum()) for step in both)
        assert (window["rows"], window["tokens"]) == (window["retain_rows"], window["retain_tokens"])
        assert window["retain_rows"] == 1  # a quarter of four


def test_the_loss_is_the_terms_and_the_kept_rows_own(lab: Lab) -> None:
    """By hand, of the first step: FLAT's total variation of both probabilities, the retain rows' mean token loss."""
    SEEN.clear()
    first = lab.stage([{"type": "flat", "weight": 2.0}], "unlearn", extra=[Look()], max_steps=1).lines[0]
    (step,) = SEEN
    p = {}
    for name in ("forget", "template"):
        rows = step.rows(name)
        p[name] = [float(lp[m].exp().mean()) for lp, m in zip(step.log_probs[rows], step.mask[rows], strict=True)]
    half = {name: sum(0.5 * torch.tensor(values).tanh()) / len(values) for name, values in p.items()}
    retain = step.rows("retain")
    kept = float(-step.log_probs[retain].sum() / step.mask[retain].sum())
    assert first["flat/template"] == pytest.approx(-2.0 * float(half["template"]), rel=1e-4)
    assert first["flat/forget"] == pytest.approx(2.0 * float(half["forget"]), rel=1e-4)
    assert first["kept_loss"] == pytest.approx(kept, rel=1e-4)
    assert first["loss"] == pytest.approx(kept + first["flat/template"] + first["flat/forget"], rel=1e-3)
    assert first["flat/forget_probability"] == pytest.approx(sum(p["forget"]) / len(p["forget"]), rel=1e-4)


def test_without_retain_rows_there_is_no_other_loss(lab: Lab, tmp_path: Path) -> None:
    stage = configured([{"type": "flat"}], "unlearn", TRAINING)
    alone = stage.model_copy(update={"retain": None})
    data: Any = lab.data(alone, TRAINING)
    assert data.names == ["task"]
    assert data.origins == ["forget", "template"]
    assert data.sizes == {"task": len(TASK_ROWS)}
    assert len(data.dataset()) == len(TASK_ROWS) * data.copies


def test_npo_at_the_start_has_no_ratio_and_the_gradient_of_ascent(lab: Lab) -> None:
    """d/d log p of -2 / beta log sigmoid(-beta (log p - log p0)) is 1 at the start: one step is ascent's."""
    sgd = {"optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0, "max_steps": 1}
    npo = lab.stage([{"type": "npo"}], "unlearn", **sgd)
    assert npo.lines[0]["npo/log_ratio"] == pytest.approx(0.0, abs=1e-4)

    class Ascent(Method):
        type: Literal["ascent"] = "ascent"
        forgets = True

        def loss_terms(self, step: Step) -> dict[str, Term]:
            """The summed log-probability of each row to forget."""
            return {"forget": Term(step.log_probs[step.rows("forget")].sum(), "forget_rows")}

    ascent = lab.stage([{"type": "flat", "weight": 1e-30}], "unlearn", extra=[Ascent()], **sgd)
    for name, tensor in npo.after.items():
        torch.testing.assert_close(tensor, ascent.after[name], rtol=1e-5, atol=1e-6)


def test_dpo_starts_at_no_margin_and_raises_it(lab: Lab) -> None:
    margins = [
        line["dpo/margin"] for line in lab.stage([{"type": "dpo"}], "unlearn", max_steps=8).lines if "loss" in line
    ]
    assert margins[0] == pytest.approx(0.0, abs=1e-4)
    assert margins[-1] > 1.0


def test_a_flat_that_no_gradient_reaches_says_so(lab: Lab) -> None:
    """Of random weights every template is one in a thousand: mean p (1 - p) is above the border until it is not."""
    facts = lab.stage([{"type": "flat"}], "unlearn", learning_rate=0.0).facts["methods"]["flat"]
    assert "note" not in facts or "next to no gradient" in facts["note"]
    assert 0 < facts["template_probability"] < 0.5


# ---- templates -------------------------------------------------------------------------------------------


def test_templates_follow_from_seed_turn_and_row() -> None:
    template = Template()
    assert len(shipped("unknown")) == 100
    assert template.drawn(1, 0, 50) == template.drawn(1, 0, 50)
    assert template.drawn(1, 0, 50) != template.drawn(1, 1, 50) != template.drawn(2, 1, 50)
    assert template.drawn(1, 0, 50)[:7] == template.drawn(1, 0, 7)
    fixed = Template(redraw="never")
    assert fixed.drawn(1, 0, 50) == fixed.drawn(1, 5, 50)
    for name in ("unknown", "polite", "copyright"):
        lines = shipped(name)
        assert len(lines) == len(set(lines)) > 40
        assert all(line == line.strip() and line for line in lines)


def test_a_template_takes_the_answers_place() -> None:
    rows = [
        Row("completion", prompt="Who?", completion=" Ann"),
        Row("chat", messages=({"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann"})),
    ]
    made = template_rows(rows, Template(lines=["Nobody."]), 0, 0)
    assert made[0].completion == " Nobody."
    assert made[1].messages[-1] == {"role": "assistant", "content": "Nobody."}
    assert [row.id for row in made] == [row.id for row in rows]


def test_each_pass_has_its_own_copy() -> None:
    turns = Turns(12, 3, "task", copies=3)
    drawn = [turns[place] for place in range(24)]
    for turn in range(6):
        at = drawn[4 * turn : 4 * turn + 4]
        assert sorted(at) == list(range(4 * (turn % 3), 4 * (turn % 3) + 4))
    sampler = MixedSampler({"task": 4, "retain": 3}, {"retain": 1}, 3, 8, seed=1, copies=2)
    numbers = list(sampler)
    assert sum(n >= 8 for n in numbers) == 8
    assert [sum(n < 4 for n in numbers), sum(4 <= n < 8 for n in numbers)] == [8, 8]


def test_as_many_passes_as_a_stage_can_make() -> None:
    assert passes({"max_steps": 10}, 4, 8) == 5
    assert passes({"num_train_epochs": 2}, 4, 8) == 2
    assert passes({"max_steps": 10_000}, 16, 8) == MOST


# ---- bad input ---------------------------------------------------------------------------------------------


def stream(tmp_path: Path, **stage: Any) -> dict[str, Any]:
    asked = {"name": "gone", "kind": "unlearn", "data": {"rows": TASK_ROWS}, "methods": [{"type": "flat"}], **stage}
    return {"name": "s", "model": "tiny-world", "stages": [asked], "output_dir": str(tmp_path)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": []}, "stages.0.methods = []: none forgets: give one of dpo, flat, grad_ascent"),
        ({"methods": ["flat", "npo"]}, "'flat and npo': both are the loss of the rows to forget"),
        ({"methods": ["flat", "eaft"]}, "does not work in an unlearn stage"),
        ({"kind": "sft"}, "does not work in an sft stage (unlearn)"),
        ({"kind": "sft", "methods": [], "retain": {"rows": GENERAL_ROWS}}, "means nothing in an sft stage"),
        ({"kind": "sft", "methods": [], "template": {"redraw": "never"}}, "means nothing in an sft stage"),
        ({"training": {"packing": True}}, "rows are forgotten one by one"),
        ({"retain": {"rows": GENERAL_ROWS}, "retain_ratio": 0.3}, "stages.0.retain_ratio = 0.3: of 8 rows is 2.4 rows"),
        ({"template": {"lines": []}}, "every template needs words"),
        ({"template": {"lines": "rude"}}, "stages.0.template.lines"),
        ({"methods": ["flat", {"type": "replay", "general": {"rows": GENERAL_ROWS}, "ratio": 0.25, "by": "tokens"}]},
         "nobody knows how many tokens templates bring along"),
        ({"methods": ["flat", {"type": "gere", "general": {"rows": GENERAL_ROWS}, "ratio": "shuffled"}]},
         "in an unlearn stage rows come in a fixed share"),
        ({"schedule": "infinite"}, "means nothing in an unlearn stage"),
        ({"methods": ["flat", {"type": "replay", "general": {"rows": GENERAL_ROWS}, "ratio": 0.5}],
          "retain": {"rows": GENERAL_ROWS[:5]}}, "leave no room for task rows"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:30],
)  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Stream.parse(stream(tmp_path, **changes))
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"retain": {"rows": TASK_ROWS[:3] + GENERAL_ROWS}},
            "stages.0.retain: 3 rows are among those to forget as well",
        ),
        ({"data": {"rows": [{"text": "a b"}]}}, "has no single prompt with an answer"),
        ({"template": {"lines": [TASK_ROWS[0]["completion"]]}}, "is answered by a template already"),
    ],
    ids=["both", "text", "same"],
)
def test_rows_that_cannot_be_are_refused_before_anything_trains(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises((ConfigError, DataError)) as refused:
        run(Stream.parse(stream(tmp_path, **changes)), say=lambda line: None)
    assert said in str(refused.value)
    assert not list(tmp_path.glob("*/stages/01*"))


def test_every_forgetter_is_one_of_unlearn_stages() -> None:
    from cpt.methods import registry

    assert forgetters() == ["dpo", "flat", "grad_ascent", "idk", "npo", "simnpo"]
    assert all(registry.find(name).kinds == {"unlearn"} for name in forgetters())


# ---- what was forgotten stays so ------------------------------------------------------------------------------


def later(**last: Any) -> dict[str, Any]:
    """Learn two tasks, forget three rows of the first, then the last stage."""
    stages = [
        {"name": "one", "data": {"rows": TASK_ROWS}},
        {"name": "two", "data": {"rows": GENERAL_ROWS}},
        {"name": "gone", "kind": "unlearn", "data": {"rows": TASK_ROWS[:3]}, "methods": ["npo"]},
        {"name": "last", "data": {"rows": [{"prompt": "q", "completion": "new"}]}, **last},
    ]
    return {"name": "s", "model": "tiny-world", "stages": stages}


def test_forgotten_rows_are_not_replayed() -> None:
    from cpt.inputs import read_inputs
    from cpt.train_stage import stage_info

    stream = Stream.parse(later(methods=[{"type": "replay", "earlier": "all"}]))
    inputs = read_inputs(stream, lambda line: None)
    asked = {row["prompt"] + row["completion"] for row in TASK_ROWS[:3]}
    for number, held in ((1, len(TASK_ROWS)), (2, len(TASK_ROWS) - 3), (3, len(TASK_ROWS) - 3)):
        earlier = dict(stage_info(stream, inputs, number).earlier)
        assert set(earlier) == {"one"} if number == 1 else {"one", "two"}
        assert len(earlier["one"].rows) == held
        assert (not asked & {f"{row.prompt}{row.completion}" for row in earlier["one"].rows}) is (number > 1)
    with pytest.raises(ConfigError, match="'gone' is no earlier stage"):
        Stream.parse(later(methods=[{"type": "replay", "earlier": ["gone"]}]))


@pytest.mark.parametrize(
    ("last", "place"),
    [
        ({"data": {"rows": TASK_ROWS[1:5]}}, "stages.3.data: 2 rows are forgotten by a stage before it"),
        ({"methods": [{"type": "replay", "general": {"rows": TASK_ROWS[2:9]}}]}, "stages.3.methods.0.general: 1 rows"),
    ],
    ids=["data", "general"],
)
def test_a_stage_that_would_learn_them_again_is_refused(last: dict[str, Any], place: str) -> None:
    from cpt.inputs import read_inputs

    with pytest.raises(DataError) as refused:
        read_inputs(Stream.parse(later(**last)), lambda line: None)
    assert place in str(refused.value)
    assert "learned again" in str(refused.value)
