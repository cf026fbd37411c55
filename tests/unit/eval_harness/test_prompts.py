"""Prompts: what is learned and scored, token by token, on a real tokenizer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_harness.prompts import PromptError, definition, encode, prompt_ids
from eval_harness.rows import Row, canonical

QUESTION = canonical({"question": "What is 12 + 30?", "answer": "42", "choices": ["42", "43"]})
MESSAGES = [
    {"role": "user", "content": "Say river."},
    {"role": "assistant", "content": "river"},
    {"role": "user", "content": "Say market."},
    {"role": "assistant", "content": "market"},
]


def target_text(tokenizer, encoded):
    ids = [i for i, is_target in zip(encoded.input_ids, encoded.is_target, strict=True) if is_target]
    return tokenizer.decode(ids)


def test_chat_target_is_the_answer_and_the_end_token(tokenizer):
    encoded = encode(tokenizer, QUESTION)
    assert tokenizer.decode(encoded.input_ids) == "<|user|>What is 12 + 30?<|end|>\n<|assistant|>42<|end|>\n"
    assert target_text(tokenizer, encoded) == "42<|end|>"
    assert (encoded.is_target[-1], encoded.end_tokens) == (False, 1)  # the line break after the end token
    assert encoded.input_ids[: encoded.start] == prompt_ids(tokenizer, QUESTION)


def test_chat_takes_another_completion_and_a_system_message(tokenizer):
    encoded = encode(tokenizer, QUESTION, completion="43", system="Be brief.")
    text = tokenizer.decode(encoded.input_ids)
    assert text.startswith("<|system|>Be brief.<|end|>\n<|user|>")
    assert target_text(tokenizer, encoded) == "43<|end|>"
    assert encoded.input_ids[: encoded.start] == prompt_ids(tokenizer, QUESTION, system="Be brief.")


def test_prompt_as_messages_is_the_same_as_a_string(tokenizer):
    row = canonical(
        {
            "prompt": [{"role": "user", "content": QUESTION.prompt}],
            "completion": [{"role": "assistant", "content": "42"}],
        }
    )
    assert encode(tokenizer, row) == encode(tokenizer, QUESTION)


def test_plain_appends_eos_and_puts_the_separator_to_the_completion(tokenizer):
    encoded = encode(tokenizer, QUESTION, "none")
    assert tokenizer.decode(encoded.input_ids) == "What is 12 + 30? 42<|end|>"
    assert target_text(tokenizer, encoded) == " 42<|end|>"
    assert encoded.end_tokens == 1
    literal = encode(tokenizer, canonical({"prompt": "a b", "completion": "c"}), "none")
    assert target_text(tokenizer, literal)[-len("c<|end|>") :] == "c<|end|>"
    assert tokenizer.decode(literal.input_ids) == "a bc<|end|>"


def test_a_token_over_the_boundary_belongs_to_the_completion(tokenizer):
    assert len(tokenizer(" harbour").input_ids) == 1  # one token: any cut inside it spans
    encoded = encode(tokenizer, canonical({"prompt": "Say harb", "completion": "our"}), "none")
    assert target_text(tokenizer, encoded) == " harbour<|end|>"
    # A space at the prompt's end is merged into the completion's first token.
    spaced = encode(tokenizer, canonical({"prompt": "The capital of ", "completion": "France"}), "none")
    assert target_text(tokenizer, spaced) == " France<|end|>"
    assert tokenizer.decode(spaced.input_ids[: spaced.start]) == "The capital of"


@given(prompt=st.text("ab 1é\n.harbou", min_size=1, max_size=12), answer=st.text("ab 1é.r", min_size=1, max_size=8))
def test_plain_covers_exactly_the_completion(tokenizer, prompt, answer):
    row = Row("completion", prompt=prompt, completion=answer)
    encoded = encode(tokenizer, row, "none")
    assert tokenizer.decode(encoded.input_ids) == f"{prompt}{answer}<|end|>"
    before, after = encoded.input_ids[: encoded.start], encoded.input_ids[encoded.start :]
    assert prompt.encode().startswith(raw_bytes(tokenizer, before))
    assert raw_bytes(tokenizer, after).endswith(f"{answer}<|end|>".encode())
    assert all(encoded.is_target[encoded.start :])


def raw_bytes(tokenizer, ids):
    """Bytes of byte-level tokens, also where a character is cut between two of them."""
    alphabet = tokenizer.backend_tokenizer.decoder
    names = [tokenizer.convert_ids_to_tokens(i) for i in ids]
    kept = [name if name == "<|end|>" else "".join(name) for name in names]
    table = bytes_of_characters()
    out = b"".join(n.encode() if n == "<|end|>" else bytes(table[c] for c in n) for n in kept)
    assert alphabet is not None
    return out


def bytes_of_characters():
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


def test_a_tokenizer_that_adds_bos_and_eos_itself(make_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(chat=False, bos=True)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <|end|>", special_tokens=[("<s>", bos), ("<|end|>", eos)]
    )
    encoded = encode(tokenizer, QUESTION)
    assert encoded.input_ids[0] == bos
    assert encoded.input_ids.count(eos) == 1
    assert target_text(tokenizer, encoded) == " 42<|end|>"
    assert prompt_ids(tokenizer, QUESTION) == encoded.input_ids[: encoded.start]
    text = encode(tokenizer, canonical({"text": "a b"}))
    assert (text.input_ids.count(bos), text.input_ids.count(eos)) == (1, 1)


def test_conversation_targets_every_assistant_turn(tokenizer):
    encoded = encode(tokenizer, canonical({"messages": MESSAGES}))
    assert target_text(tokenizer, encoded) == "river<|end|>market<|end|>"
    prompt = prompt_ids(tokenizer, canonical({"messages": MESSAGES}))
    assert tokenizer.decode(prompt).endswith("<|user|>Say market.<|end|>\n<|assistant|>")
    assert encoded.input_ids[: len(prompt)] == prompt


def test_one_turn_and_a_completion_row_have_the_same_targets(tokenizer):
    one = encode(tokenizer, canonical({"messages": MESSAGES[:2]}))
    other = encode(tokenizer, canonical({"prompt": MESSAGES[:1], "completion": MESSAGES[1:2]}))
    assert (one.input_ids, one.is_target) == (other.input_ids, other.is_target)


def test_text_scores_all_but_the_first_token(tokenizer, plain_tokenizer):
    text = canonical({"text": "a b c"})
    with_bos = encode(plain_tokenizer, text)
    assert plain_tokenizer.decode(with_bos.input_ids) == "<s>a b c<|end|>"
    assert target_text(plain_tokenizer, with_bos) == "a b c<|end|>"
    without = encode(tokenizer, text)
    assert target_text(tokenizer, without) == " b c<|end|>"


def test_a_template_without_end_token_gets_eos(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    encoded = encode(tokenizer, QUESTION)
    assert tokenizer.decode(encoded.input_ids) == "user: What is 12 + 30?\nassistant: 42\n<|end|>"
    assert encoded.is_target[-1]
    assert encoded.end_tokens == 1


def test_definition_names_the_template(tokenizer, plain_tokenizer, make_tokenizer):
    other = make_tokenizer()
    other.chat_template += " "
    assert definition(tokenizer, "none") == definition(plain_tokenizer, "auto") == "plain"
    assert definition(tokenizer, "auto") != definition(other, "auto")
    assert len(definition(tokenizer, "auto")) == len("chat:") + 6


def test_what_cannot_be_rendered_says_so(tokenizer, plain_tokenizer, make_tokenizer):
    conversation = canonical({"messages": MESSAGES})
    asked = canonical({"prompt": MESSAGES[:1], "completion": MESSAGES[1:2]})
    for row in (conversation, asked):
        with pytest.raises(PromptError, match=r"set tokenizer\.chat_template"):
            encode(plain_tokenizer, row)
        for ids_of in (encode, prompt_ids):  # "none" is never: nothing is rendered behind its back
            with pytest.raises(PromptError, match="needs a chat template, and none is used here"):
                ids_of(tokenizer, row, "none")
    unmarked = make_tokenizer()
    unmarked.chat_template = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(PromptError, match=r"\{% generation %\} \.\.\. \{% endgeneration %\}"):
        encode(unmarked, conversation)
    assert target_text(unmarked, encode(unmarked, asked)) == "river<|end|>"
    elsewhere = make_tokenizer()
    elsewhere.chat_template = tokenizer.chat_template.replace("<|assistant|>{% endif %}", "Answer:{% endif %}")
    with pytest.raises(PromptError, match="prefix of the conversation"):
        encode(elsewhere, QUESTION)
    with pytest.raises(PromptError, match="chat_template = 'alpaca'"):
        encode(tokenizer, QUESTION, "alpaca")  # type: ignore[arg-type]
    alone = make_tokenizer()
    alone.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + tokenizer.chat_template
    )
    assert encode(alone, QUESTION).input_ids == encode(tokenizer, QUESTION).input_ids
    for row in (QUESTION, conversation):
        with pytest.raises(PromptError, match=r"refuses a conversation of system, user.*: System role not supported"):
            encode(alone, row, system="Be brief.")
    endless = make_tokenizer(chat=False)
    endless.eos_token = None
    with pytest.raises(PromptError, match=r"set tokenizer\.eos_token"):
        encode(endless, QUESTION)
