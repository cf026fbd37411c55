"""A reward teaches: sums that the base gets wrong half the time, within seconds, by the command line."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.processes import cpt
from tests.evidence.rewarded import streams

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The evidence's first stream, a hundred steps, seed 0."""
    folder = tmp_path_factory.mktemp("rewarded")
    stream = streams(0, folder / "runs")["reward alone"]
    (folder / "stream.yaml").write_text(stream.to_yaml(), encoding="utf-8")
    code, printed = cpt(["run", "stream.yaml"], folder)
    assert code == 0, printed
    assert "reward 0." in printed
    (found,) = (folder / "runs").glob("rewarded0-*")
    return found


def lines(run: Path) -> list[dict[str, Any]]:
    text = (run / "stages" / "01_sums" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_the_last_quarter_is_rewarded_more_than_the_first(run: Path) -> None:
    rewards = [line["reward"] for line in lines(run) if "reward" in line]
    assert len(rewards) == 100
    first, last = rewards[:25], rewards[-25:]
    error = ((statistics.variance(first) + statistics.variance(last)) / 25) ** 0.5
    assert statistics.mean(last) - statistics.mean(first) > 5 * error


def test_what_was_never_rewarded_is_answered_better(run: Path) -> None:
    """The third phrasing of the same pairs; 54 % of 35 rows before, 84 ± 15 after (docs/evidence/rewarded.md)."""
    rows = json.loads((run / "matrix.json").read_text())["rows"]
    before, after = (row["scores"]["sums"]["exact_match"]["value"] for row in rows)
    assert 0.46 <= before <= 0.68
    assert after - before > 0.1


def test_the_record_says_how_it_was_rewarded(run: Path) -> None:
    done = json.loads((run / "stages" / "01_sums" / "DONE").read_text())["facts"]
    assert done["rewards"] == {"exact_match": {"rows": 6400, "raised": 0, "first": None}}
    record = json.loads((run / "stages" / "01_sums" / "stage.json").read_text())
    (reward,) = record["stage"]["rewards"]
    assert reward == {
        "type": "exact_match",
        "name": None,
        "weight": 1.0,
        "arguments": {"ignore_case": False, "pattern": None},
    }
    resolved = yaml.safe_load((run / "stream.yaml").read_text())
    assert resolved["stages"][0]["kl"] == {"to": "off", "weight": 0.04}
