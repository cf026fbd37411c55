"""The tiny world: always the same rows, tests apart from training, and a shipped model that knows it."""

import hashlib
import json
import math
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval_harness.tasks.tiny_world import SHARES, TASKS, VALUES, people, rows
from recipes.tiny_base import CHAT_TEMPLATE, IGNORED, bits_per_byte, encode, exact_match

ASSETS = Path(str(files("cpt"))) / "assets" / "tiny_world"
LETTER_TASKS = ["copy", "sort", "reverse", "last_letter"]
TEST_ONLY = ["facts_heldout", "sums_heldout"]
SPLITS = [
    (name, split)
    for name in TASKS
    for split in ("train", "test")
    if not (split == "train" and name in TEST_ONLY) and (name, split) != ("general", "test")
]
GOLDEN = "917eeaaef6ba18e46f123891c751fe3bf7f10c85d76f6e85ee353953cdb8b2b9"
FLOORS = {"facts": 98, "facts_heldout": 90, "sums": 98, "sums_heldout": 30, "copy": 80, "sort": 80}


def normalised(text):
    return " ".join(text.lower().split())


def prompts(name, split):
    return {normalised(row["prompt"]) for row in rows(name, split)}


def letters(name, split):
    """Every row's letters in alphabetical order."""
    return {tuple(sorted(row["prompt"].split(": ")[1].split())) for row in rows(name, split)}


# --- the rows


def test_rows_are_the_ones_the_shipped_model_was_trained_on():
    older = [
        (name, split) for name, split in SPLITS if name not in ("sums_rewarded", "people_forgotten", "people_kept")
    ]
    everything = json.dumps([[name, split, rows(name, split)] for name, split in older])
    assert hashlib.sha256(everything.encode()).hexdigest() == GOLDEN


def test_changing_a_returned_row_changes_nothing_for_the_next_caller():
    rows("copy", "test")[0]["completion"] = "spoilt"
    assert rows("copy", "test")[0]["completion"] != "spoilt"


@pytest.mark.parametrize("name", LETTER_TASKS)
def test_no_letters_of_a_test_occur_in_training_in_any_order(name):
    assert len(prompts(name, "test")) == 160
    assert not letters(name, "train") & letters(name, "test")


def test_withheld_prompts_and_stories_occur_in_no_training_rows():
    training = {name for name, split in SPLITS if split == "train"} - {"text", "sums_rewarded"}
    taught = set().union(*(prompts(name, "train") for name in training))
    for name in [*TEST_ONLY, *LETTER_TASKS, "new_people"]:
        assert not taught & prompts(name, "test"), name
    stories = {split: {normalised(row["text"]) for row in rows("text", split)} for split in ("train", "test")}
    assert len(stories["test"]) == 50
    assert not stories["train"] & stories["test"]


def test_a_withheld_pair_is_withheld_in_both_orders():
    def pairs(name, split):
        numbers = (
            [int(word.strip("?.")) for word in row["prompt"].split() if word[0].isdigit()] for row in rows(name, split)
        )
        return {frozenset(pair) for pair in numbers}

    assert len(pairs("sums_heldout", "test")) == round(0.15 * 16 * 17 / 2)
    assert not pairs("sums", "train") & pairs("sums_heldout", "test")


@pytest.mark.parametrize("name", ["facts", "sums"])
def test_recall_asks_what_training_taught(name):
    taught = {row["prompt"]: row["completion"] for row in rows(name, "train")}
    assert all(taught[row["prompt"]] == row["completion"] for row in rows(name, "test"))


def test_answers_are_right():
    attributes = {person["name"]: person for person in people()}
    for row in rows("facts", "train") + rows("facts_heldout", "test") + rows("new_people", "test"):
        owner = next(person for name, person in attributes.items() if name in row["prompt"])
        assert row["completion"] in {owner[attribute] for attribute in VALUES}
    for row in rows("sums", "train") + rows("sums_heldout", "test"):
        numbers = [int(word.strip("?.")) for word in row["prompt"].split() if word[0].isdigit()]
        assert sum(numbers) == int(row["completion"])
    expected = {
        "copy": list,
        "sort": sorted,
        "reverse": lambda given: given[::-1],
        "last_letter": lambda given: given[-1:],
    }
    for name, answer in expected.items():
        for row in rows(name, "test"):
            assert row["completion"].split() == answer(row["prompt"].split(": ")[1].split()), row


def test_new_people_are_new_and_each_of_their_facts_is_taught_twice():
    assert len({person["name"] for person in people()}) == 200
    base, new = people()[:100], people()[100:]
    taught = [row["prompt"] for row in rows("new_people", "train")]
    assert len(taught) == len(set(taught)) == 2 * len(VALUES) * len(new)
    assert not any(person["name"] in prompt for person in base for prompt in taught)


