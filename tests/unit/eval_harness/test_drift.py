"""Drift: zero for the same model, the same whatever the batches and ranks, and weights counted however they moved."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eval_harness import drift as module
from eval_harness.drift import DriftError, TokenDrift, adapters_off, drift, token_drift
from eval_harness.errors import Interrupted, ScoringError
from eval_harness.lineage import Lineage, LoadError, Part, weights_hashes
from eval_harness.loading import load_lineage, load_model, made_of
from eval_harness.prompts import Encoded, Prompting, encode
from eval_harness.rows import canonical
from eval_harness.weights import Distance, total, weight_distance, weight_results
from tests.threads import Threads, ThreadShard

ROWS = [
    canonical({"prompt": f"word {i} of {7 * i}", "completion": "river " * (1 + i % 4) + "market"}) for i in range(12)
]
NAMES = ["forward_kl", "hidden_shift", "hidden_cosine_distance"]


@pytest.fixture
def other(make_model: Callable[..., Any], tokenizer: Any) -> Any:
    return make_model(len(tokenizer), seed=1)


@pytest.fixture
def lora(make_model: Callable[..., Any], tokenizer: Any) -> Callable[..., Any]:
    """`lora(seed=, **config)`: the session's model under a LoRA whose B is random."""
    from peft import LoraConfig, get_peft_model

    def make(seed: int = 0, **config: Any) -> Any:
        settings = {"r": 2, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
        base = make_model(len(tokenizer))
        torch.manual_seed(seed)
        return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings | config)).eval()

    return make


def encoded(tokenizer: Any) -> list[Encoded]:
    return [encode(tokenizer, row) for row in ROWS]


def near(found: list[TokenDrift | None], expected: list[TokenDrift | None]) -> None:
    for one, wanted in zip(found, expected, strict=True):
        assert one is not None
        assert wanted is not None
        for name in ("kl", "shift", "cosine_distance"):
            assert getattr(one, name) == pytest.approx(getattr(wanted, name), rel=1e-5)


# ---- what a model says and holds ----------------------------------------------------------------------


def test_a_model_has_not_drifted_from_itself(model: Any, tokenizer: Any) -> None:
    for base in (model, copy.deepcopy(model)):
        found = drift(model, base, tokenizer, ROWS)
        assert [found[name].value for name in NAMES] == [0.0, 0.0, 0.0]
        assert {value for name in NAMES for value in found[name].per_item.values()} == {0.0}


def test_another_model_has_and_the_direction_matters(model: Any, other: Any, tokenizer: Any) -> None:
    there, back = drift(other, model, tokenizer, ROWS), drift(model, other, tokenizer, ROWS)
    assert there["forward_kl"].value > 0.1
    assert abs(there["forward_kl"].value - back["forward_kl"].value) > 1e-3
    assert there["hidden_cosine_distance"].value == pytest.approx(back["hidden_cosine_distance"].value)
    assert there["forward_kl"].n == len(ROWS)


