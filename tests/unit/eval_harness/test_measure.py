"""Measures: one pass equals generation, and every value equals one computed plainly from the model's logits."""

from __future__ import annotations

import math

import pytest
import torch

from eval_harness.errors import Interrupted
from eval_harness.measure import (
    MEASURES,
    EvalSet,
    MeasureError,
    Prepared,
    default_measures,
    measure,
)
from eval_harness.measures.texts import surviving_bytes
from eval_harness.prompts import Prompting, encode
from eval_harness.rows import canonical

PLAIN = Prompting(chat_template="none")
CHOICES = [
    {"question": f"Say word {i}:", "choices": ["river", "harbour", "a market of words", "x"], "answer_index": i % 4}
    for i in range(24)
]
TEXTS = ["The capital of France is Paris.", "river, harbour, market " * 40, "é 12"]


def token_log_probs(model, ids):
    """log p(ids[t] | before) for t >= 1, from one unpadded pass."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    return [float(logits[t - 1, ids[t]]) for t in range(1, len(ids))]


def test_one_pass_equals_generation(half_taught, tokenizer, word_rows):
    sets = [
        EvalSet("one", word_rows, ("exact_match",)),
        EvalSet("two", word_rows, ("exact_match",), exact_match="generate"),
    ]
    found = measure(half_taught, tokenizer, sets)
    one, two = found["one"]["exact_match"], found["two"]["exact_match"]
    assert one.n == two.n == 120
    assert 12 <= sum(one.per_item.values()) <= 108  # some right, some wrong: the comparison means something
    assert one.per_item == two.per_item
    assert one.definition.startswith("exact_match@1(one_pass,chat:")
    assert two.definition == one.definition.replace("one_pass", "generate,greedy")


def test_one_pass_equals_generation_in_plain_style(half_taught, tokenizer, word_rows):
    # The model was taught in chat style; in plain style it is wrong, in both ways of measuring.
    sets = [
        EvalSet("one", word_rows, ("exact_match",), prompting=PLAIN),
        EvalSet("two", word_rows, ("exact_match",), exact_match="generate", prompting=PLAIN),
    ]
    found = measure(half_taught, tokenizer, sets)
    assert found["one"]["exact_match"].per_item == found["two"]["exact_match"].per_item
    assert found["one"]["exact_match"].definition == "exact_match@1(one_pass,plain)"


def test_an_answer_that_goes_on_is_not_exact(half_taught, tokenizer, word_rows):
    # The model writes "harbour", in three tokens: "harbo" has all its tokens right and misses its end.
    one = measure(half_taught, tokenizer, [EvalSet("s", word_rows)])["s"]["exact_match"].per_item
    right = [row for row in word_rows if row.completion == "harbour" and one[row.id]]
    cut = [canonical({"prompt": row.prompt, "completion": "harbo"}) for row in right]
    assert cut
    assert tokenizer("harbo").input_ids == tokenizer("harbour").input_ids[:2]
    for how in ("one_pass", "generate"):
        found = measure(half_taught, tokenizer, [EvalSet("s", cut, ("exact_match",), exact_match=how)])
        assert found["s"]["exact_match"].value == 0


def test_answer_loss_is_the_plain_mean_per_token(model, tokenizer, word_rows):
    rows = word_rows[:10]
    found = measure(model, tokenizer, [EvalSet("s", rows)])["s"]["answer_loss"]
    expected = []
    for row in rows:
        encoded = encode(tokenizer, row)
        log_probs = token_log_probs(model, encoded.input_ids)
        wanted = [log_probs[t - 1] for t, is_target in enumerate(encoded.is_target) if is_target]
        expected.append(-sum(wanted) / len(wanted))
    assert list(found.per_item.values()) == pytest.approx(expected, abs=1e-5)
    assert found.value == pytest.approx(sum(expected) / 10, abs=1e-5)
    assert (found.n, found.higher_is_better) == (10, False)


@pytest.mark.parametrize("style", ["auto", "none"])
def test_acc_sums_the_text_without_the_end(model, tokenizer, style):
    rows = [canonical(raw) for raw in CHOICES]
    found = measure(model, tokenizer, [EvalSet("s", rows, prompting=Prompting(style))], batch_tokens=100)["s"]
    expected = []
    for row in rows:
        totals = []
        for choice in row.choices:
            encoded = encode(tokenizer, row, style, completion=choice)
            end = max(t for t, is_target in enumerate(encoded.is_target) if is_target)  # the one end token
            assert encoded.input_ids[end] == tokenizer.eos_token_id
            totals.append(sum(token_log_probs(model, encoded.input_ids)[encoded.start - 1 : end - 1]))
        expected.append(float(row.choices[totals.index(max(totals))] == row.completion))
    accuracy = found["acc"]
    assert list(accuracy.per_item.values()) == expected
    assert 0 < accuracy.value < 1
    assert accuracy.note == "chance level 0.25"
    # Scored among choices or alone, the row's own answer has one loss.
    alone = measure(model, tokenizer, [EvalSet("s", rows, ("answer_loss",), prompting=Prompting(style))])["s"][
        "answer_loss"
    ]
    assert alone.value == pytest.approx(found["answer_loss"].value, abs=1e-5)


def test_a_tie_goes_to_the_first_choice(make_model, tokenizer):
    even = make_model(len(tokenizer))
    torch.nn.init.zeros_(even.lm_head.weight)  # every token has the same probability
    raw = {"question": "Which?", "choices": ["1", "2"]}
    rows = [canonical({**raw, "answer_index": 0}), canonical({**raw, "answer_index": 1})]
    found = measure(even, tokenizer, [EvalSet("s", rows, ("acc", "answer_loss"))])["s"]
    assert list(found["acc"].per_item.values()) == [1.0, 0.0]
    assert found["answer_loss"].value == pytest.approx(math.log(len(tokenizer)), abs=1e-6)


def test_bits_per_byte_over_windows(model, tokenizer):
    rows = [canonical({"text": text}) for text in TEXTS]
    found = measure(model, tokenizer, [EvalSet("s", rows, ("bits_per_byte", "lost_bytes_share"))])["s"]
    window, bits, sizes = model.config.max_position_embeddings, [], []
    for text in TEXTS:
        stream = [tokenizer.eos_token_id, *tokenizer(text).input_ids]
        nats = 0.0
        for at in range(0, len(stream) - 1, window - 1):
            nats -= sum(token_log_probs(model, stream[at : at + window]))
        bits.append(nats / math.log(2))
        sizes.append(len(text.encode()))
    result = found["bits_per_byte"]
    assert len(tokenizer(TEXTS[1]).input_ids) > window  # several windows
    assert result.value == pytest.approx(sum(bits) / sum(sizes), rel=1e-5)
    assert list(result.per_item.values()) == pytest.approx([b / s for b, s in zip(bits, sizes, strict=True)], rel=1e-5)
    spread = sum((b - result.value * s) ** 2 for b, s in zip(bits, sizes, strict=True))
    assert result.stderr == pytest.approx(math.sqrt(3 / 2 * spread) / sum(sizes), rel=1e-5)
    assert (result.note, found["lost_bytes_share"].value) == (None, 0.0)
    assert result.definition == f"bits_per_byte@1(window={window},surviving_bytes)"


def test_an_even_model_needs_log2_of_the_vocabulary_per_token(make_model, tokenizer):
    even = make_model(len(tokenizer))
    torch.nn.init.zeros_(even.lm_head.weight)
    found = measure(even, tokenizer, [EvalSet("s", [canonical({"text": "é 12"})])])["s"]["bits_per_byte"]
    tokens = len(tokenizer("é 12").input_ids)
    assert found.value == pytest.approx(tokens * math.log2(len(tokenizer)) / 5, rel=1e-6)  # é has two bytes
    assert found.stderr is None


def test_lost_bytes_are_counted_and_left_out(make_tokenizer, make_model):
    from tokenizers import Regex, normalizers

    lossy = make_tokenizer()
    lossy.backend_tokenizer.normalizer = normalizers.Replace(Regex("[+=]"), "")
    model = make_model(len(lossy))
    rows = [canonical({"text": "12+30=42 ok"}), canonical({"text": "++"})]
    found = measure(model, lossy, [EvalSet("s", rows, ("bits_per_byte", "lost_bytes_share"))])["s"]
    assert found["lost_bytes_share"].value == pytest.approx(4 / 13)
    assert list(found["lost_bytes_share"].per_item.values()) == pytest.approx([2 / 11, 1.0])
    bits = found["bits_per_byte"]
    stream = [lossy.eos_token_id, *lossy("123042 ok").input_ids]
    assert bits.value == pytest.approx(-sum(token_log_probs(model, stream)) / math.log(2) / 9, rel=1e-5)
    assert (bits.n, bits.excluded) == (1, {"no_byte_survives": 1})
    assert "loses 30.77%" in bits.note


@pytest.mark.parametrize(
    ("text", "decoded", "size"), [("12+3=é", "12 3 é", 5), ("abc", "abc", 3), ("a", "", 0), ("☃a", "<unk>a", 1)]
)
def test_surviving_bytes_by_hand(text, decoded, size):
    assert surviving_bytes(text, decoded) == size


def test_too_long_rows_are_excluded_and_counted(model, tokenizer, word_rows):
    long = canonical({"prompt": "word " * 200, "completion": "river"})
    choices = canonical({"question": "Say:", "choices": ["river", "x " * 200], "answer_index": 0})
    sets = [EvalSet("words", [word_rows[0], long]), EvalSet("generated", [long], exact_match="generate")]
    found = measure(model, tokenizer, [*sets, EvalSet("choices", [choices])])
    assert (found["words"]["answer_loss"].n, found["words"]["answer_loss"].excluded) == (1, {"longer_than_context": 1})
    none = found["generated"]["exact_match"]
    assert (none.value, none.n, none.excluded) == (None, 0, {"longer_than_context": 1})
    assert found["choices"]["acc"].excluded == {"longer_than_context": 1}


def test_conversations_are_exact_when_every_turn_is(half_taught, tokenizer, word_rows):
    pairs = [
        ({"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.completion})
        for row in word_rows[:40]
    ]
    chats = [canonical({"messages": list(pair)}) for pair in pairs]
    sets = [EvalSet("chats", chats), EvalSet("rows", word_rows[:40])]
    found = measure(half_taught, tokenizer, sets)
    for name in ("exact_match", "answer_loss"):
        chat, row = found["chats"][name], found["rows"][name]
        assert list(chat.per_item.values()) == pytest.approx(list(row.per_item.values()), abs=1e-5)


def test_batches_and_neighbours_change_nothing(model, tokenizer, word_rows):
    rows = [canonical(raw) for raw in CHOICES]
    sets = [EvalSet("choices", rows), EvalSet("words", word_rows[:30])]
    together = measure(model, tokenizer, sets, batch_tokens=8192)
    for one in sets:
        alone = measure(model, tokenizer, [one], batch_tokens=50)[one.name]
        for name, result in alone.items():
            assert result.per_item == pytest.approx(together[one.name][name].per_item, abs=1e-5)


def test_repeated_rows_keep_their_items(model, tokenizer, word_rows):
    found = measure(model, tokenizer, [EvalSet("s", [word_rows[0]] * 3)])["s"]["answer_loss"]
    assert list(found.per_item) == [word_rows[0].id, f"{word_rows[0].id}-2", f"{word_rows[0].id}-3"]


def test_defaults_go_by_form(word_rows):
    choices = [canonical(CHOICES[0])]
    assert default_measures(choices) == ("acc", "exact_match", "answer_loss")
    assert default_measures([*choices, word_rows[0]]) == ("exact_match", "answer_loss")
    assert default_measures([canonical({"text": "a"})]) == ("bits_per_byte",)
    assert {"exact_match", "acc", "answer_loss", "bits_per_byte"} <= set(MEASURES)


def test_every_problem_of_a_plan_at_once(model, tokenizer, word_rows):
    text, chat = canonical({"text": "a"}), canonical({"messages": [{"role": "assistant", "content": "a"}]})
    sets = [
        EvalSet("a", word_rows, ("exact_mach",)),
        EvalSet("b", word_rows, ("acc",)),
        EvalSet("b", [text], ("answer_loss",)),
        EvalSet("c", []),
        EvalSet("d", [text, word_rows[0]]),
        EvalSet("e", [chat], exact_match="generate"),
    ]
    with pytest.raises(MeasureError) as caught:
        measure(model, tokenizer, sets)
    said = str(caught.value).splitlines()
    for part in (
        "set 'b': given 2 times",
        "set 'a': unknown measure 'exact_mach': did you mean 'exact_match'",
        "set 'b': acc does not apply to completion rows without choices",
        "set 'b': answer_loss does not apply to text rows",
        "set 'c': no rows",
        "set 'd': mixes text rows",
        "set 'e': exact_match: generate does not apply to chat rows",
    ):
        assert any(line.startswith(part) for line in said), (part, said)


def test_interrupted_between_batches(model, tokenizer, word_rows):
    with pytest.raises(Interrupted):
        measure(model, tokenizer, [EvalSet("s", word_rows)], should_stop=lambda: True)


def test_prepared_sets_measure_what_measure_does(model, make_model, tokenizer, word_rows):
    sets = [
        EvalSet("choices", [canonical(raw) for raw in CHOICES]),
        EvalSet("words", word_rows[:10], ("exact_match", "answer_loss", "min_k_plus_plus")),
        EvalSet("texts", [canonical({"text": text}) for text in TEXTS]),
    ]
    prepared = Prepared(tokenizer, sets, window=128)
    other = make_model(len(tokenizer), seed=5)
    for one in (model, other, model):  # the models of a training, one after the other
        assert prepared.measure(one) == measure(one, tokenizer, sets)
    assert prepared.tokens > 24 * 4
    with pytest.raises(MeasureError, match="written: answers that must be written"):
        Prepared(tokenizer, [EvalSet("written", word_rows, ("exact_match",), exact_match="generate")])


def test_progress_goes_forward_whatever_room_the_answers_need(model, tokenizer, word_rows):
    long = canonical({"prompt": "Say:", "completion": "river harbour market " * 4})
    seen = []
    one = EvalSet("s", [*word_rows[:5], long], ("exact_match",), exact_match="generate")
    measure(model, tokenizer, [one], progress=lambda done, total: seen.append((done, total)), batch_tokens=1)
    assert seen == sorted(seen)
    assert len(seen) == len(set(seen)) == 6
    assert seen[-1] == (6, 6)


def test_a_model_may_be_opened_by_a_method(model, tokenizer, word_rows):
    class Opens:
        def model(self):
            return model

    sets = [EvalSet("s", word_rows[:2])]
    assert measure(Opens().model, tokenizer, sets) == measure(model, tokenizer, sets)
