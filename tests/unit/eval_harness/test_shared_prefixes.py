"""Continuations of one prefix in one row: equal to each alone, refused where a model cannot, halved if too large."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch

from eval_harness import scoring
from eval_harness.errors import ScoringError
from eval_harness.prompts import Encoded
from eval_harness.scoring import fitting_tokens, halving, score

SHAPE = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 2}


def questions(count=6, seed=0, vocabulary=300):
    """Prefixes with two to five continuations each; some are prefixes of another, some a single token."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high):
        size = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(5, vocabulary, (size,), generator=generator).tolist()

    out = []
    for number in range(count):
        prefix = ids(4, 20)
        choices = [ids(1, 6) for _ in range(2 + number % 3)]
        choices.append(choices[0] + ids(1, 3))
        out += [Encoded([*prefix, *one], [False] * len(prefix) + [True] * len(one), 0) for one in choices]
    return out


def rows_made(model, sequences):
    with torch.no_grad():
        return scoring._rows(model, sequences, range(len(sequences)))


def alone(model, sequences, **how):
    return [score(model, [one], **how)[0] for one in sequences]


def test_shared_equals_alone(model):
    sequences = questions()
    assert sum(bool(row.branches) for row in rows_made(model, sequences)) == 6
    for tokens in (1, 60, None):
        found = score(model, sequences, statistics=True, batch_tokens=tokens)
        for one, expected in zip(found, alone(model, sequences, statistics=True), strict=True):
            assert one.log_probs == pytest.approx(expected.log_probs, rel=1e-5, abs=1e-6)
            assert one.hits == expected.hits
            assert one.ranks == expected.ranks
            assert one.means == pytest.approx(expected.means, rel=1e-5)
            assert one.variances == pytest.approx(expected.variances, rel=1e-4)


def test_a_shared_prefix_runs_once(model):
    sequences = questions()
    score(model, sequences)  # what a few tokens tell of the model is known from here on
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda m, i, out: seen.append(out.shape[0] * out.shape[1])
    )
    score(model, sequences, batch_tokens=1)  # one row a batch: no padding
    hook.remove()
    tokens = sum(seen)
    prefixes = {tuple(one.input_ids[: one.start]) for one in sequences}
    answers = sum(len(one.input_ids) - one.start - 1 for one in sequences)  # a last token predicts nothing
    assert tokens == sum(map(len, prefixes)) + answers
    assert tokens < 0.7 * sum(len(one.input_ids) for one in sequences)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_other_models_and_kernels(kernel):
    from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4)).eval()
    windowed = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=12, initializer_range=0.4)).eval()
    sequences = questions(seed=1)
    for model in (gpt2, windowed):
        model.set_attn_implementation(kernel)
        made = rows_made(model, sequences)
        longest = [max(len(sequences[i].input_ids) for i in row.members) for row in made if row.branches]
        assert longest  # some share
        if model is windowed:
            assert max(longest) <= 12 < max(len(one.input_ids) for one in sequences)  # a window is left to the model
        for one, expected in zip(score(model, sequences), alone(model, sequences), strict=True):
            assert one.log_probs == pytest.approx(expected.log_probs, rel=1e-5, abs=1e-6)


def test_a_recurrent_model_shares_nothing():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=320, hidden_size=16, num_hidden_layers=1, state_size=4, initializer_range=0.4)
    model = MambaForCausalLM(config).eval()
    sequences = questions(count=2)
    assert not any(row.branches for row in rows_made(model, sequences))
    for one, expected in zip(score(model, sequences), alone(model, sequences), strict=True):
        assert one.log_probs == pytest.approx(expected.log_probs, rel=1e-4, abs=1e-5)


def test_a_model_that_leaks_between_branches_is_found(model, monkeypatch):
    causal = scoring._inputs

    def leaking(model, rows):
        inputs = causal(model, rows)
        if rows[0].branches:
            size = inputs["attention_mask"].shape[-1]
            inputs["attention_mask"] = torch.ones(1, 1, size, size, dtype=torch.bool).tril()
        return inputs

    with torch.no_grad():
        assert scoring._can_branch(model, [5, 6, 7, 8])
        monkeypatch.setattr(scoring, "_inputs", leaking)
        assert not scoring._can_branch(model, [5, 6, 7, 8])