def test_results_are_means_over_tokens_with_the_error_over_rows(model: Any, other: Any, tokenizer: Any) -> None:
    found = drift(other, model, tokenizer, ROWS, base_name="b1")["forward_kl"]
    tokens = [one.kl for one in token_drift(other, model, encoded(tokenizer))]
    assert found.value == pytest.approx(sum(map(sum, tokens)) / sum(map(len, tokens)))
    assert len({len(one) for one in tokens}) > 1
    assert list(found.per_item.values()) == pytest.approx([sum(one) / len(one) for one in tokens])
    residuals = [sum(one) - found.value * len(one) for one in tokens]
    expected = math.sqrt(12 / 11 * sum(r**2 for r in residuals)) / sum(map(len, tokens))
    assert found.stderr == pytest.approx(expected)
    style = Prompting().definition(tokenizer)
    assert found.definition == f"forward_kl@1(nats_per_token,b1,full_vocabulary,{style})"
    assert not found.higher_is_better


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_batches_and_chunks_change_nothing(
    model: Any, other: Any, tokenizer: Any, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = encoded(tokenizer)
    expected = token_drift(other, model, sequences)
    near(token_drift(other, model, sequences, batch_tokens=batch_tokens), expected)
    monkeypatch.setattr(module, "LEAST_CHUNK", 1)
    near(token_drift(other, model, list(reversed(sequences)), batch_tokens=batch_tokens), expected[::-1])


def test_ranks_share_the_rows_and_return_the_same(model: Any, other: Any, tokenizer: Any) -> None:
    sequences = encoded(tokenizer)
    expected = token_drift(other, model, sequences)
    for world in (2, 3):
        asked = [0] * world

        def work(shard: ThreadShard, asked: list[int] = asked) -> Any:
            def count() -> bool:
                asked[shard.rank] += 1
                return False

            pair = copy.deepcopy(other), copy.deepcopy(model)  # ranks are threads here, hooks are the model's
            return token_drift(*pair, sequences, batch_tokens=30, should_stop=count, shard=shard)

        for found in Threads(world).run(work):
            near(found, expected)
        assert min(asked) >= 1
        assert max(asked) < sum(asked)


def test_adapters_off_are_the_base_and_leave_training_as_it_was(lora: Callable[..., Any], tokenizer: Any) -> None:
    adapted = lora()
    adapted.train()
    halves = [p for name, p in adapted.named_parameters() if "lora_A" in name]
    for parameter in halves:
        parameter.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in adapted.named_parameters()}
    assert set(flags.values()) == {True, False}
    found = token_drift(adapted, None, encoded(tokenizer))
    assert {name: p.requires_grad for name, p in adapted.named_parameters()} == flags
    assert adapted.training
    base = copy.deepcopy(adapted).unload()
    near(found, token_drift(adapted, base, encoded(tokenizer)))
    assert sum(found[0].kl) > 1e-3
    with pytest.raises(KeyError), adapters_off(adapted):
        raise KeyError
    assert {name: p.requires_grad for name, p in adapted.named_parameters()} == flags


def test_several_active_adapters_are_active_again(lora: Callable[..., Any], tokenizer: Any) -> None:
    from peft import LoraConfig

    adapted = lora()
    adapted.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.base_model.set_adapter(["default", "second"])
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = adapted(ids).logits
        token_drift(adapted, None, encoded(tokenizer))
        assert torch.equal(adapted(ids).logits, before)


def test_a_model_that_caps_its_logits_is_read_through_its_cap(tokenizer: Any) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"vocab_size": len(tokenizer), "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.4}
    torch.manual_seed(0)
    pair = [Gemma2ForCausalLM(Gemma2Config(**shape, final_logit_softcapping=1.0)).eval() for _ in range(2)]
    sequences = encoded(tokenizer)[:3]
    for one, found in zip(sequences, token_drift(*pair, sequences), strict=True):
        ids = torch.tensor([one.input_ids])
        with torch.no_grad():
            q, p = (m(ids, use_cache=False).logits[0].double().log_softmax(-1) for m in pair)
        kl = (p.exp() * (p - q)).sum(-1)
        wanted = [kl[t - 1].item() for t in range(1, len(one.input_ids)) if one.is_target[t]]
        assert found.kl == pytest.approx(wanted, rel=1e-5)


def test_a_learned_prompt_in_front_is_passed_over(model: Any, tokenizer: Any) -> None:
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    prompted = get_peft_model(copy.deepcopy(model), config).eval()
    sequences = encoded(tokenizer)[:3]
    for one, found in zip(sequences, token_drift(prompted, None, sequences), strict=True):
        ids = torch.tensor([one.input_ids])
        with torch.no_grad():
            q = prompted(input_ids=ids, use_cache=False).logits[0, 3:].double().log_softmax(-1)
            p = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        wanted = [kl[t - 1].item() for t in range(1, len(one.input_ids)) if one.is_target[t]]
        assert min(wanted) > 1e-3
        assert found.kl == pytest.approx(wanted, rel=1e-5)


def test_what_cannot_be_read_is_counted(model: Any, other: Any, tokenizer: Any) -> None:
    long = canonical({"prompt": "word " * 200, "completion": "river"})
    found = drift(other, model, tokenizer, [*ROWS, long])["hidden_shift"]
    assert found.excluded == {"longer_than_context": 1}
    assert found.n == len(ROWS)
    nothing = drift(other, model, tokenizer, [long])["forward_kl"]
    assert (nothing.value, nothing.n) == (None, 0)
    assert "longer_than_context" in (nothing.note or "")


