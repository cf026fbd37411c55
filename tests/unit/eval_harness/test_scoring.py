"""Scoring: against a slow loop, whatever the batches; generation against a step-by-step arg max."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from eval_harness import scoring
from eval_harness.errors import Interrupted
from eval_harness.generation import generate
from eval_harness.loading import LoadError, TokenizerError, check_tokenizer, load
from eval_harness.prompts import Encoded
from eval_harness.scoring import ScoringError, batches, score


def sequence(ids, targets):
    return Encoded(list(ids), [i in targets for i in range(len(ids))])


def random_sequences(seed, count=12, vocabulary=300):
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        length = int(torch.randint(2, 40, (), generator=generator))
        ids = torch.randint(5, vocabulary, (length,), generator=generator).tolist()
        start = int(torch.randint(1, length, (), generator=generator))
        out.append(sequence(ids, range(start, length)))
    return out


def slow(model, one):
    """One sequence, no padding, the model's own logits, one token at a time."""
    log_probs, hits = [], []
    with torch.no_grad():
        logits = model(torch.tensor([one.input_ids]), use_cache=False).logits[0].double()
    for position, token in enumerate(one.input_ids):
        if one.is_target[position] and position > 0:
            before = logits[position - 1]
            log_probs.append(float(before[token] - torch.logsumexp(before, 0)))
            hits.append(int(before.argmax()) == token)
    return log_probs, hits


def test_against_the_slow_loop(model):
    sequences = random_sequences(0)
    for one, found in zip(sequences, score(model, sequences), strict=True):
        log_probs, hits = slow(model, one)
        assert found.log_probs == pytest.approx(log_probs, abs=1e-5)
        assert found.tokens == len(log_probs)
        assert found.log_prob == pytest.approx(sum(log_probs), abs=1e-4)
        assert found.hits == hits


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(12)), batch_tokens=st.integers(1, 600))
def test_order_and_batch_size_change_nothing(model, order, batch_tokens):
    sequences = random_sequences(1)
    expected = score(model, sequences)
    found = score(model, [sequences[i] for i in order], batch_tokens=batch_tokens)
    for i, one in zip(order, found, strict=True):
        assert one.log_probs == pytest.approx(expected[i].log_probs, abs=1e-5)
        assert one.hits == expected[i].hits


def test_head_on_hidden_states_equals_full_logits(model, monkeypatch):
    sequences = random_sequences(2)
    with torch.no_grad():
        assert scoring._reader(model, [5, 6, 7]).__qualname__.startswith("_gathered_logits")
    short = score(model, sequences)
    monkeypatch.setattr(scoring, "_reader", lambda model, ids: scoring._all_logits(model))
    for one, other in zip(short, score(model, sequences), strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-6)


def test_small_chunks_of_the_vocabulary_change_nothing(model, monkeypatch):
    sequences = random_sequences(3)
    expected = score(model, sequences)
    monkeypatch.setattr(scoring, "LEAST_CHUNK", 3 * model.config.vocab_size)
    with torch.no_grad():
        whole = scoring._reader(model, [5, 6, 7])
        ids = torch.full((1, 8), 7)
        at = torch.arange(7)
        parts = list(whole({"input_ids": ids}, torch.zeros_like(at), at))
    assert [len(part) for part in parts] == [3, 3, 1]
    for one, other in zip(score(model, sequences), expected, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-6)


def test_models_that_change_their_logits_are_scored_by_their_own(tokenizer):
    from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"vocab_size": 320, "initializer_range": 0.4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    capped = Gemma2ForCausalLM(Gemma2Config(**shape, head_dim=8, final_logit_softcapping=1.0)).eval()
    scaled = CohereForCausalLM(CohereConfig(**shape, logit_scale=0.1)).eval()
    sequences = random_sequences(4, count=4)
    for model in (capped, scaled):
        for one, found in zip(sequences, score(model, sequences), strict=True):
            assert found.log_probs == pytest.approx(slow(model, one)[0], abs=1e-5)


