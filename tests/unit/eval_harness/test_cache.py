"""Nothing is scored twice, nothing served that other weights, prompts or settings made, nothing of a killed writer."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import pytest

from eval_harness import cache as caches
from eval_harness.cache import Cache, CacheError, tokenizer_digest
from eval_harness.errors import Interrupted
from eval_harness.generation import Generation
from eval_harness.measure import EvalSet, measure, model_identity, set_definition
from eval_harness.prompts import Prompting
from eval_harness.rows import canonical

CHOICES = [
    canonical({"question": f"Say word {i}:", "choices": ["river", "harbour", "x"], "answer_index": i % 3})
    for i in range(12)
]
TEXTS = [canonical({"text": text}) for text in ("The capital of France is Paris.", "harbour, market " * 40)]


@pytest.fixture
def store(tmp_path):
    return Cache(tmp_path / "scores.sqlite")


@pytest.fixture
def sets(word_rows):
    return [
        EvalSet("choices", CHOICES),
        EvalSet("texts", TEXTS),
        EvalSet("written", word_rows[:6], ("exact_match",), exact_match="generate"),
    ]


def never():
    raise AssertionError("the model was asked for")


def test_a_second_time_asks_no_model_and_gives_equal_results(model, tokenizer, store, sets):
    first = measure(model, tokenizer, sets, cache=store, identity="a")
    assert measure(lambda: never(), tokenizer, sets, cache=store, identity="a") == first
    assert measure(model, tokenizer, sets) == first


def test_the_right_choice_is_part_of_what_was_asked(model, tokenizer, store):
    """It alone is scored with its end: the same question with another right answer is another record."""
    question = {"question": "Which is it?", "choices": ["river", "harbour"]}
    sets = [[EvalSet("s", [canonical(question | {"answer_index": i})])] for i in range(2)]
    plain = [measure(model, tokenizer, one) for one in sets]
    assert [measure(model, tokenizer, one, cache=store, identity="a") for one in sets] == plain


def test_only_what_is_new_is_scored(model, tokenizer, store, word_rows):
    measure(model, tokenizer, [EvalSet("s", word_rows[:8])], cache=store, identity="a")
    seen = []
    found = measure(
        model,
        tokenizer,
        [EvalSet("other name", word_rows[4:12], ("answer_loss",))],
        cache=store,
        identity="a",
        progress=lambda done, total: seen.append(total),
    )
    assert set(seen) == {4}
    assert (
        found["other name"]
        == measure(model, tokenizer, [EvalSet("other name", word_rows[4:12], ("answer_loss",))])["other name"]
    )


@pytest.mark.parametrize(
    "change",
    ["identity", "tokenizer", "row", "separator", "system", "shots", "template", "statistics", "library", "generation"],
)
def test_whatever_decides_a_score_is_in_its_key(
    change, model, tokenizer, make_tokenizer, store, word_rows, monkeypatch
):
    written = change == "generation"
    one = EvalSet("s", word_rows[:3], ("exact_match",), exact_match="generate" if written else "one_pass")
    if written:
        one.generation = Generation(8)
    measure(model, tokenizer, [one], cache=store, identity="a")
    identity, tok = "a", tokenizer
    if change == "identity":
        identity = model_identity("a", dtype="bfloat16")
    elif change == "tokenizer":
        tok = make_tokenizer()
        tok.chat_template = "{# other #}" + tok.chat_template
    elif change == "row":
        one.rows = [replace(row, completion="x") for row in one.rows]
    elif change == "separator":
        one.rows = [replace(row, separator="\n") for row in one.rows]
    elif change == "system":
        one.prompting = Prompting(system="Be brief.")
    elif change == "shots":
        one.prompting, one.fewshot = Prompting(num_fewshot=1), word_rows[5:]
    elif change == "template":
        one.prompting = Prompting(chat_template="none")
    elif change == "statistics":
        one.measures = ("exact_match", "min_k_plus_plus")
    elif change == "library":
        monkeypatch.setattr("eval_harness.measure.versions", lambda: {"torch": "0"})
    else:
        one.generation = Generation(8, stop=("x",))
    asked = []

    def opened():
        asked.append(1)
        return model

    measure(opened, tok, [one], cache=store, identity=identity)
    assert asked


def test_a_stop_loses_the_part_at_hand_only(model, tokenizer, store, word_rows, monkeypatch):
    monkeypatch.setattr("eval_harness.measure.SCORED_AT_ONCE", 10)
    one, seen = EvalSet("s", word_rows[:40]), []
    with pytest.raises(Interrupted):
        measure(
            model,
            tokenizer,
            [one],
            cache=store,
            identity="a",
            progress=lambda done, total: seen.append((done, total)),
            should_stop=lambda: len(seen) > 0 and seen[-1][0] >= 20,
        )
    assert seen[-1] == (20, 40)
    found = measure(model, tokenizer, [one], cache=store, identity="a", progress=lambda done, total: seen.append(total))
    assert seen[-1] == 20  # left to ask
    assert found == measure(model, tokenizer, [one])


def test_without_identity_nothing_is_kept(model, tokenizer, store, sets):
    measure(model, tokenizer, sets, cache=store)
    assert not store.path.exists()


def test_a_set_definition_follows_rows_and_settings(tokenizer, word_rows):
    one = EvalSet("s", word_rows[:5])
    same = set_definition(EvalSet("t", word_rows[:5]), tokenizer)
    assert set_definition(one, tokenizer) == same
    others = [
        EvalSet("s", word_rows[:4]),
        EvalSet("s", word_rows[:5], ("answer_loss",)),
        EvalSet("s", word_rows[:5], prompting=Prompting(system="a")),
        EvalSet("s", word_rows[:5], prompting=Prompting(num_fewshot=2), fewshot=word_rows[5:]),
        EvalSet("s", word_rows[:5], prompting=Prompting(num_fewshot=2, fewshot_seed=1), fewshot=word_rows[5:]),
        EvalSet("s", word_rows[:5], generation=Generation(4)),
        EvalSet("s", word_rows[:5], generation=Generation(stop=("x",))),
        EvalSet("s", word_rows[:5], exact_match="generate"),
        EvalSet("s", word_rows[:5], group="general"),
    ]
    assert len({same, *(set_definition(other, tokenizer) for other in others)}) == 1 + len(others)


def test_tokenizers_differ_by_what_decides_their_ids(tokenizer, plain_tokenizer, make_tokenizer):
    assert tokenizer_digest(tokenizer) == tokenizer_digest(make_tokenizer())
    assert tokenizer_digest(tokenizer) != tokenizer_digest(plain_tokenizer)
    other = make_tokenizer()
    other.clean_up_tokenization_spaces = not other.clean_up_tokenization_spaces  # decides what a written text is
    assert tokenizer_digest(tokenizer) != tokenizer_digest(other)


def test_what_a_tokenizer_was_used_for_is_no_part_of_it(make_tokenizer):
    tokenizer = make_tokenizer()
    before = tokenizer_digest(tokenizer)
    tokenizer(["river", "river, harbour"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(tokenizer) == before


KILLED = """
import sys, time
from eval_harness.cache import Cache
store = Cache(sys.argv[1])
with store._open() as database, database:
    for i in range(5000):
        database.execute("INSERT INTO records VALUES (?, ?)", (f"half{i}", '{"answers": ' + "[" * 2000))
    print("written", flush=True)
    time.sleep(60)