def test_a_token_that_the_model_rules_out_is_an_infinite_kl_and_counted(model: Any, tokenizer: Any) -> None:
    class RulesOut(torch.nn.Module):
        def __init__(self, head: Any) -> None:
            super().__init__()
            self.head, self.weight = head, head.weight

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.head(hidden).index_fill(-1, torch.tensor([9]), -torch.inf)

    masked = copy.deepcopy(model)
    masked.set_output_embeddings(RulesOut(masked.lm_head))
    found = drift(masked, model, tokenizer, ROWS)
    assert found["forward_kl"].excluded == {"the_model_rules_out_what_the_base_may_write": len(ROWS)}
    assert found["forward_kl"].value is None
    assert found["hidden_shift"].value == 0.0
    both = drift(masked, copy.deepcopy(masked), tokenizer, ROWS)  # what both rule out is no difference
    assert both["forward_kl"].value == 0.0
    assert 0 < drift(model, masked, tokenizer, ROWS)["forward_kl"].value < math.inf


def test_models_that_cannot_be_compared_are_refused(
    model: Any, other: Any, make_model: Callable[..., Any], lora: Callable[..., Any], tokenizer: Any
) -> None:
    with pytest.raises(DriftError, match="rows is empty"):
        drift(model, other, tokenizer, [])
    with pytest.raises(DriftError, match="LlamaForCausalLM has none: give the base"):
        drift(model, None, tokenizer, ROWS)
    with pytest.raises(DriftError, match=r"vocabulary has \d+ tokens and the base's 500"):
        drift(model, make_model(500), tokenizer, ROWS)
    with pytest.raises(DriftError, match="hidden size is 16 and the base's 32"):
        drift(model, make_model(len(tokenizer), hidden_size=32), tokenizer, ROWS)
    with pytest.raises(DriftError, match="'default' trained biases of its base"):
        drift(lora(bias="all"), None, tokenizer, ROWS)
    with pytest.raises(DriftError, match="no output embeddings"):
        drift(model.model, model, tokenizer, ROWS)
    broken = copy.deepcopy(model)
    torch.nn.init.constant_(broken.model.norm.weight, math.nan)
    for pair in ((broken, model), (model, broken)):
        with pytest.raises(ScoringError, match="NaN"):
            drift(*pair, tokenizer, ROWS)


def test_stopping_and_progress(model: Any, other: Any, tokenizer: Any) -> None:
    seen: list[tuple[int, int]] = []
    drift(other, model, tokenizer, ROWS, batch_tokens=60, progress=lambda *at: seen.append(at))
    assert seen[-1] == (12, 12)
    assert len(seen) > 2
    with pytest.raises(Interrupted):
        drift(other, model, tokenizer, ROWS, should_stop=lambda: True)


# ---- weights ------------------------------------------------------------------------------------------


@pytest.fixture
def base(model: Any, tokenizer: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def save_adapter(adapted: Any, base: Path, folder: Path) -> Path:
    adapted.save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))
    return folder


def close(found: dict[str, Distance], expected: dict[str, Distance], rel: float = 1e-4) -> None:
    assert set(found) == set(expected)
    for name, one in expected.items():
        assert found[name].l2 == pytest.approx(one.l2, rel=rel, abs=1e-6 * one.base_norm)
        assert found[name].base_norm == pytest.approx(one.base_norm, rel=1e-6)
        assert found[name].elements == one.elements


def test_distance_by_hand(model: Any) -> None:
    moved = copy.deepcopy(model)
    q, norm = moved.model.layers[0].self_attn.q_proj.weight.data, moved.model.norm.weight.data
    q[0, 0] += 3.0
    q[1, 1] -= 4.0
    norm += 1.0
    found = weight_distance(moved, model)
    changed = {name: one for name, one in found.items() if one.l2}
    assert list(changed) == ["model.layers.0.self_attn.q_proj", "model.norm"]
    assert changed["model.norm"].l2 == pytest.approx(4.0)  # 16 ones away
    assert changed["model.norm"].relative == pytest.approx(1.0)  # from 16 ones
    assert changed["model.layers.0.self_attn.q_proj"].l2 == pytest.approx(5.0)
    assert total(found).l2 == pytest.approx(math.sqrt(25 + 16))
    assert total(found).elements == model.num_parameters()
    results = weight_results(found, "b1")
    assert results["weight_distance"].value == pytest.approx(math.sqrt(41))
    assert results["weight_distance"].per_item["model.norm"] == pytest.approx(4.0)
    assert results["weight_distance_relative"].value == pytest.approx(math.sqrt(41) / total(found).base_norm)
    assert results["weight_distance_relative"].definition.startswith("weight_distance_relative@1(l2,b1,float64")