def test_a_cap_is_seen_in_the_config_where_the_first_logits_are_too_small_to_show_it():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma2Config(**shape, vocab_size=320, num_key_value_heads=2, head_dim=8, initializer_range=1e-4)
    model = Gemma2ForCausalLM(config).eval()
    assert config.final_logit_softcapping == 30.0
    with torch.no_grad():
        assert scoring._reader(model, [5, 6, 7]).__qualname__.startswith("_all_logits")


def test_a_cap_is_seen_in_the_text_part_of_a_composite_config():
    from transformers import Gemma3Config

    for cap, changes in ((30.0, True), (None, False)):
        composite = Gemma3Config(text_config={"final_logit_softcapping": cap})
        assert scoring._config_changes_logits(SimpleNamespace(config=composite)) is changes


def test_a_lora_model_is_scored_with_its_adapter(make_model):
    from peft import LoraConfig, get_peft_model

    base = make_model(320)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    sequences = random_sequences(5, count=4)
    with torch.no_grad():
        assert scoring._reader(adapted, [5, 6]).__qualname__.startswith("_gathered_logits")
    found = score(adapted, sequences)
    with adapted.disable_adapter():
        plain = score(adapted, sequences)
    for one, with_adapter, without in zip(sequences, found, plain, strict=True):
        assert with_adapter.log_probs == pytest.approx(slow(adapted, one)[0], abs=1e-5)
        assert abs(with_adapter.log_prob - without.log_prob) > 1e-3


def test_too_long_sequences_are_none_and_a_first_token_is_not_scored(model):
    limit = model.config.max_position_embeddings
    fits, too_long = sequence([7] * (limit + 1), {limit}), sequence([7] * (limit + 2), {1, limit + 1})
    tail = sequence([7] * (limit + 9), {limit})  # what follows the last target need not be read
    found = score(model, [too_long, fits, tail, sequence([7, 8], {0, 1}), sequence([7, 8], {0})])
    assert found[0] is None
    assert [one.tokens for one in found[1:]] == [1, 1, 1, 0]
    assert found[1].log_probs == pytest.approx(found[2].log_probs, abs=1e-6)
    assert score(model, [too_long]) == [None]
    assert score(model, []) == []


