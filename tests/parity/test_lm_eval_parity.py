"""Multiple choice against lm-evaluation-harness itself, and its own tasks through our engine against its model class.

lm-eval's Hugging Face model pads on the right, knows no shared prefixes and takes the soft-max of all logits: another
implementation, not another definition.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from eval_harness.errors import ScoringError
from eval_harness.items import EvalSet
from eval_harness.measure import measure
from eval_harness.prompts import Prompting, encode
from eval_harness.rows import Row, canonical
from tests.plugins import require

require("lm_eval", find_spec("lm_eval") is not None, "lm-evaluation-harness is not installed")

pytestmark = pytest.mark.parity

SETS = {"piqa": 2, "arc_easy": 4, "commonsenseqa": 5}  # and their numbers of choices
ROWS = 100  # of each
PREFIXES = [
    {"question": "Lily saw a", "choices": ["dog", "dog and a cat", "dog and"], "answer_index": 0},
    {"question": "One day Tom went to the", "choices": ["park", "parking", "park with his mom"], "answer_index": 2},
    {"question": "The cat sat on the mat.\nThen it", "choices": ["ran", "ran away", "ran away."], "answer_index": 1},
    {"question": "He", "choices": ["w", "was", "was happy"], "answer_index": 2},
]
TOO_LONG = {"question": "once upon a time " * 300, "choices": ["there", "there was"], "answer_index": 1}
NATS = 1e-4


@pytest.fixture
def task_file(tmp_path: Path) -> Callable[..., Path]:
    """`task_file(name, rows, **config)`: a task of lm-eval on local rows; returns the folder of all of them."""

    def write(name: str, rows: Sequence[dict[str, Any]], **config: Any) -> Path:
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        about = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
            "test_split": "test",
            "metadata": {"version": 1.0},
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps(about | config), encoding="utf-8")  # JSON is YAML
        return tmp_path

    return write


CHOICES: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "question",
    "doc_to_choice": "choices",
    "doc_to_target": "answer_index",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


def by_lm_eval(model: Any, tokenizer: Any, folder: Path, task: str, **settings: Any) -> dict[str, Any]:
    """Results and samples of one task with lm-eval's own model class."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # Its sums in float32 are off by themselves: by 1.2e-4 at the 1,400 nats of the longest choice.
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16, softmax_dtype="float64")
    loaded = TaskManager(include_path=str(folder), include_defaults=False).load(task)
    return evaluate(lm, loaded, bootstrap_iters=0, **settings)


# ---- our measures against lm-eval ---------------------------------------------------------------------


