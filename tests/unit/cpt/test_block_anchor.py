"""Block anchor: nothing at the start, the formula afterwards, the blocks of usual architectures, one pass for all."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpt import ConfigError, DataError, Stream, TrainingError, run
from cpt.data.blocks import blocks, evenly
from cpt.losses.distances import relative_l1
from cpt.trainers import plug
from tests.contract.lab import GENERAL_ROWS, TASK_ROWS, Lab, distance, equal

ANCHOR = {"type": "block_anchor", "weight": 1.0, "reference": "weights"}
FREE = {"type": "block_anchor", "weight": 1.0}


@pytest.fixture
def lab(tmp_path: Path, tiny_tokenizer: Any, tiny_llama: Any) -> Lab:
    return Lab(tmp_path, tiny_tokenizer, tiny_llama)


def logged(outcome: Any, name: str = "distance") -> list[float]:
    return [line[f"block_anchor/{name}"] for line in outcome.lines if f"block_anchor/{name}" in line]


# ---- the formula ------------------------------------------------------------------------------------


def test_the_distance_by_hand() -> None:
    """The reference (3, -4) has root mean square 3.5355; (1, 0) is 2 and 4 away: mean 3."""
    hidden = torch.tensor([[1.0, 0.0], [3.0, -4.0], [3.0, -3.0]], requires_grad=True)
    found = relative_l1(hidden, torch.tensor([[3.0, -4.0]] * 3))
    assert found.tolist() == pytest.approx([3 / 12.5**0.5, 0.0, 0.5 / 12.5**0.5])
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    scale = 1 / (2 * 12.5**0.5)
    torch.testing.assert_close(gradient, scale * torch.tensor([[-1.0, 1.0], [0.0, 0.0], [0.0, 1.0]]))


def test_a_scale_of_both_does_not_show_and_zeros_have_none() -> None:
    make = torch.Generator().manual_seed(0)
    hidden, other = torch.randn(5, 8, generator=make), torch.randn(5, 8, generator=make)
    torch.testing.assert_close(relative_l1(30 * hidden, 30 * other), relative_l1(hidden, other))
    assert relative_l1(torch.zeros(2, 4), torch.zeros(2, 4)).tolist() == [0.0, 0.0]
    assert relative_l1(hidden[:0], other[:0]).shape == (0,)


def test_at_the_start_nothing_is_lost(lab: Lab) -> None:
    found = logged(lab.stage([ANCHOR]))
    assert found[0] == 0.0
    assert found[-1] > 1e-3
    assert logged(lab.stage([ANCHOR], packing=True, max_length=48))[0] == 0.0


@pytest.mark.parametrize("read", [[0], [1], [0, 1]], ids=str)
def test_the_logged_distance_is_the_formula(lab: Lab, read: list[int]) -> None:
    """After one step of plain SGD without the term's own weight, on the rows of step two, row by row."""
    sgd = {"optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0, "max_steps": 2, "learning_rate": 0.5}
    faint = lab.stage([ANCHOR | {"weight": 1e-30, "blocks": read}], **sgd)
    start, moved = lab.model(), lab.model()
    moved.load_state_dict(lab.stage(**(sgd | {"max_steps": 1})).after, strict=False)
    total, count = dict.fromkeys(read, 0.0), 0
    for row in lab.batch(1):
        learned = torch.tensor(row["labels"])[1:] != -100
        count += int(learned.sum())
        for number in read:
            mine, kept = (outputs(model, number, row)[:-1][learned] for model in (moved, start))
            total[number] += float(((mine - kept).abs().mean(1) / kept.square().mean(1).sqrt()).sum())
    for number in read:
        assert logged(faint, f"block_{number}")[1] == pytest.approx(total[number] / count, rel=1e-3)
    assert logged(faint)[1] == pytest.approx(1e-30 * sum(total.values()) / count, rel=1e-3)


def outputs(model: Any, number: int, row: dict[str, Any]) -> torch.Tensor:
    """(T, H) what a Llama's layer gives on one row alone."""
    found: list[torch.Tensor] = []
    hook = model.model.layers[number].register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False)
    hook.remove()
    return found[0][0]


