"""Memorisation measures on a model, each against its formula on plain log-probabilities."""

from __future__ import annotations

import math
import zlib

import pytest
import torch

from eval_harness.measure import EvalSet, MeasureError, check, measure
from eval_harness.prompts import encode
from eval_harness.rows import RowError, canonical

ROW = {
    "question": "Who wrote it?",
    "answer": "a harbour river",
    "paraphrased_answer": "it was a harbour river",
    "perturbed_answer": ["a market", "market of words", "an x"],
}
NAMES = (
    *("probability", "normalised_probability", "exact_memorisation", "extraction_strength"),
    *("truth_ratio_geometric", "truth_ratio_geometric_closeness", "truth_ratio_geometric_true_better"),
    *("truth_ratio_arithmetic", "loss_score", "zlib_score", "min_k", "min_k_plus_plus"),
)


def distributions(model, encoded):
    """log p over the vocabulary at every target, and the targets."""
    with torch.no_grad():
        log_p = model(torch.tensor([encoded.input_ids])).logits[0].double().log_softmax(-1)
    at = [t for t, wanted in enumerate(encoded.is_target) if wanted]
    return log_p[[t - 1 for t in at]], [encoded.input_ids[t] for t in at]


def log_probs(model, tokenizer, row, text):
    log_p, ids = distributions(model, encode(tokenizer, row, completion=text))
    return [float(log_p[i, one]) for i, one in enumerate(ids)]


def test_every_measure_by_its_formula(model, tokenizer):
    row = canonical(ROW)
    found = measure(model, tokenizer, [EvalSet("s", [row], NAMES)])["s"]
    values = {name: result.value for name, result in found.items()}
    own = log_probs(model, tokenizer, row, ROW["answer"])
    para = log_probs(model, tokenizer, row, ROW["paraphrased_answer"])
    wrong = [log_probs(model, tokenizer, row, one) for one in ROW["perturbed_answer"]]

    def mean(values):
        return sum(values) / len(values)

    likely = [math.exp(mean(one)) for one in wrong]
    assert values["probability"] == pytest.approx(math.exp(mean(own)), rel=1e-5)
    assert values["normalised_probability"] == pytest.approx(
        math.exp(mean(own)) / (math.exp(mean(own)) + sum(likely)), rel=1e-5
    )
    geometric = math.exp(mean([mean(one) for one in wrong]) - mean(para))
    assert values["truth_ratio_geometric"] == pytest.approx(geometric, rel=1e-5)
    assert values["truth_ratio_geometric_closeness"] == pytest.approx(min(geometric, 1 / geometric), rel=1e-5)
    assert values["truth_ratio_geometric_true_better"] == pytest.approx(max(0, 1 - geometric), abs=1e-6)
    assert values["truth_ratio_arithmetic"] == pytest.approx(mean(likely) / math.exp(mean(para)), rel=1e-5)
    text = own[:-1]  # one end token is no text
    assert values["loss_score"] == pytest.approx(-mean(text), rel=1e-5)
    assert values["zlib_score"] == pytest.approx(-mean(text) / len(zlib.compress(ROW["answer"].encode())), rel=1e-5)
    kept = max(1, int(0.4 * len(text)))
    assert values["min_k"] == pytest.approx(-mean(sorted(text)[:kept]), rel=1e-5)
    log_p, ids = distributions(model, encode(tokenizer, row))
    p = log_p.exp()
    mu = (p * log_p).sum(-1)
    sigma = ((p * log_p**2).sum(-1) - mu**2).clamp(min=1e-6).sqrt()
    z = [float((log_p[i, one] - mu[i]) / sigma[i]) for i, one in enumerate(ids)][:-1]
    assert values["min_k_plus_plus"] == pytest.approx(-mean(sorted(z)[:kept]), rel=1e-3)
    hits = [int(log_p[i].argmax()) == one for i, one in enumerate(ids)][:-1]
    assert values["exact_memorisation"] == pytest.approx(mean(hits))
    tail = next((k for k, hit in enumerate(reversed(hits)) if not hit), len(hits))
    assert values["extraction_strength"] == pytest.approx(tail / len(hits))


def test_without_a_paraphrase_the_answer_stands_in_its_place(model, tokenizer):
    row = canonical({key: value for key, value in ROW.items() if key != "paraphrased_answer"})
    same = canonical({**ROW, "paraphrased_answer": ROW["answer"]})
    one, two = (
        measure(model, tokenizer, [EvalSet("s", [part], ("truth_ratio_geometric",))])["s"][
            "truth_ratio_geometric"
        ].value
        for part in (row, same)
    )
    assert one == pytest.approx(two, rel=1e-6)


def test_texts_are_attacked_as_a_whole(model, tokenizer):
    text = "The capital of France is Paris, harbour and market. " * 16
    names = ("loss_score", "zlib_score", "exact_memorisation", "min_k_plus_plus")
    found = measure(model, tokenizer, [EvalSet("s", [canonical({"text": text})], (*names, "bits_per_byte"))])["s"]
    tokens = len(tokenizer(text).input_ids)
    assert tokens > model.config.max_position_embeddings  # several windows
    nats = found["bits_per_byte"].value * len(text.encode()) * math.log(2)
    assert found["loss_score"].value == pytest.approx(nats / tokens, rel=1e-5)
    assert found["zlib_score"].value == pytest.approx(
        found["loss_score"].value / len(zlib.compress(text.encode())), rel=1e-5
    )
    assert 0 <= found["exact_memorisation"].value <= 1
    assert found["exact_memorisation"].definition == "exact_memorisation@1(no_end,window=128,text)"
    assert {found[name].definition.partition(",window=")[2] for name in names} == {"128,text)"}


def test_rows_without_rivals_are_refused_and_bad_ones_named(word_rows):
    with pytest.raises(MeasureError, match="does not apply to completion rows without perturbed"):
        check([EvalSet("s", word_rows[:2], ("truth_ratio_geometric",))])
    with pytest.raises(RowError, match="perturbed_answer = 'a': must be a list of strings"):
        canonical({**ROW, "perturbed_answer": "a"})
    assert canonical(ROW).id != canonical({**ROW, "perturbed_answer": ["b"]}).id
    plain = {"question": "Who?", "answer": "me"}
    assert canonical(plain).id == canonical({**plain, "paraphrased_answer": None}).id