def test_a_model_is_tried_once_for_each_way_it_computes_and_not_kept(make_model, monkeypatch):
    tried = []

    def counted(trait):
        def ask(model, ids):
            tried.append(trait.__name__)
            return trait(model, ids)

        ask.__name__ = trait.__name__
        return ask

    for trait in (scoring._can_branch, scoring._is_head_on_hidden):
        monkeypatch.setattr(scoring, trait.__name__, counted(trait))
    model, sequences = make_model(320), questions(count=2)
    for change in (None, "eager", torch.float64):
        if isinstance(change, str):
            model.set_attn_implementation(change)
        elif change is not None:
            model.to(change)
        tried.clear()
        first = score(model, sequences)
        assert score(model, sequences) == first
        assert sorted(tried) == ["_can_branch", "_is_head_on_hidden"]
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None


def test_a_learned_prompt_may_come_and_go(make_model):
    """With it on, the ids are not all that the model reads; with it off they are."""
    from peft import PromptTuningConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(make_model(320), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    sequences = questions(count=2)
    with model.disable_adapter():
        off = score(model, sequences)
        plain = score(model.get_base_model(), sequences)
        assert [one.log_probs for one in off] == [pytest.approx(one.log_probs) for one in plain]
    on = score(model, sequences)
    for one, found in zip(sequences, on, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([one.input_ids])).logits[0, 3:].log_softmax(-1)
        expected = [float(logits[t - 1, one.input_ids[t]]) for t in range(one.start, len(one.input_ids))]
        assert found.log_probs == pytest.approx(expected, rel=1e-4)


def test_statistics_by_definition(model):
    one = questions()[1]
    (found,) = score(model, [one], statistics=True)
    with torch.no_grad():
        log_p = model(torch.tensor([one.input_ids])).logits[0].double().log_softmax(-1)
    for i, t in enumerate(range(one.start, len(one.input_ids))):
        row, p = log_p[t - 1], log_p[t - 1].exp()
        mean = float((p * row).sum())
        assert found.means[i] == pytest.approx(mean, rel=1e-5)
        assert found.entropies[i] == pytest.approx(-mean, rel=1e-5)
        assert found.variances[i] == pytest.approx(float((p * row**2).sum()) - mean**2, rel=1e-3)
        assert found.ranks[i] == int((row > row[one.input_ids[t]]).sum())
    assert score(model, [one])[0].ranks is None


def test_texts_with_one_first_token_are_not_one_row(model):
    texts = [Encoded([2, *range(10 + i, 30 + i)], [False] + [True] * 20, 0) for i in range(8)]
    assert not any(row.branches for row in rows_made(model, texts))


def test_many_continuations_become_several_rows(model):
    sequences = [Encoded([*range(10, 50), *[i] * 10], [False] * 40 + [True] * 10, 0) for i in range(60, 120)]
    made = rows_made(model, sequences)
    sizes = [len(row.members) for row in made]
    assert sum(sizes) == 60
    assert 2 <= max(sizes) < 60  # attention over all of them would cost more than it saves
    for one, expected in zip(score(model, sequences), alone(model, sequences), strict=True):
        assert one.log_probs == pytest.approx(expected.log_probs, rel=1e-5)


def test_a_batch_that_does_not_fit_is_halved(model, monkeypatch):
    sequences = questions(seed=3)
    expected = score(model, sequences)
    whole, sizes = scoring._score_rows, []

    def scarce(model, rows, reader, statistics):
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(model, rows, reader, statistics)

    monkeypatch.setattr(scoring, "_score_rows", scarce)
    assert [one.log_probs for one in score(model, sequences)] == [
        pytest.approx(one.log_probs, rel=1e-5) for one in expected
    ]
    assert max(sizes) > 2


def test_one_item_that_does_not_fit_and_other_errors():
    def work(batch):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")

    with pytest.raises(ScoringError, match="one sequence alone does not fit in memory"):
        halving(work, [1, 2])

    def broken(batch):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        halving(broken, [1, 2])


def test_the_memory_bound_follows_free_memory_and_the_poorest_rank(model, monkeypatch):
    class Three:
        rank, world = 0, 3

        def gather(self, part):
            return [part, part // 4, part]

    assert fitting_tokens(model) == 512
    per_token = 4 * (16 * model.config.hidden_size + 4 * model.config.intermediate_size)
    monkeypatch.setattr(scoring, "free_memory", lambda device: 800 * per_token)
    assert fitting_tokens(model) == 400
    assert fitting_tokens(model, Three()) == 256
    monkeypatch.setattr(scoring, "free_memory", lambda device: 0)
    assert fitting_tokens(model) == 256


def test_a_nan_in_one_branch_is_an_error(make_model):
    broken = make_model(320)
    with torch.no_grad():
        broken.lm_head.weight[7] = math.nan
    with pytest.raises(ScoringError, match="NaN"):
        score(broken, questions(count=1))