def test_a_stronger_weight_keeps_the_blocks_nearer(lab: Lab) -> None:
    """The rate falls to zero: at a constant one AdamW's steps, whose size no weight changes, swing around the start."""
    how = {"max_steps": 24, "lr_scheduler_type": "linear"}
    runs = [lab.stage([ANCHOR | {"weight": weight}], **how) for weight in (1e-6, 0.3, 1.0)]
    ends = [sum(sum(logged(one, f"block_{n}")[-4:]) for n in (0, 1)) for one in runs]
    assert ends[0] > 1.5 * ends[1] > 1.5 * 1.5 * ends[2]


def test_all_rows_are_held_where_asked(lab: Lab) -> None:
    """A replay's rows count among the tokens that the mean is over, or do not."""
    replay = {"type": "replay", "ratio": 0.5, "general": {"rows": GENERAL_ROWS}}
    task, every = (lab.stage([replay, ANCHOR | {"weight": 1e-30, "on": on}]) for on in ("task", "all"))
    assert equal(task.after, every.after)
    assert logged(task, "block_0")[-1] != pytest.approx(logged(every, "block_0")[-1], rel=1e-3)


# ---- where the reference comes from -------------------------------------------------------------------


def test_under_lora_the_start_is_the_model_without_its_adapter(lab: Lab) -> None:
    held = lab.stage([FREE], lora=True)
    assert held.facts["methods"]["block_anchor"] == {"reference": "adapter"}
    assert all("lora_" in name for name in held.moved())
    assert logged(held)[0] == 0.0
    assert logged(held)[-1] > 0.0
    plain = lab.stage(lora=True)
    assert distance(held.after, plain.after) > 1e-4


def test_one_pass_without_gradient_serves_all_that_ask(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Any] = []
    look = plug.look
    monkeypatch.setattr(plug, "look", lambda *given, **how: looks.append(how["read"]) or look(*given, **how))
    kl = {"type": "distill", "to": "base"}
    both = lab.stage([kl, FREE | {"to": "base", "blocks": [1]}], lora=True, gradient_accumulation_steps=2, max_steps=3)
    assert looks == [[1]] * 6  # of micro-batches, although distill asks first and reads no block
    assert both.facts["methods"]["distill"]["reference"] == both.facts["methods"]["block_anchor"]["reference"]
    looks.clear()
    lab.stage([kl | {"to": "start"}, FREE | {"to": "base", "blocks": [1]}], lora=True, max_steps=3)
    assert len(looks) == 6  # two names


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_checkpointing_changes_nothing(lab: Lab, lora: bool, reentrant: bool) -> None:
    plain = lab.stage([ANCHOR], lora=lora)
    how = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    spared = lab.stage([ANCHOR], lora=lora, **how)
    assert distance(plain.after, spared.after) < 1e-6
    assert logged(plain) == pytest.approx(logged(spared), rel=1e-5)
    assert distance(plain.after, lab.stage(lora=lora, **how).after) > 1e-4  # the term reaches the weights


