"""Half fine-tuning's choice: shares by elements, shapes that only allow the nearest share, seeds, tied ends."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpt import DataError
from cpt.methods.base import StageInfo, named_tensors
from cpt.methods.halves import choose_half
from cpt.methods.hft import HFT
from tests.contract.lab import GENERAL_ROWS, Lab, equal


def llama_sizes(layers: int, hidden: int = 4096, kv: int = 1024, ffn: int = 14336) -> dict[str, int]:
    """Llama-3.1-8B's shapes, any number of layers."""
    shapes = {
        "self_attn.q_proj": hidden * hidden,
        "self_attn.k_proj": hidden * kv,
        "self_attn.v_proj": hidden * kv,
        "self_attn.o_proj": hidden * hidden,
        "mlp.gate_proj": hidden * ffn,
        "mlp.up_proj": hidden * ffn,
        "mlp.down_proj": hidden * ffn,
        "input_layernorm": hidden,
        "post_attention_layernorm": hidden,
    }
    return {f"model.layers.{i}.{name}.weight": n for i in range(layers) for name, n in shapes.items()}


def share(sizes: dict[str, int], kept: set[str], word: str = "") -> float:
    mine = {name: n for name, n in sizes.items() if word in name}
    return sum(mine[name] for name in kept & set(mine)) / sum(mine.values())