@cache
def pretrained(folder: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def choice_rows(shared: Path, name: str, prompt: str) -> list[dict[str, Any]]:
    rows = [*PREFIXES, TOO_LONG]
    if name != "prefixes":
        lines = (shared / "data" / "general" / f"{name}.test.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines[:ROWS]]
        assert len(rows) == ROWS
        assert max(len(row["choices"]) for row in rows) == SETS[name]
    return [row | {"question": prompt.format(row["question"])} for row in rows]


@pytest.mark.shared
@pytest.mark.parametrize("name", [*SETS, "prefixes"])
@pytest.mark.parametrize(("folder", "prompt"), [("stories260K", "{}"), ("stories260K", "{} -"), ("story656K", "{} -")])
def test_choices_are_scored_as_lm_eval_scores_them(
    shared: Path, task_file: Callable[..., Path], folder: str, prompt: str, name: str
) -> None:
    """The tokenizer of stories260K merges the space into the choice; that of story656K into a prompt's last word, which
    lm-eval cannot take (see the next test), hence the dash."""
    model, tokenizer = pretrained(shared / "models" / folder)
    raw = choice_rows(shared, name, prompt)
    samples = by_lm_eval(model, tokenizer, task_file(name, raw, **CHOICES), name)["samples"][name]
    rows = [canonical(row) for row in raw]

    totals = choice_log_likelihoods(model, tokenizer, rows)
    fits = [one is not None for one in totals]
    assert fits == [name != "prefixes" or row is not raw[-1] for row in raw]
    for own, sample in zip(totals, samples, strict=True):
        if own is not None:
            assert own == pytest.approx([resp[0][0] for resp in sample["resps"]], abs=NATS)

    one = EvalSet(name, rows, ("acc", "acc_norm"), prompting=Prompting(chat_template="none"))
    for metric, result in measure(model, tokenizer, [one])[name].items():
        theirs = [sample[metric] for sample, fit in zip(samples, fits, strict=True) if fit]
        assert list(result.per_item.values()) == theirs, metric
        assert result.n == sum(fits)
        assert result.value == pytest.approx(sum(theirs) / len(theirs))
        assert result.excluded == ({"longer_than_context": 1} if name == "prefixes" else {})


def choice_log_likelihoods(model: Any, tokenizer: Any, rows: Sequence[Row]) -> list[list[float] | None]:
    """Nats of every choice without its end token, in one call of the engine; None for a row that does not fit."""
    from eval_harness.scoring import score

    encoded = [[encode(tokenizer, row, "none", completion=choice) for choice in row.choices] for row in rows]
    scores = iter(score(model, [one for part in encoded for one in part]))
    found: list[list[float] | None] = []
    for part in encoded:
        pairs = [(next(scores), one.end_tokens) for one in part]
        sums = [math.fsum(one.log_probs[: one.tokens - ends]) for one, ends in pairs if one is not None]
        found.append(sums if len(sums) == len(part) else None)
    return found


@pytest.mark.shared
def test_a_space_merged_into_the_prompt_is_no_reason_to_lose_the_choice(shared: Path) -> None:
    """lm-eval takes as many tokens for the prompt as the prompt has alone: here all of them, and none is left to score.

    Ours counts the token that holds the prompt's last word and the space to the choice.
    """
    model, tokenizer = pretrained(shared / "models" / "story656K")
    ours = encode(tokenizer, canonical(PREFIXES[0]), "none")
    scored = [one for one, is_target in zip(ours.input_ids, ours.is_target, strict=True) if is_target]
    assert tokenizer.convert_ids_to_tokens(scored) == ["saw▁a▁", "dog", tokenizer.eos_token]
    with pytest.raises(ScoringError, match=r"makes no token of ' dog'"):
        engine(model, tokenizer).loglikelihood([request("loglikelihood", "Lily saw a", " dog")])


# ---- lm-eval's tasks through our engine ---------------------------------------------------------------


def engine(model: Any, tokenizer: Any) -> Any:
    from eval_harness.lm_eval_model import EngineLM

    return EngineLM(model, tokenizer)


def theirs(model: Any, tokenizer: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, softmax_dtype="float64")


def request(kind: Any, *arguments: Any, document: int = 0) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0, metadata=("task", document, 1))


TEXTS = ["", "Where does Adra Birch live?", "What is 3 + 4? ", "Sort these letters: q w e", "Once  \n"]
ENDS = [" Corvo", " Corvo Dunmere", " 7", "x", " teacher and painter " * 3]


def test_log_likelihoods_are_those_of_lm_eval(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    """No context, white space at its end, continuations that are prefixes of others, what must be cut to fit."""
    model = tiny_llama(initializer_range=0.4, max_position_embeddings=48)
    texts = [*TEXTS, "What pet does Cirin Hale have? " * 6]
    requests = [request("loglikelihood", text, end, document=n) for n, text in enumerate(texts) for end in ENDS]
    ours = engine(model, tiny_tokenizer)
    found = ours.loglikelihood(requests)
    expected = theirs(model, tiny_tokenizer).loglikelihood(requests)
    assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], abs=NATS)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert ours.truncated == {"task": {5}}