"""


def test_nothing_of_a_killed_writer_is_served(store):
    store.put({"whole": {"generated": "a"}})
    writer = subprocess.Popen([sys.executable, "-c", KILLED, str(store.path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "written\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    assert store.get(["whole", "half0", "half4999"]) == {"whole": {"generated": "a"}}
    store.put({"later": {"generated": "b"}})
    assert store.get(["later"]) == {"later": {"generated": "b"}}


def test_two_writers_wait_for_each_other(store):
    store.put({"a": {}})
    holding = sqlite3.connect(store.path, isolation_level=None)
    holding.execute("BEGIN IMMEDIATE")
    code = "import sys; from eval_harness.cache import Cache; Cache(sys.argv[1]).put({'b': {}})"
    other = subprocess.Popen([sys.executable, "-c", code, str(store.path)])
    time.sleep(1.0)
    assert other.poll() is None
    holding.execute("COMMIT")
    assert other.wait(30) == 0
    assert set(store.get(["a", "b"])) == {"a", "b"}


def test_a_damaged_cache_is_named(store, monkeypatch):
    store.path.write_bytes(b"not a database, and long enough to be read as one" * 50)
    for use in (lambda: store.get(["a"]), lambda: store.put({"a": {}})):
        with pytest.raises(CacheError, match=r"scores\.sqlite: cannot be used .*Delete it"):
            use()


def test_a_cache_that_another_holds_is_not_to_be_deleted(store, monkeypatch):
    monkeypatch.setattr(caches, "WAIT", 0.1)
    store.put({"a": {}})
    holding = sqlite3.connect(store.path, isolation_level=None)
    holding.execute("BEGIN EXCLUSIVE")
    for use in (lambda: store.get(["a"]), lambda: store.put({"b": {}})):
        with pytest.raises(CacheError, match=r"scores\.sqlite: cannot be read or written .*locked") as caught:
            use()
        assert "Delete" not in str(caught.value)
    holding.close()


def test_versions_are_of_what_is_installed(monkeypatch):
    def version(name):
        if name == "bitsandbytes":
            raise PackageNotFoundError(name)
        return f"{name} 1"

    monkeypatch.setattr(caches, "version", version)
    found = caches.versions.__wrapped__()
    assert found == {name: f"{name} 1" for name in caches.LIBRARIES if name != "bitsandbytes"}


def test_many_keys_at_once(store, monkeypatch):
    monkeypatch.setattr(caches, "AT_ONCE", 3)
    store.put({str(i): {"window": i} for i in range(10)})
    assert store.get(str(i) for i in range(12)) == {str(i): {"window": i} for i in range(10)}