@pytest.mark.parametrize("seed", range(5))
def test_grouped_query_attention_trains_half_by_elements(seed: int) -> None:
    sizes = llama_sizes(32)
    kept = choose_half(sizes, 0.5, "category", np.random.default_rng(seed))
    for word in ("self_attn", "mlp", "layernorm"):
        assert share(sizes, kept, word) == 0.5
    for i in range(32):
        in_layer = share(sizes, kept, f"layers.{i}.self_attn")
        assert in_layer == 0.5  # two of four by count would be 0.2, 0.5 or 0.8
        assert share(sizes, kept, f"layers.{i}.mlp") in (pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_an_odd_number_of_layers_gets_the_nearest_share() -> None:
    sizes = llama_sizes(3)
    kept = choose_half(sizes, 0.5, "category", np.random.default_rng(0))
    assert share(sizes, kept, "mlp") in (pytest.approx(4 / 9), pytest.approx(5 / 9))


def test_a_shared_qkv_tensor_gets_the_nearest_share_over_the_layers() -> None:
    sizes = {f"h.{i}.attn.{name}.weight": n for i in range(4) for name, n in (("c_attn", 3), ("c_proj", 1))}
    kept = choose_half(sizes, 0.5, "category", np.random.default_rng(1))
    assert share(sizes, kept) == 0.5
    shares = {share(sizes, kept, f"h.{i}.") for i in range(4)}
    assert shares <= {0.25, 0.75}


@pytest.mark.parametrize(("level", "ratio"), list(product(("category", "layer", "model"), (0.25, 0.5, 0.75))))
def test_every_level_and_ratio_comes_near(level: str, ratio: float) -> None:
    sizes = llama_sizes(16)
    kept = choose_half(sizes, ratio, level, np.random.default_rng(2))
    assert share(sizes, kept) == pytest.approx(ratio, abs=0.03)
    if level == "layer":
        assert all(share(sizes, kept, f"layers.{i}.") in (0.0, 1.0) for i in range(16))


def test_a_seed_draws_one_half_and_another_seed_another() -> None:
    sizes = llama_sizes(8)
    draws = [choose_half(sizes, 0.5, "category", np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_over_many_stages_each_tensor_is_trained_in_about_half() -> None:
    sizes = llama_sizes(4)
    counts = dict.fromkeys(sizes, 0)
    for seed in range(200):
        for name in choose_half(sizes, 0.5, "category", np.random.default_rng(seed)):
            counts[name] += 1
    assert all(70 <= count <= 130 for count in counts.values()), counts  # five standard deviations: 100 +- 35


def prepared(model: Any, **fields: Any) -> tuple[set[str], dict[str, Any]]:
    method = HFT(**fields)
    method.prepare_model(model, StageInfo(1, "s", "sft", seed=4, batch_rows=8))
    return {name for name, p in model.named_parameters() if p.requires_grad}, method.facts()


def test_embeddings_and_head_follow_their_options(tiny_llama: Any) -> None:
    trained, _ = prepared(tiny_llama(tie_word_embeddings=False), embeddings="frozen")
    assert "model.embed_tokens.weight" not in trained
    assert "lm_head.weight" in trained
    assert "model.norm.weight" in trained
    trained, _ = prepared(tiny_llama(tie_word_embeddings=False), head="frozen")
    assert "lm_head.weight" not in trained
    trained, _ = prepared(tiny_llama(tie_word_embeddings=True), head="frozen")
    assert "model.embed_tokens.weight" in trained  # a tied head is the embedding


def test_the_reported_share_is_the_real_one_and_a_miss_is_said(tiny_llama: Any) -> None:
    model = tiny_llama(num_hidden_layers=3)
    trained, facts = prepared(model)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert facts["trained_share"] == sum(sizes[name] for name in trained) / sum(sizes.values())
    assert facts["by_category"]["attention"] == 0.5
    assert facts["by_category"]["feed_forward"] in (0.4444, 0.5556)
    assert "feed_forward" in facts["note"]
    assert "note" not in prepared(tiny_llama(num_hidden_layers=2))[1]


def test_each_stage_draws_anew(tiny_llama: Any) -> None:
    halves = []
    for seed in (1, 2):
        model = tiny_llama()
        HFT().prepare_model(model, StageInfo(1, "s", "sft", seed=seed, batch_rows=8))
        halves.append({name for name, p in model.named_parameters() if p.requires_grad})
    assert halves[0] != halves[1]


@pytest.mark.parametrize("name", ["gpt2", "phi3"])
def test_models_whose_q_k_v_share_a_tensor(name: str) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, Phi3Config, Phi3ForCausalLM

    if name == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=4, n_head=2, vocab_size=64, n_positions=32))
    else:
        model = Phi3ForCausalLM(
            Phi3Config(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=4,
                num_attention_heads=2,
                vocab_size=64,
                pad_token_id=0,
            )
        )
    trained, facts = prepared(model)
    assert facts["trained_share_in_layers"] == pytest.approx(0.5, abs=0.02)
    assert set(facts["by_category"]) == {"attention", "feed_forward", "norm"}
    for parameter_name, _ in model.named_parameters():
        if parameter_name.endswith(".bias"):  # a bias goes with its weight
            weight = parameter_name.removesuffix("bias") + "weight"
            assert (parameter_name in trained) == (weight in trained)


EPOCH = {"type": "hft", "ratio": 0.5, "resample": "epoch"}


@pytest.fixture
def lab(tmp_path: Path, tiny_tokenizer: Any, tiny_llama: Any) -> Lab:
    return Lab(tmp_path, tiny_tokenizer, tiny_llama)


def moved(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {name for name, tensor in after.items() if not tensor.equal(before[name])}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_each_epoch_trains_its_own_half(lab: Lab, lora: bool) -> None:
    """24 rows, 4 a step: an epoch is 6 steps. The half at rest keeps its bits under AdamW's decay and momentum."""
    one, two, three = (lab.stage([EPOCH], max_steps=steps, lora=lora) for steps in (6, 12, 18))
    first, second, third = moved(one.before, one.after), moved(one.after, two.after), moved(two.after, three.after)
    inside = {name for name in two.after if ".layers." in name and (not lora or "lora_" in name)}
    for half in (first, second, third):
        sizes = {name: one.after[name].numel() for name in inside}
        assert 0.4 < sum(sizes[name] for name in half & inside) / sum(sizes.values()) < 0.6
    assert len({frozenset(half & inside) for half in (first, second, third)}) > 1
    alone = lab.stage([EPOCH | {"resample": "stage"}], max_steps=6, lora=lora)
    assert moved(alone.before, alone.after) == first  # the first epoch's half is the stage's


def test_a_stage_resumed_in_its_second_epoch_goes_on_with_that_half(lab: Lab, tmp_path: Path) -> None:
    whole = lab.stage([EPOCH], max_steps=12, dropout=0.2)
    folder = tmp_path / "cut"
    assert lab.stage([EPOCH], max_steps=12, dropout=0.2, folder=folder, stop_after=9).stopped
    again = lab.stage([EPOCH], max_steps=12, dropout=0.2, folder=folder)
    assert again.facts["resumed_from"] == "checkpoint-9"
    assert equal(whole.after, again.after)


@pytest.mark.parametrize("resample", ["stage", "epoch"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_what_is_protected_is_never_trained(lab: Lab, resample: str, lora: bool) -> None:
    method = EPOCH | {"resample": resample, "protected": ["layers.0", "*.mlp.down_proj*"]}
    replayed = {"type": "replay", "ratio": 0.25, "general": {"rows": GENERAL_ROWS}}
    done = lab.stage([method, replayed], max_steps=14, lora=lora)
    touched = moved(done.before, done.after)
    assert touched
    assert not [name for name in touched if ".layers.0." in name or "down_proj" in name]


def test_protecting_alone_is_no_absent_method(lab: Lab) -> None:
    only = {"type": "hft", "ratio": 1.0, "protected": ["mlp"]}
    done = lab.stage([only])
    assert moved(done.before, done.after) == {name for name in done.after if ".mlp." not in name}


def test_a_module_that_is_not_there_is_refused_with_the_nearest() -> None:
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"]
    assert named_tensors(names, ["layers.1", "lm_head"], "p") == set(names[1:])
    assert named_tensors(names, ["*q_proj*"], "p") == {names[1]}
    with pytest.raises(DataError, match=r"stages\.0\.methods\.0\.protected = 'mpl'.*Did you mean 'mlp'"):
        named_tensors(names, ["mpl"], "stages.0.methods.0.protected")


def test_a_new_half_within_a_stage_is_refused_where_the_optimizer_holds_all_as_one() -> None:
    from types import SimpleNamespace

    from cpt.trainers.deepspeed import refuse_edits

    config = SimpleNamespace(is_offload=lambda: False, is_zero3=lambda: False, get_value=lambda key: True)
    args = SimpleNamespace(fp16=False, fsdp=None, deepspeed_plugin=SimpleNamespace(hf_ds_config=config))
    said = " ".join(refuse_edits([HFT.model_validate(EPOCH)], args))
    assert "hft edits gradients" in said
    assert "hft" not in " ".join(refuse_edits([HFT()], args))
