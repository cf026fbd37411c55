"""Two real ranks agree, fail alike, measure as one, and one that dies ends the other in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launcher import two_ranks
from tests.distributed.processes_worker import scores

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank wrote."""
    folder = tmp_path_factory.mktemp("agree")
    code, printed = two_ranks("processes_worker", "agree", folder=folder, timeout=300)
    assert code == 0, printed[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_ranks_agree(answers: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(answers):
        assert found["gather"] == [{"rank": 0}, {"rank": 1}]
        assert found["broadcast"] == "from 0"
        assert found["any"] == [True, False]
        assert found["on_main"] == [0]
        assert found["held"] == ([0] if rank == 0 else [])  # only the first took the lock
        assert found["together"] == rank


def test_ranks_end_with_the_same_error(answers: list[dict[str, Any]]) -> None:
    zero, one = answers
    assert zero["main_fails"] == ["ConfigError", ["a = 1: no", "b = 2: no"], False]
    assert one["main_fails"] == ["ConfigError", ["a = 1: no", "b = 2: no"], True]
    assert zero["one_fails"] == ["DataError", ["its own"], True]
    assert one["one_fails"] == ["DataError", ["its own"], False]
    assert zero["both_fail"] == ["DataError", ["of 0"], False]
    assert one["both_fail"] == ["DataError", ["of 0"], True]
    assert zero["main_breaks"][:2] == ["KeyError", ["'missing'"]]
    assert one["main_breaks"][:2] == ["RuntimeError", ["process 0 of this run failed: KeyError: 'missing'"]]


def test_ranks_measure_what_one_process_measures(
    answers: list[dict[str, Any]], tiny_tokenizer: Any, tiny_llama: Any
) -> None:
    alone = scores(tiny_llama(), tiny_tokenizer)
    assert answers[0]["scores"] == answers[1]["scores"]
    for name, measures in alone.items():
        for key, one in measures.items():
            two = answers[0]["scores"][name][key]
            assert list(two["per_item"]) == list(one["per_item"])
            assert list(two["per_item"].values()) == pytest.approx(list(one["per_item"].values()), abs=1e-5)
            assert two["value"] == pytest.approx(one["value"], abs=1e-5)
            assert two["n"] == one["n"] == len(one["per_item"])


def test_a_late_rank_makes_what_the_first_makes(tmp_path: Path) -> None:
    """It finds on disk what the first has written meanwhile, and makes its own part all the same."""
    code, printed = two_ranks("processes_worker", "late", folder=tmp_path, timeout=120)
    assert code == 0, printed[-4000:]
    zero, one = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert zero == one
    assert (one["made"], one["found"], one["said"]) == (["computed", "written"], [1.0, 1.0], {"asked": 1})


def test_a_dead_rank_ends_the_other_in_words(tmp_path: Path) -> None:
    code, printed = two_ranks("processes_worker", "lost", folder=tmp_path, timeout=300)
    assert code != 0
    survivor = json.loads((tmp_path / "survivor.json").read_text())
    assert survivor["error"] == "TrainingError"
    assert "another process of this run ended" in survivor["problems"][0]
    assert survivor["seconds"] < 15  # noticed by the closed connection, not by a time-out
    assert "exitcode  : -9" in printed  # torchrun names the one that died