def test_rewarded_sums_are_the_withheld_ones_and_their_tests_are_posed_in_no_training():
    posed, asked, withheld = (
        prompts("sums_rewarded", "train"),
        prompts("sums_rewarded", "test"),
        prompts("sums_heldout", "test"),
    )
    assert (len(posed), len(asked)) == (70, 35)
    assert not posed & asked
    assert posed | asked == withheld


def test_general_is_base_training_in_its_proportions():
    general = [row["prompt"] for row in rows("general", "train")]
    assert len(general) == len(set(general))
    for name, share in SHARES.items():
        if name != "text":
            taught = {row["prompt"] for row in rows(name, "train")}
            assert sum(prompt in taught for prompt in general) == 50 * share


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("revers", "train", r"task 'revers'.*did you mean 'reverse'"),
        ("copy", "validation", r"split 'validation' of task 'copy'"),
        ("sums_heldout", "train", r"'sums_heldout' has no train split.*'test'"),
        ("general", "test", r"'general' has no test split.*'train'"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(name, split, message):
    with pytest.raises(ValueError, match=message):
        rows(name, split)


# --- the shipped model


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(ASSETS, local_files_only=True).eval()


def test_assets_are_complete_and_small():
    sizes = {path.name: path.stat().st_size for path in ASSETS.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= sizes.keys()
    assert {"tokenizer_config.json", "chat_template.jinja", "README.md"} <= sizes.keys()
    assert sum(sizes.values()) <= 5 * 2**20


def test_model_is_the_one_the_card_describes(model):
    assert 500_000 < model.num_parameters() < 600_000
    assert f"{model.num_parameters():,} parameters" in (ASSETS / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FLOORS)
def test_model_scores_above_its_floor(model, tokenizer, name):
    assert exact_match(model, tokenizer, rows(name, "test")[:50]) >= FLOORS[name]


def test_model_predicts_unseen_stories(model, tokenizer):
    assert bits_per_byte(model, tokenizer, rows("text", "test")) < 0.3


@pytest.mark.parametrize("name", ["new_people", "reverse", "last_letter"])
def test_model_has_not_been_taught_the_stream(model, tokenizer, name):
    assert exact_match(model, tokenizer, rows(name, "test")) < 20


def test_one_pass_exact_match_equals_greedy_decoding(model, tokenizer):
    verdicts = set()
    for row in rows("copy", "test")[:10] + rows("sums_heldout", "test")[:10] + rows("reverse", "test")[:10]:
        ids, labels = encode(tokenizer, row)
        prompt = [token for token, label in zip(ids, labels, strict=True) if label == IGNORED]
        decoded = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=16)[0].tolist()
        assert (decoded == ids) == (exact_match(model, tokenizer, [row]) == 100)
        verdicts.add(decoded == ids)
    assert verdicts == {True, False}  # both cases were seen


def test_bits_per_byte_of_a_uniform_model_is_the_code_length_by_hand(model, tokenizer):
    uniform = AutoModelForCausalLM.from_config(model.config)
    for parameter in uniform.parameters():
        torch.nn.init.zeros_(parameter)
    row = rows("text", "test")[0]
    tokens = len(tokenizer(row["text"])["input_ids"]) + 1  # the end token is predicted too
    assert bits_per_byte(uniform, tokenizer, [row]) == pytest.approx(tokens * math.log2(1024) / len(row["text"]))


# --- the tokenizer


@pytest.mark.parametrize("text", ["", " a  b ", "12 + 907", "Ünïcödé 漢字 🦊\n\ttab", "<|pad|> spelled out"])
def test_no_text_is_unknown_to_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_has_its_marks_and_digits_apart(tokenizer):
    assert len(tokenizer) == 1024
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.unk_token is None
    assert tokenizer.tokenize("907") == ["9", "0", "7"]
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_a_prompt_is_an_exact_prefix_of_its_conversation(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": "What is 3 + 4?"},
        {"role": "assistant", "content": " 7"},
        {"role": "user", "content": "\nüAdd 1 and 2."},
        {"role": "assistant", "content": "3"},
    ]
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    for length in (2, 4):
        prompt = tokenizer.apply_chat_template(messages[:length], add_generation_prompt=True, return_dict=False)
        assert whole[: len(prompt)] == prompt


def test_assistant_mask_is_the_answer_and_its_end_token(tokenizer):
    row = rows("copy", "test")[0]
    messages = [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]
    chat = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    _, labels = encode(tokenizer, row)
    assert chat["assistant_masks"] == [int(label != IGNORED) for label in labels]
    answer = [token for token, kept in zip(chat["input_ids"], chat["assistant_masks"], strict=True) if kept]
    assert tokenizer.decode(answer) == row["completion"] + "<|end|>"


def test_chat_template_refuses_a_role_it_does_not_know(tokenizer):
    with pytest.raises(Exception, match="role 'critic': must be system, user or assistant"):
        tokenizer.apply_chat_template([{"role": "critic", "content": "no"}])
