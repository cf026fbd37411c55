"""Sampling that depends on nothing but seed and prompt; stop strings that end each row for itself."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from eval_harness.errors import ScoringError
from eval_harness.generation import Generation, generate

PROMPTS = ["word 1 of 10", "word 22 of 10", "Say harbour twice: harbour", "x"]


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [tokenizer(text).input_ids for text in PROMPTS]


def test_a_sample_depends_on_seed_and_prompt_alone(model, tokenizer, prompts):
    how = Generation(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=1)
    together = generate(model, tokenizer, prompts, how)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    assert together == [generate(model, tokenizer, [one], how, batch_tokens=1)[0] for one in prompts]
    assert torch.equal(torch.random.get_rng_state(), state)  # the process's own generator is not used
    assert together != generate(model, tokenizer, prompts, Generation(max_new_tokens=12, temperature=1.0, seed=2))
    assert together != generate(model, tokenizer, prompts, 12)


def test_samples_follow_the_distribution(model, tokenizer, prompts):
    with torch.no_grad():
        logits = model(torch.tensor([prompts[0]])).logits[0, -1].double()
    warm = (logits / 2.0).softmax(-1)
    best = [int(i) for i in warm.topk(4).indices]
    drawn = Counter(
        generate(model, tokenizer, [prompts[0]], Generation(1, temperature=2.0, top_k=4, seed=s))[0][0]
        for s in range(300)
    )
    assert set(drawn) <= set(best)
    total = float(warm[best].sum())
    for token in best:
        p = float(warm[token]) / total
        assert abs(drawn[token] / 300 - p) < 4 * (p * (1 - p) / 300) ** 0.5 + 1e-9


def test_a_stop_string_ends_its_row_only(model, tokenizer, prompts):
    free = generate(model, tokenizer, prompts, 24)
    texts = [tokenizer.decode(ids) for ids in free]
    stop = texts[0][4:7]  # three characters that the first row writes in its midst
    assert len(stop) == 3
    found = generate(model, tokenizer, prompts, Generation(24, stop=(stop, "never written")))
    for ids, whole in zip(found, free, strict=True):
        text = tokenizer.decode(whole)
        expected = next((k for k in range(1, len(whole) + 1) if stop in tokenizer.decode(whole[:k])), len(whole))
        assert ids == whole[:expected], text
    assert len(found[0]) < len(free[0])
    assert found == [generate(model, tokenizer, [one], Generation(24, stop=(stop,)))[0] for one in prompts]


def test_a_stop_string_may_be_a_special_token(model, make_tokenizer, prompts):
    """As where an instruction-tuned model ends its turn by another token than eos: in the text it never stands."""
    tokenizer = make_tokenizer()
    free = generate(model, tokenizer, prompts, 12)
    ends_turn = free[0][3]
    name = tokenizer.convert_ids_to_tokens(ends_turn)
    tokenizer.add_special_tokens({"additional_special_tokens": [name]})
    assert name in tokenizer.all_special_tokens
    found = generate(model, tokenizer, prompts, Generation(12, stop=(name,)))
    for ids, whole in zip(found, free, strict=True):
        assert ids == whole[: whole.index(ends_turn) + 1 if ends_turn in whole else len(whole)]
    assert len(found[0]) <= 4


def test_settings_that_cannot_be_are_all_named():
    bad = Generation(0, stop=("",), temperature=-1, top_p=0, top_k=-1)
    said = list(bad.problems())
    assert [line.split(" ")[0] for line in said] == ["max_new_tokens", "stop", "temperature", "top_p", "top_k"]
    assert list(Generation(top_k=5).problems()) == [
        "top_p and top_k need a temperature above 0: greedy generation ignores them"
    ]
    assert not list(Generation(4, stop=("\n",), temperature=0.7, top_p=0.9).problems())
    with pytest.raises(ValueError, match="needs max_new_tokens"):
        generate(None, None, [[1]], Generation())


def test_a_definition_says_what_is_not_the_default():
    assert Generation().definition() == "greedy"
    assert Generation(32).definition() == "new=32"
    one, two = Generation(32, stop=("\n",)).definition(), Generation(32, stop=("\n\n",)).definition()
    assert one != two
    assert one.startswith("new=32,stop=1:")
    assert Generation(8, temperature=0.5, seed=3).definition() == "new=8,t=0.5,seed=3"
    assert Generation(8, temperature=1).definition() == Generation(8, temperature=1.0).definition() == "new=8,t=1"


def test_a_model_of_nans_is_an_error_and_not_a_text(make_model, tokenizer, prompts):
    broken = make_model(len(tokenizer))
    with torch.no_grad():
        broken.lm_head.weight[9] = float("nan")
    with pytest.raises(ScoringError, match="the logits are NaN"):
        generate(broken, tokenizer, prompts, 4)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_an_adapted_model_writes_by_our_settings_and_keeps_its_own(make_model, tokenizer, prompts, task_type):
    """PEFT's two wrappers hand the generation config down in two ways."""
    from peft import LoraConfig, get_peft_model

    base = make_model(len(tokenizer))
    base.generation_config.repetition_penalty = 5.0
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type=task_type)  # B is zero: it says what the base says
    adapted, own = get_peft_model(base, config).eval(), base.generation_config
    found = generate(adapted, tokenizer, prompts, 6)
    assert base.generation_config is own
    assert found == generate(adapted.unload(), tokenizer, prompts, 6)
    assert "generation_config" not in vars(adapted)
