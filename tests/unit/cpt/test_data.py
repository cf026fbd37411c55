"""Sources, weights, fingerprints, tokens, packing, overlap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cpt.data.collator import Collator
from cpt.data.overlap import overlap
from cpt.data.sources import load, load_all
from cpt.data.spec import Source
from cpt.data.tokens import IGNORED, TokenSettings, tokenise
from cpt.errors import DataError
from eval_harness.rows import canonical


def rows(n: int, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(start, start + n)]


def prompts(loaded: Any) -> list[str]:
    return [row.prompt for row in loaded.rows]


def test_all_file_kinds_give_the_same_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = rows(3)
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, data)))
    (tmp_path / "r.json").write_text(json.dumps(data))
    (tmp_path / "r.csv").write_text("prompt,completion\n" + "\n".join(f"{r['prompt']},{r['completion']}" for r in data))
    pq.write_table(pa.Table.from_pylist(data), tmp_path / "r.parquet")
    found = {
        kind: load(Source(file=f"r.{kind}"), tmp_path, "here").fingerprint
        for kind in ("jsonl", "json", "csv", "parquet")
    }
    assert len(set(found.values())) == 1
    assert found["json"] == load(Source(rows=data), None, "here").fingerprint


def test_a_hub_source_reads_its_local_copy_once_data_root_is_set(tmp_path: Path) -> None:
    (tmp_path / "copy.test.jsonl").write_text(json.dumps(rows(1)[0]))
    source = Source(hub="somebody/something", file="copy.{split}.jsonl", split="test")
    assert source.origin(None)["hub"] == "somebody/something"
    assert prompts(load(source, tmp_path, "here")) == ["q0"]


def test_limit_takes_the_first_rows_or_a_seeded_draw() -> None:
    whole = rows(50)
    assert prompts(load(Source(rows=whole, limit=3), None, "x")) == ["q0", "q1", "q2"]
    drawn = [prompts(load(Source(rows=whole, limit=10, shuffle=True), None, "x", seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 10


def test_weights_and_counts_make_an_exact_epoch() -> None:
    a, b = Source(rows=rows(30), weight=3), Source(rows=rows(10, 100), weight=1)
    mixed = prompts(load_all([a, b], None, "x"))
    assert len(mixed) == 40
    assert sum(int(p[1:]) < 100 for p in mixed) == 30
    even = prompts(load_all([a.model_copy(update={"weight": 1}), b], None, "x"))
    assert sum(int(p[1:]) >= 100 for p in even) == 20  # ten rows, each twice
    counted = prompts(load_all([Source(rows=rows(5), count=12), Source(rows=rows(4, 100))], None, "x"))
    assert len(counted) == 16
    assert {counted.count(f"q{i}") for i in range(5)} == {2, 3}


def test_a_changed_row_changes_the_fingerprint() -> None:
    one = load_all([Source(rows=rows(5))], None, "x").fingerprint
    other = rows(5)
    other[3]["completion"] += "!"
    assert load_all([Source(rows=other)], None, "x").fingerprint != one


def test_overlap_is_counted_by_normalised_text() -> None:
    test = [canonical({"prompt": "Who?", "completion": "Me"}), canonical({"prompt": "New", "completion": "x"})]
    train = [canonical({"prompt": " who?", "completion": "ME "}), canonical({"question": "Where?", "answer": "Here"})]
    assert overlap({"both": test, "new": test[1:]}, train) == {"both": 1}


def test_only_the_answer_and_its_end_are_learned(tiny_tokenizer: Any) -> None:
    row = canonical({"prompt": "Sort: b a", "completion": "a b"})
    (item,) = tokenise([row], tiny_tokenizer, TokenSettings(), "x").dataset
    learned = [token for token in item["labels"] if token != IGNORED]
    assert tiny_tokenizer.decode(learned[:-1]) == "a b"
    assert learned[-1] == tiny_tokenizer.eos_token_id
    (whole,) = tokenise([row], tiny_tokenizer, TokenSettings(completion_only_loss=False), "x").dataset
    assert whole["labels"] == whole["input_ids"]


def test_conversations_learn_everything_or_the_assistant_only(tiny_tokenizer: Any) -> None:
    turns = [("user", "hi"), ("assistant", "yes"), ("user", "more"), ("assistant", "no")]
    row = canonical({"messages": [{"role": role, "content": text} for role, text in turns]})
    (whole,) = tokenise([row], tiny_tokenizer, TokenSettings(), "x").dataset
    assert whole["labels"] == whole["input_ids"]
    (item,) = tokenise([row], tiny_tokenizer, TokenSettings(assistant_only_loss=True), "x").dataset
    learned = tiny_tokenizer.decode([token for token in item["labels"] if token != IGNORED], skip_special_tokens=True)
    assert learned.replace(" ", "") == "yesno"


def test_rows_without_room_for_an_answer_are_dropped_and_counted(tiny_tokenizer: Any) -> None:
    given = [canonical({"prompt": "word " * 40, "completion": "a"}), canonical({"prompt": "b", "completion": "c"})]
    found = tokenise(given, tiny_tokenizer, TokenSettings(max_length=16), "x")
    assert len(found.dataset) == 1
    assert (found.counts["dropped_without_target"], found.counts["truncated"]) == (1, 1)
    with pytest.raises(DataError, match="none of 1 rows keeps an answer token within max_length 16"):
        tokenise(given[:1], tiny_tokenizer, TokenSettings(max_length=16), "here")


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packing_keeps_every_token(tiny_tokenizer: Any, strategy: str) -> None:
    given = [canonical({"text": "one two three " * (1 + i % 4)}) for i in range(20)]
    loose = tokenise(given, tiny_tokenizer, TokenSettings(max_length=64), "x").dataset
    packed = tokenise(given, tiny_tokenizer, TokenSettings(max_length=64, packing=True, packing_strategy=strategy), "x")
    assert sum(map(len, packed.dataset["input_ids"])) == sum(map(len, loose["input_ids"]))
    assert len(packed.dataset) < len(loose)
    assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) <= 64 for row in packed.dataset)


def test_packed_rows_do_not_see_one_another(tiny_tokenizer: Any, tiny_llama: Any) -> None:
    """Log-probabilities of packed rows equal those of the same rows alone, padding included."""
    given = [canonical({"text": text}) for text in ("ab cd", "the story of a pet", "x", "one two three four")]
    settings = TokenSettings(max_length=40, packing=True)
    loose = tokenise(given, tiny_tokenizer, TokenSettings(), "x").dataset
    packed = [dict(row, origin=0, row=0) for row in tokenise(given, tiny_tokenizer, settings, "x").dataset]
    batch = Collator(tiny_tokenizer.pad_token_id, pad_to_multiple_of=48, packed=True)(packed)
    model = tiny_llama(seed=1).eval()
    with torch.no_grad():
        inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
        together = model(**inputs, use_cache=False).logits.log_softmax(-1)
    found = {}
    for i, row in enumerate(packed):
        start = 0
        for length in row["seq_lengths"]:
            ids = tuple(row["input_ids"][start : start + length])
            found[ids] = together[i, start : start + length]
            start += length
    for row in loose:
        with torch.no_grad():
            alone = model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0].log_softmax(-1)
        torch.testing.assert_close(found[tuple(row["input_ids"])], alone, atol=1e-5, rtol=1e-5)


def test_the_first_token_of_a_packed_part_is_not_learned(tiny_tokenizer: Any) -> None:
    settings = TokenSettings(max_length=40, packing=True)
    packed = tokenise([canonical({"text": "a b"}), canonical({"text": "c d e"})], tiny_tokenizer, settings, "x").dataset
    batch = Collator(0, packed=True)([dict(packed[0], origin=0, row=0)])
    assert bool((batch["labels"][batch["position_ids"] == 0] == IGNORED).all())
    assert int((batch["position_ids"] == 0).sum()) == 2


def test_lost_characters_are_counted(tiny_tokenizer: Any) -> None:
    assert (
        tokenise([canonical({"text": "æ € fine"})], tiny_tokenizer, TokenSettings(), "x").counts["lost_characters"] == 0
    )
