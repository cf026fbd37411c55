"""What stands before a row is part of what is measured: system, shots, template, reasoning."""

from __future__ import annotations

import pytest

from eval_harness.generation import Generation
from eval_harness.measure import EvalSet, MeasureError, check, draw_shots, measure
from eval_harness.prompts import Prompting, encode, prompt_ids
from eval_harness.rows import canonical

QUESTION = canonical({"question": "Say the word of 3:", "answer": "river"})
SHOTS = [canonical({"question": f"Say {word}:", "answer": word}) for word in ("harbour", "market")]


def rendered(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_shots_are_paragraphs_without_a_template(plain_tokenizer):
    encoded = encode(plain_tokenizer, QUESTION, system="Answer.", shots=SHOTS)
    prompt = "Answer.\n\nSay harbour: harbour\n\nSay market: market\n\nSay the word of 3:"
    assert rendered(plain_tokenizer, encoded.input_ids[: encoded.start]) == prompt
    assert prompt_ids(plain_tokenizer, QUESTION, system="Answer.", shots=SHOTS) == encoded.input_ids[: encoded.start]


def test_shots_are_turns_with_a_template(tokenizer):
    encoded = encode(tokenizer, QUESTION, system="Answer.", shots=SHOTS)
    turns = [{"role": "system", "content": "Answer."}]
    for shot in SHOTS:
        turns += [{"role": "user", "content": shot.prompt}, {"role": "assistant", "content": shot.completion}]
    turns.append({"role": "user", "content": QUESTION.prompt})
    expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert rendered(tokenizer, encoded.input_ids[: encoded.start]) == expected
    assert prompt_ids(tokenizer, QUESTION, system="Answer.", shots=SHOTS) == encoded.input_ids[: encoded.start]


def test_the_draw_is_seeded_and_leaves_the_sets_own_rows_out(word_rows):
    def drawn(seed, rows=tuple(word_rows[:5])):
        one = EvalSet("s", list(rows), prompting=Prompting(num_fewshot=3, fewshot_seed=seed), fewshot=word_rows[:12])
        return [row.id for row in draw_shots(one)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert len(set(drawn(0))) == 3
    assert not {row.id for row in word_rows[:5]} & {one for seed in range(20) for one in drawn(seed)}


def test_too_few_rows_to_draw_from(word_rows):
    one = EvalSet("s", word_rows[:5], prompting=Prompting(num_fewshot=3), fewshot=word_rows[:7])
    with pytest.raises(MeasureError, match=r"set 's': num_fewshot = 3: only 2 completion rows"):
        check([one])


def test_the_definition_names_every_setting(tokenizer, model, word_rows):
    def definition(**prompting):
        one = EvalSet("s", word_rows[:3], ("answer_loss",), prompting=Prompting(**prompting), fewshot=word_rows[3:])
        return measure(model, tokenizer, [one])["s"]["answer_loss"].definition

    found = {
        definition(),
        definition(chat_template="none"),
        definition(system="Answer."),
        definition(system="Reply."),
        definition(num_fewshot=1),
        definition(num_fewshot=2),
        definition(num_fewshot=2, fewshot_seed=1),
        definition(strip_reasoning="<think>.*?</think>"),
    }
    assert len(found) == 8
    assert any(",2-shot:" in one for one in found)


def test_what_is_written_needs_an_end_and_its_settings_are_checked(word_rows):
    sets = [
        EvalSet("a", word_rows[:2], ("rouge_l",)),
        EvalSet("b", word_rows[:2], ("f1",), generation=Generation(0)),
        EvalSet("c", [canonical({"text": "a"})], prompting=Prompting(num_fewshot=1), fewshot=word_rows),
    ]
    with pytest.raises(MeasureError) as caught:
        check(sets)
    said = str(caught.value)
    assert "set 'a': what is written has no end: give generate.max_new_tokens" in said
    assert "set 'b': generate.max_new_tokens = 0: must be a whole number" in said
    assert "set 'c': num_fewshot does not apply to text rows" in said
    with pytest.raises(MeasureError, match=r"set 'd': strip_reasoning = '\(': must be a regular expression"):
        check([EvalSet("d", word_rows[:2], prompting=Prompting(strip_reasoning="("))])


def test_shots_change_the_score_and_their_prefix_is_shared(model, tokenizer):
    rows = [
        canonical({"question": f"Say {i}:", "choices": ["river", "harbour", "market"], "answer_index": i % 3})
        for i in range(3)
    ]
    bare = measure(model, tokenizer, [EvalSet("s", rows)])["s"]
    with_shots = EvalSet("s", rows, prompting=Prompting(num_fewshot=2), fewshot=SHOTS)
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda m, i, out: seen.append(tuple(out.shape[:2])))
    found = measure(model, tokenizer, [with_shots])["s"]
    hook.remove()
    assert found["answer_loss"].value != pytest.approx(bare["answer_loss"].value, abs=1e-4)
    assert (3, max(shape[1] for shape in seen)) in seen  # three rows of branches in one batch


def test_reasoning_is_cut_before_an_answer_is_read(model, tokenizer, monkeypatch):
    from eval_harness.metrics.text import REASONING

    row = canonical({"question": "Say:", "answer": "river"})
    written = tokenizer("<think>market or harbour</think> river").input_ids
    monkeypatch.setattr("eval_harness.generation.generate", lambda model, tokenizer, prompts, how, **k: [written])

    def value(pattern):
        one = EvalSet("s", [row], ("quasi_exact_match",), prompting=Prompting(strip_reasoning=pattern))
        one.generation = Generation(16)
        return measure(model, tokenizer, [one])["s"]["quasi_exact_match"].value

    assert (value(None), value(REASONING)) == (0.0, 1.0)


def test_a_pattern_that_takes_too_long_names_its_set(model, tokenizer, monkeypatch):
    written = tokenizer("a" * 60 + "!").input_ids
    monkeypatch.setattr("eval_harness.generation.generate", lambda model, tokenizer, prompts, how, **k: [written])
    monkeypatch.setattr("eval_harness.metrics.text.MATCH_SECONDS", 0.05)
    one = EvalSet("s", [canonical({"question": "Say:", "answer": "a"})], ("f1",), generation=Generation(4))
    one.prompting = Prompting(strip_reasoning="(a|a)+$")
    with pytest.raises(MeasureError, match=r"set 's': strip_reasoning: the pattern .* was undecided"):
        measure(model, tokenizer, [one])


def test_marks_of_reasoning_may_be_special_tokens(make_model, make_tokenizer, monkeypatch):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    written = tokenizer("<think>market</think>river<|end|>").input_ids
    assert "<think>" not in tokenizer.decode(written, skip_special_tokens=True)
    monkeypatch.setattr("eval_harness.generation.generate", lambda model, tokenizer, prompts, how, **k: [written])
    row = canonical({"question": "Say:", "answer": "river"})
    one = EvalSet("s", [row], ("quasi_exact_match",), generation=Generation(16))
    one.prompting = Prompting(strip_reasoning=r"(?s)<think>.*?</think>")
    assert measure(make_model(len(tokenizer)), tokenizer, [one])["s"]["quasi_exact_match"].value == 1.0