def test_a_base_of_zeros_has_no_relative_distance() -> None:
    results = weight_results({"a": Distance(3.0, 0.0, 2), "b": Distance(4.0, 10.0, 5)})
    assert results["weight_distance"].per_item == {"a": 3.0, "b": 4.0}
    relative = results["weight_distance_relative"]
    assert (relative.value, relative.n, relative.excluded) == (0.5, 1, {"base_is_zero": 1})
    assert relative.per_item == {"b": 0.4}
    nothing = weight_results({"a": Distance(3.0, 0.0, 2)})["weight_distance_relative"]
    assert (nothing.value, nothing.note) == (None, "every weight of the base is zero")


def test_the_page_has_every_definition(model: Any, tokenizer: Any, root: Path) -> None:
    page = (root / "docs" / "drift.md").read_text(encoding="utf-8")
    style = Prompting().definition(tokenizer)
    found = drift(model, model, tokenizer, ROWS[:1], base_name="BASE") | weight_results({}, "BASE")
    for name, result in found.items():
        assert f"| `{name}` |" in page
        assert f"`{result.definition.replace(style, 'STYLE')}`" in page
    for reason in (module.INFINITE_KL, "base_is_zero", "longer_than_context", "no_target_token"):
        assert f"`{reason}`" in page


def test_folders_and_models_have_the_same_distance(
    model: Any, other: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = weight_distance(other, model)
    other.save_pretrained(tmp_path / "other", max_shard_size="10KB")
    assert len(list((tmp_path / "other").glob("*.safetensors"))) > 2
    monkeypatch.setattr("eval_harness.weights.AT_ONCE", 7)
    for pair in ((tmp_path / "other", base), (other, base), (str(tmp_path / "other"), model)):
        close(weight_distance(*pair), expected, rel=1e-9)
    assert {one.l2 for one in weight_distance(base, base).values()} == {0.0}


def test_files_that_are_not_loaded_do_not_count(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    """Some folders hold their weights twice, the second time under the names of another library."""
    one, other = make_model(len(tokenizer)), make_model(len(tokenizer), seed=1)
    one.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "other", max_shard_size="10KB")
    expected = weight_distance(tmp_path / "one", tmp_path / "other")
    for name in ("one", "other"):
        save_file({"layers.0.attention.wq.weight": torch.ones(2)}, tmp_path / name / "consolidated.safetensors")
        assert weight_distance(tmp_path / "one", tmp_path / "other") == expected
    (tmp_path / "other" / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(LoadError, match=r"index\.json: cannot be read .*restore the folder"):
        weight_distance(tmp_path / "one", tmp_path / "other")


def test_a_tied_tensor_counts_once(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    tied, moved = (make_model(len(tokenizer), seed=seed, tie_word_embeddings=True) for seed in (0, 1))
    found = weight_distance(moved, tied)
    assert total(found).elements == tied.num_parameters()
    assert "lm_head" not in found
    for name, one in (("tied", tied), ("moved", moved)):
        one.save_pretrained(tmp_path / name)
        file = tmp_path / name / "model.safetensors"  # older checkpoints hold the tensor twice
        tensors = load_file(file)
        twice = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors | {"lm_head.weight": twice}, file, metadata={"format": "pt"})
    close(weight_distance(tmp_path / "moved", tmp_path / "tied"), found, rel=1e-9)


@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True, "r": 3}, {"use_dora": True}, {"rank_pattern": {"q_proj": 5}}]
)
def test_a_lora_is_as_far_as_its_merged_weights(
    config: dict[str, Any], lora: Callable[..., Any], model: Any, base: Path, tmp_path: Path
) -> None:
    adapted = lora(**config)
    state = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    folder = save_adapter(adapted, base, tmp_path / "lora")
    merged = copy.deepcopy(adapted).merge_and_unload()
    expected = weight_distance(merged, model)
    assert total(expected).l2 > 0.1
    assert {name for name, one in expected.items() if one.l2} == {n for n in expected if n.endswith("_proj")}
    for pair in ((adapted, None), (adapted, model), (adapted, base), (folder, base), (folder, model)):
        close(weight_distance(*pair), expected)
    exact = weight_distance(adapted)
    assert all(one.l2 == 0.0 for name, one in exact.items() if not name.endswith("_proj"))
    assert all(torch.equal(tensor, state[name]) for name, tensor in adapted.state_dict().items())
    assert adapted.active_adapters == ["default"]


