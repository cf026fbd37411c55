"""The figures of the evidence pages, against ones worked out by hand."""

from pathlib import Path
from typing import Any

import pytest

from cpt import Stream
from tests.evidence import classic_stream
from tests.evidence.classic_stream import ACCURACY, LOSS, Results
from tests.evidence.tables import half_width, replace_table, spread


def test_the_interval_is_students() -> None:
    """Three values, mean 2 and deviation 1: 4.303 x 1 / sqrt 3."""
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / 3**0.5, abs=1e-4)
    assert spread([1.0, 2.0, 3.0]) == "2.0 ± 2.5"
    assert spread([0.125], 2) == "0.12"


def test_a_table_takes_its_place_again_and_again(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table -->\nold\n<!-- end of table -->\nafter\n")
    for lines in (["one"], ["two", "three"]):
        replace_table(page, lines)
    assert page.read_text() == "before\n<!-- table -->\ntwo\nthree\n<!-- end of table -->\nafter\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="needs the lines"):
        replace_table(page, lines)


def row(accuracy: float, loss: float) -> dict[str, dict[str, float]]:
    scores = {ACCURACY: accuracy, LOSS: loss}
    return {"a": scores, "b": scores, "tinystories": {"bits_per_byte": loss}}


def test_forgetting_is_what_was_learned_less_what_is_left() -> None:
    """Two tasks, one seed: a is right 80 % after its stage and 30 % at the end, b 30 % at the end."""
    rows = [row(0.1, 3.0), row(0.8, 0.5), row(0.3, 1.5)]
    runs: dict[str, Any] = {name: [{"rows": rows}] for name in ("joint", *classic_stream.VARIANTS)}
    runs |= {"specialist a": [{"rows": rows[:2]}], "specialist b": [{"rows": [rows[0], rows[2]]}]}
    lines = classic_stream.table(Results(runs, ["a", "b"]), {"a": 25.0, "b": 25.0})
    assert "| majority class | 25.0 | 25.0 | 25.0 |  |  |" in lines
    assert "| base | 10.0 | 10.0 | 10.0 | 3.00 | 3.00 |" in lines
    assert "| specialists, one a task | 80.0 | 30.0 | 55.0 | 1.00 | 1.00 |" in lines
    assert "| naive | 80.0 → 30.0 | 30.0 → 30.0 | 50.0 |" in lines
    assert "| naive | 0.50 → 1.50 | 1.50 → 1.50 | 1.00 |" in lines
    assert "| a | 25.0 | 80.0 | yes | no |" in lines  # one seed has no interval
    assert "| b | 25.0 | 30.0 | no | no |" in lines


def test_the_streams_differ_in_their_methods_only(tmp_path: Path) -> None:
    parts = classic_stream.streams(classic_stream.recipe(tmp_path, tmp_path, tmp_path), seed=2)
    parsed = {name: Stream.parse(part) for name, part in parts.items()}
    kinds = {name: [[m.type for m in stage.methods] for stage in parsed[name].stages] for name in parsed}
    assert kinds["naive"] == [[]] * 3
    assert kinds["hft + replay"] == [["hft", "replay", "replay"]] * 3
    assert kinds["joint"] == kinds["specialist dbpedia"] == kinds["specialist svamp"] == [[]]
    steps = parsed["naive"].training["max_steps"]
    assert parsed["joint"].stages[0].training["max_steps"] == 3 * steps
    assert set(parsed["joint"].eval_sources()) == set(parsed["naive"].eval_sources())
    assert len({stream.name for stream in parsed.values()}) == len(parsed)
    assert {stream.seed for stream in parsed.values()} == {2}
