"""Processes of a launch: one is immediate, what a launcher leaves out is named, errors travel by kind."""

from __future__ import annotations

import os
import signal

import pytest

from eval_harness.errors import ScoringError
from eval_harness.launched import LaunchError, Ranks, start, stop_requests
from eval_harness.lineage import LoadError


def test_one_process_needs_nobody() -> None:
    ranks = start(environ={})
    assert (ranks.rank, ranks.world, ranks.is_main) == (0, 1, True)
    assert ranks.gather("x") == ["x"]
    assert ranks.on_main(lambda: 3) == ranks.together(lambda: 3) == 3
    with pytest.raises(LoadError, match="mine"):
        ranks.together(lambda: (_ for _ in ()).throw(LoadError("mine")))
    ranks.end()


def test_a_launcher_that_says_half_is_refused() -> None:
    with pytest.raises(
        LaunchError, match=r"WORLD_SIZE = 2, but LOCAL_RANK, MASTER_PORT is not set\. Start with torchrun"
    ):
        start(environ={"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"})


def test_the_error_of_the_lowest_rank_is_everybodys() -> None:
    other = Ranks(1, 3, errors=(LoadError, ScoringError))
    with pytest.raises(LoadError, match="no folder"):
        other._agree(ValueError("mine"), [("LoadError", "no folder"), ("ValueError", "mine"), None])
    own = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught:
        other._agree(own, [None, ("ValueError", "mine"), None])
    assert caught.value is own
    with pytest.raises(LaunchError, match="process 2: KeyError: 'x'"):
        other._agree(None, [None, None, ("KeyError", "'x'")])
    other._agree(None, [None, None, None])


def test_the_first_signal_asks_and_the_second_stops() -> None:
    with stop_requests() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop(), stop.signal) == (True, signal.SIGTERM)