def test_a_lineage_of_merged_and_active_adapters_is_as_far_as_all_of_them(
    lora: Callable[..., Any], base: Path, tmp_path: Path
) -> None:
    parts = []
    for number, merged in ((1, True), (2, False)):
        to = tmp_path / "stage" / "adapters" / f"0{number}_a"
        shutil.copytree(save_adapter(lora(seed=number, r=number), base, tmp_path / f"lora{number}"), to)
        parts.append(Part(to.name, to, merged, (to.name,)))
    made = Lineage(str(base), base, sha256=weights_hashes(base), adapters=tuple(parts))
    (tmp_path / "stage" / "lineage.json").write_text(json.dumps(made.to_json()))
    expected = weight_distance(load_lineage(made_of(tmp_path / "stage").all_merged()), base)
    close(weight_distance(tmp_path / "stage", base), expected)
    close(weight_distance(made_of(tmp_path / "stage"), Lineage(str(base), base)), expected)
    close(weight_distance(load_model(tmp_path / "stage"), base), expected)
    first = weight_distance(tmp_path / "lora1", base)
    assert total(expected).l2 > 1.05 * total(first).l2


def test_a_small_delta_is_not_rounded_away_by_16_bit_weights(lora: Callable[..., Any]) -> None:
    adapted = lora().bfloat16()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float() * 3e-3  # a delta of about 1e-5 of the weight
    found = total(weight_distance(adapted))
    rounded = total(weight_distance(copy.deepcopy(adapted).merge_and_unload(), copy.deepcopy(adapted).unload()))
    assert found.l2 > 2 * rounded.l2
    assert 0 < found.relative < 1e-3


def test_a_lora_merged_in_place_is_taken_off_for_its_base(lora: Callable[..., Any]) -> None:
    adapted = lora()
    expected = weight_distance(adapted)
    adapted.merge_adapter()
    close(weight_distance(adapted), expected, rel=1e-3)
    assert adapted.base_model.model.model.layers[0].self_attn.q_proj.merged


def test_weights_that_cannot_be_compared_are_refused(
    model: Any, base: Path, lora: Callable[..., Any], make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    deeper = make_model(len(tokenizer), num_hidden_layers=3)
    with pytest.raises(DriftError, match=r"other tensors: model\.layers\.2\..* \(only in the model\).* and 6 more"):
        weight_distance(deeper, base)
    with pytest.raises(DriftError, match=r"lm_head.weight: is \[500, 16\] and the base's is"):
        weight_distance(make_model(500), base)
    with pytest.raises(DriftError, match="has none: give the base"):
        weight_distance(model)
    with pytest.raises(DriftError, match=r"embed_tokens: ModulesToSaveWrapper of PEFT"):
        weight_distance(lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    with pytest.raises(LoadError, match="nothing: no such folder"):
        weight_distance(tmp_path / "nothing", base)
    few = copy.deepcopy(model)
    few.lm_head.weight = torch.nn.Parameter(torch.zeros(len(tokenizer), 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(DriftError, match=r"lm_head.weight: is torch.int8.*few bits"):
        weight_distance(few, model)
    config = base / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}})
    )
    with pytest.raises(DriftError, match="few bits have no distance"):
        weight_distance(model, base)
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    model.config.save_pretrained(base)
    with pytest.raises(DriftError, match=r"has no \*\.safetensors"):
        weight_distance(model, base)