def test_the_longest_sequence_that_lm_eval_takes_is_not_cut(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    model = tiny_llama(initializer_range=0.4, max_position_embeddings=16)
    ours = engine(model, tiny_tokenizer)
    pairs = [(list(range(5, 5 + n)), [4, 3]) for n in (14, 15, 16)]
    requests = [(("", ""), context, continuation) for context, continuation in pairs]
    found = [one for one, _ in ours._loglikelihood_tokens(requests)]
    expected = [one for one, _ in theirs(model, tiny_tokenizer)._loglikelihood_tokens(requests)]
    assert found == pytest.approx(expected, abs=NATS)
    assert len({round(one, 3) for one in found}) == 3


def test_whole_texts_are_scored_in_lm_evals_windows(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    """No window twice: of two with the same tokens, differently split, lm-eval 0.4.13 scores one wrongly."""
    model = tiny_llama(initializer_range=0.4, max_position_embeddings=16)
    long = "Name the pastime of Wanda Zephyr, who lives in Karsk with a goat, a small parrot and the brave sailor Dova."
    texts = ["Copy these letters: a b c", long, "x"]
    requests = [request("loglikelihood_rolling", text) for text in texts]
    found = engine(model, tiny_tokenizer).loglikelihood_rolling(requests)
    assert len(tiny_tokenizer(long)["input_ids"]) > 2 * 16
    assert found == pytest.approx(theirs(model, tiny_tokenizer).loglikelihood_rolling(requests), abs=NATS)


def test_greedy_texts_are_those_of_lm_eval(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    """Up to a stop string, or to max_gen_toks; a prompt that must be cut to leave room."""
    model = tiny_llama(seed=3, initializer_range=0.4, max_position_embeddings=40)
    texts = [*TEXTS[1:], "What pet does Cirin Hale have? " * 6]
    free = engine(model, tiny_tokenizer).generate_until(
        [request("generate_until", text, {"until": [], "max_gen_toks": 12}) for text in texts]
    )
    stop = free[0][3:5]
    assert stop
    settings = [{"until": [stop], "max_gen_toks": 12}, {"until": [], "do_sample": False, "max_gen_toks": 7}]
    requests = [request("generate_until", text, how, document=n) for n, text in enumerate(texts) for how in settings]
    ours = engine(model, tiny_tokenizer)
    found = ours.generate_until(requests)
    one_by_one = [theirs(model, tiny_tokenizer).generate_until([one])[0] for one in requests]  # its padding is no part
    assert found == one_by_one
    assert found[0] == free[0][: free[0].index(stop)]
    assert ours.truncated == {"task": {4}}


def test_a_task_gives_lm_evals_figures(tiny_llama: Any, tiny_tokenizer: Any, task_file: Callable[..., Path]) -> None:
    """Shots from the same seed, the same prompts, the same accuracy and standard error, item by item."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from eval_harness.lm_eval_adapter import LmEvalSet, run

    rows = [
        {"question": f"Name the city of person {n}.", "choices": ["Corvo", "Karsk", "Orlo"], "answer_index": n % 3}
        for n in range(24)
    ]
    folder = task_file("cities", rows, **CHOICES)
    model = tiny_llama(initializer_range=0.4)
    expected = simple_evaluate(
        theirs(model, tiny_tokenizer),
        tasks=["cities"],
        num_fewshot=2,
        limit=20,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )
    one = LmEvalSet("mine", "cities", num_fewshot=2, include_path=str(folder), limit=20)
    found = run(model, tiny_tokenizer, [one])["mine"]
    assert list(found) == ["acc", "acc_norm"]
    for metric, result in found.items():
        assert result.value == expected["results"]["cities"][f"{metric},none"]
        assert result.stderr == pytest.approx(expected["results"]["cities"][f"{metric}_stderr,none"])
        samples = expected["samples"]["cities"]
        assert result.per_item == {sample["doc_hash"][:16]: sample[metric] for sample in samples}
        assert 0 < result.value < 1