def test_dropout_is_off_and_flags_are_restored(make_model):
    model = make_model(320, attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    sequences = random_sequences(6, count=4)
    assert score(model, sequences) == score(model, sequences)
    assert [module.training for module in model.modules()] == flags
    assert True in flags
    assert False in flags


def test_nan_is_an_error_that_names_the_model(make_model):
    broken = make_model(320)
    torch.nn.init.constant_(broken.model.norm.weight, math.nan)
    with pytest.raises(ScoringError, match=r"LlamaForCausalLM: the logits are NaN"):
        score(broken, random_sequences(7, count=2))


def test_stopping_and_progress(model):
    sequences, seen = random_sequences(8), []
    score(model, sequences, batch_tokens=60, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (12, 12)
    assert len(seen) > 3
    asked = []
    with pytest.raises(Interrupted):
        score(model, sequences, batch_tokens=60, should_stop=lambda: bool(asked.append(1)) or len(asked) == 3)
    assert len(asked) == 3
    with pytest.raises(Interrupted):
        generate(model, Ends(), [[7, 8]], 3, should_stop=lambda: True)


@given(lengths=st.lists(st.integers(1, 50), max_size=30), budget=st.integers(1, 200))
def test_batches_hold_everything_once_within_the_budget(lengths, budget):
    found = list(batches(range(len(lengths)), lengths, budget))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


class Ends:
    """Where generation stops: all that it asks of a tokenizer."""

    def __init__(self, eos_token_id=None):
        self.eos_token_id = eos_token_id


def slow_greedy(model, prompt, new_tokens, ends):
    ids = list(prompt)
    for _ in range(new_tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_tokens", [1, 60, 8192])
def test_generation_is_the_arg_max_step_by_step(make_model, batch_tokens):
    model = make_model(60, seed=3)
    prompts = [one.input_ids for one in random_sequences(9, vocabulary=60)]
    free = [slow_greedy(model, prompt, 8, ()) for prompt in prompts]
    counts = [token for ids in free for token in ids]
    ends = sorted(set(counts), key=counts.count)[-2:]  # tokens that do occur, so that some rows end early
    model.generation_config.eos_token_id = [ends[0]]
    model.generation_config.repetition_penalty = 5.0  # must not be used
    found = generate(model, Ends(ends[1]), prompts, 8, batch_tokens=batch_tokens)
    assert found == [slow_greedy(model, prompt, 8, ends) for prompt in prompts]
    assert len({len(ids) for ids in found}) > 1
    assert model.generation_config.repetition_penalty == 5.0


def test_generation_stops_at_the_context_whatever_the_neighbours(make_model):
    model = make_model(60, seed=3, max_position_embeddings=16)
    prompts = [[7] * 4, [8] * 14, [9] * 15]
    together = generate(model, Ends(), prompts, 6)
    assert [len(ids) for ids in together] == [6, 2, 1]
    assert together == [generate(model, Ends(), [prompt], 6)[0] for prompt in prompts]
    for prompt in ([], [7] * 16):
        with pytest.raises(ScoringError, match=rf"prompts\[1\] has {len(prompt)} tokens.*16 tokens"):
            generate(model, Ends(), [[7], prompt], 6)


@pytest.fixture
def checkpoint(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_a_loaded_checkpoint_scores_the_same(checkpoint, model, tokenizer):
    loaded = load(checkpoint, device="cpu")
    sequences = random_sequences(10, count=3)
    assert not loaded.model.training
    assert loaded.tokenizer.chat_template == tokenizer.chat_template
    assert score(loaded.model, sequences) == score(model, sequences)


def test_what_is_no_checkpoint_says_what_is_missing(checkpoint, tmp_path, model):
    for place, said in [
        (tmp_path / "nothing", "no such folder"),
        ("./nothing", "no such folder"),
        (checkpoint / "config.json", "is a file"),
        (tmp_path, r"no config\.json \(found m\)"),
        ("nobody/no-such-model", "the model cannot be loaded"),
    ]:
        with pytest.raises(LoadError, match=said):
            load(place)
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(LoadError, match="the model cannot be loaded"):
        load(checkpoint)
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del whole["model.layers.0.mlp.up_proj.weight"]
    save_file(whole, weights, metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"1 tensors are missing.*layers\.0\.mlp\.up_proj"):
        load(checkpoint)
    weights.unlink()
    with pytest.raises(LoadError, match="no weights"):
        load(checkpoint)


def test_missing_and_broken_tokenizers(checkpoint):
    (checkpoint / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(LoadError, match="the tokenizer cannot be loaded"):
        load(checkpoint)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    with pytest.raises(LoadError, match="no tokenizer"):
        load(checkpoint)


def test_check_tokenizer(make_tokenizer):
    check_tokenizer(make_tokenizer())
    unpadded = make_tokenizer()
    unpadded.pad_token = None
    with pytest.raises(TokenizerError, match=r"no pad token: set tokenizer\.pad_token.*'<\|end\|>'"):
        check_tokenizer(unpadded)
    with pytest.raises(TokenizerError, match=r"'<\|pad\|>' is its unknown token"):
        check_tokenizer(make_tokenizer(unk_token="<|pad|>"))


def test_nan_in_the_weights_is_found_before_anything_is_scored(checkpoint, make_model, tokenizer):
    """One entry of a query matrix: short prompts of this model would score as if nothing were wrong."""
    broken = make_model(len(tokenizer))
    with torch.no_grad():
        broken.model.layers[0].self_attn.q_proj.weight[0, 0] = math.nan
    broken.save_pretrained(checkpoint)
    with pytest.raises(LoadError, match=r"NaN in 1 tensors: model\.layers\.0\.self_attn\.q_proj\.weight"):
        load(checkpoint, device="cpu")


def test_a_device_that_is_not_here_is_named(checkpoint):
    with pytest.raises(LoadError, match="device 'tpu9' is none that torch knows"):
        load(checkpoint, device="tpu9")
    with pytest.raises(LoadError, match="device 'cuda:99' is not here: torch sees"):
        load(checkpoint, device="cuda:99")