def test_outputs_that_are_hidden_are_told_of(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that runs without gradient, as one does inside a checkpoint of the old kind."""
    monkeypatch.setattr(plug, "hidden_of", lambda output: None)
    with pytest.raises(TrainingError, match=r"blocks \[0, 1\] gave no output with gradient: .*use_reentrant: false"):
        lab.stage([ANCHOR])


# ---- blocks -------------------------------------------------------------------------------------------


def test_even_distances_end_with_the_last() -> None:
    assert evenly(4, 32) == [7, 15, 23, 31]
    assert evenly(3, 10) == [2, 5, 9]
    assert evenly(1, 6) == [5]
    assert evenly(4, 2) == [0, 1]
    for count in range(1, 60):
        for wanted in range(1, 60):
            found = evenly(wanted, count)
            assert len(set(found)) == min(wanted, count)
            assert found[-1] == count - 1


SMALL: dict[str, Any] = {"vocab_size": 40, "num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": None}
ARCHITECTURES = {
    "llama": ({}, "model.layers"),
    "qwen2": ({}, "model.layers"),
    "qwen3": ({}, "model.layers"),
    "mistral": ({}, "model.layers"),
    "gemma2": ({}, "model.layers"),
    "gemma3_text": ({}, "model.layers"),
    "phi": ({}, "model.layers"),
    "opt": ({"ffn_dim": 24, "word_embed_proj_dim": 16}, "model.decoder.layers"),
    "gpt_neox": ({}, "gpt_neox.layers"),
    "gpt2": ({"n_layer": 3, "n_embd": 16, "n_head": 2}, "transformer.h"),
    "mixtral": ({"num_local_experts": 8}, "model.layers"),
    "qwen2_moe": ({"num_experts": 8, "moe_intermediate_size": 8}, "model.layers"),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_blocks_of_usual_architectures(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    more, path = ARCHITECTURES[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SMALL | more)))
    model.train()
    before = torch.random.get_rng_state()
    assert blocks(model) == list(model.get_submodule(path))
    assert len(blocks(model)) == 3
    assert torch.random.get_rng_state().equal(before)
    assert all(module.training for module in model.modules())
    assert not [module for module in model.modules() if module._forward_hooks]


def test_blocks_beneath_an_adapter(lab: Lab) -> None:
    model = lab.model(lora=True)
    assert blocks(model) == list(model.get_base_model().model.layers)


class WithoutBlocks(torch.nn.Module):
    """A model of one layer, and a list that it never goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.device = torch.nn.Embedding(5, 4), torch.device("cpu")
        self.unused = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

    @property
    def base_model(self) -> WithoutBlocks:
        """Itself."""
        return self

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        """One of the list, as a router takes one expert."""
        return SimpleNamespace(last_hidden_state=self.unused[1](self.embed(input_ids)))


def test_a_model_without_blocks_is_an_error_with_a_way_on() -> None:
    with pytest.raises(DataError, match=r"WithoutBlocks: has no list of decoder layers .*leave them out"):
        blocks(WithoutBlocks())


# ---- refused before training --------------------------------------------------------------------------


def stream(*adapters: str | None, **fields: Any) -> dict[str, Any]:
    """One stage for each adapter; the last one holds blocks."""
    stages = [
        {"name": f"s{i}", "data": {"rows": TASK_ROWS}, **({"adapter": one} if one else {})}
        for i, one in enumerate(adapters)
    ]
    stages[-1]["methods"] = [{"type": "block_anchor", **fields}]
    training = {"per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1}
    return {"name": "s", "model": "tiny-world", "training": training, "stages": stages}


REFUSED: list[tuple[tuple[str | None, ...], str, str]] = [
    ((None,), "start", "trains all weights"),
    ((None,), "base", "trains all weights"),
    (("new", "continue"), "start", "has adapter: continue"),
    (("new", "new"), "start", "has adapter: new"),
    ((None, "new"), "base", "has adapter: new"),
    (("new", "merge_then_new"), "base", "has adapter: merge_then_new"),
]


@pytest.mark.parametrize(("adapters", "to", "said"), REFUSED, ids=str)
def test_a_reference_that_is_not_there_is_refused(adapters: tuple[str | None, ...], to: str, said: str) -> None:
    i = len(adapters) - 1
    place = rf"stages\.{i}\.methods\.0\.to = '{to}': the stage {said}, .*set reference: weights"
    with pytest.raises(ConfigError, match=place):
        Stream.parse(stream(*adapters, to=to))
    assert Stream.parse(stream(*adapters, to=to, reference="weights"))


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("adapters", "to"),
    [(("new",), "base"), (("new", "merge_then_new"), "start"), ((None, "new"), "start"), (("new", "continue"), "base")],
    ids=str,
)
def test_a_reference_that_is_there_is_used(tmp_path: Path, adapters: tuple[str | None, ...], to: str) -> None:
    raw = stream(*adapters, to=to) | {"output_dir": str(tmp_path), "evaluation": {"within": "off"}}
    done = run(Stream.parse(raw), say=lambda line: None).find(f"s{len(adapters) - 1}").done()
    assert done is not None
    assert done["facts"]["methods"]["block_anchor"] == {"reference": "adapter"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"blocks": []}, "blocks"),
        ({"blocks": 0}, "blocks"),
        ({"blocks": [1, 1]}, r"blocks = \[1, 1\]: names a block twice"),
        ({"weight": -1.0}, "weight = -1.0"),
    ],
    ids=str,
)
def test_settings_without_sense_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"methods\.0\..*{said}"):
        Stream.parse(stream("new", **fields))


def test_a_block_that_the_model_does_not_have_is_refused_before_anything_trains(tmp_path: Path) -> None:
    raw = stream(None, "new", blocks=[1, 99]) | {"output_dir": str(tmp_path)}
    with pytest.raises(DataError, match=r"stages\.1\.methods\.0\.blocks = \[1, 99\]: the model has 4 blocks, 0 to 3"):
        run(Stream.parse(raw), say=lambda line: None)
    assert not list(tmp_path.rglob("metrics.jsonl"))
