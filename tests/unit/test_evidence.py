"""The figures of the evidence pages, against ones worked out by hand."""

from pathlib import Path
from typing import Any

import pytest

from cpt import Stream
from tests.evidence import classic_stream, retention, retention_real
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


# ---- retention --------------------------------------------------------------------------------------


def point(learned: float, general: float, kept: float = 0.0) -> retention.Point:
    return retention.Point(learned, general, kept)


def test_between_two_rates_a_curve_is_straight() -> None:
    """From (50, 90, 40) to (80, 30, 10): a third of the way is (60, 70, 30)."""
    curve = [point(80, 30, 10), point(50, 90, 40)]
    assert retention.at_score(curve, 60) == point(60, pytest.approx(70), pytest.approx(30))
    assert retention.at_score(curve, 80) == point(80, 30, 10)
    assert retention.at_score(curve, 81) is None
    assert retention.at_score(curve, 49) is None


def kept_run(learned: float, general: float) -> dict[str, Any]:
    """A run's record: four tasks, the first three of which have half of what was learned at the end."""
    end = [learned / 2] * 3 + [learned]
    return {"general": [99.0, general], "base": [0.0] * 4, "learned": [learned] * 4, "end": end, "seconds": 1.0}


def test_the_retention_table_by_hand() -> None:
    """Two seeds, 10 apart in general ability; learned is 50, 65, 95 at the three rates, general 90, 60, 30."""
    runs = {}
    for seed in (0, 1):
        for rate, learned, general in zip(retention.RATES, (50.0, 65.0, 95.0), (90.0, 60.0, 30.0), strict=True):
            for name in retention.METHODS:
                runs[retention.key(name, rate, seed)] = kept_run(learned, general + 10 * seed)
            for task in retention.TASKS:
                alone = kept_run(learned, general)
                runs[retention.key(f"specialist {task}", rate, seed)] = alone | {"end": [learned + seed]}
            runs[f"joint-{rate:g}-s{seed}"] = kept_run(learned, general)
    lines = retention.table(runs, 2)
    # at 60: 90 + 2/3 x (60 - 90) = 70 and 80; at 70: 60 + 1/6 x (30 - 60) = 55 and 65; half of the score is kept
    interval = half_width([70.0, 80.0])
    assert f"| hft | 95.0 ± 0.0 | 75.0 ± {interval:.1f} | 30.0 ± 0.0 | 60.0 ± {interval:.1f} | 35.0 ± 0.0 |" in lines
    (seen,) = [line for line in lines if line.startswith("Standard deviation")]
    assert "pooled over methods: 7.1 points; two methods must differ by 30.4 points for 2 seeds each" in seen
    assert any(line.startswith("| reverse | 0.0 | 50.5") and line.endswith("| yes |") for line in lines)


def test_rates_are_picked_on_rows_that_are_not_the_tests(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name, n in (("streams/a.train", 30), ("text/tinystories.train", 560), ("streams/a.test", 5)):
        (data / f"{name}.jsonl").parent.mkdir(parents=True, exist_ok=True)
        (data / f"{name}.jsonl").write_text("".join(f"{name} {i}\n" for i in range(n)))
    stages = [{"name": "a", "data": {"file": "streams/a.{split}.jsonl", "limit": 20}}]
    to = retention_real.held_out(data, {"stages": stages}, tmp_path / "held_out")
    lines = {file.name: file.read_text().splitlines() for file in to.rglob("*.jsonl")}
    assert lines["a.train.jsonl"] == [f"streams/a.train {i}" for i in range(16)]
    assert lines["a.test.jsonl"] == [f"streams/a.train {i}" for i in range(16, 20)]
    assert len(lines["tinystories.train.jsonl"]) == retention_real.REPLAYED
    assert lines["tinystories.test.jsonl"][0] == "text/tinystories.train 500"
    assert len(lines["tinystories.test.jsonl"]) == 40


def real(*learned: float) -> dict[str, Any]:
    """A run over tasks a and b: each right after its stage; a has half of it at the end, stories cost 1.5 bits."""
    rows = [{"a": {ACCURACY: 0.0}, "b": {ACCURACY: 0.0}, "tinystories": {"bits_per_byte": 1.0}}]
    for left in (learned, (learned[0] / 2, learned[1])):
        scores = {name: {ACCURACY: share} for name, share in zip("ab", left, strict=True)}
        rows.append(scores | {"tinystories": {"bits_per_byte": 1.5}})
    return {"rows": rows, "seconds": {}}


def test_each_takes_the_rate_at_which_it_learned_most() -> None:
    names = (*retention_real.METHODS, retention_real.JOINT)
    picking = {f"{name} {rate:g}": real(0.2, 0.2) for name in names for rate in retention_real.RATES}
    picking["hft 0.003"] = real(0.8, 0.4)
    rates = retention_real.best_rates(picking, ["a", "b"])
    assert rates["hft"] == 3e-3
    assert rates["sequential"] == 3e-4  # of equal ones the lowest
    runs: dict[str, Any] = {name: [real(0.6, 0.4), real(0.8, 0.4)] for name in names}
    runs |= {f"specialist {task}": runs["sequential"] for task in "ab"}
    lines = retention_real.table(runs, picking, rates, {"a": 25.0, "b": 39.0})
    ends = f"35.0 ± {half_width([30.0, 40.0]):.1f} | 40.0 ± 0.0"
    new, kept = (f"{mean} ± {half_width([0.0, apart]):.1f}" for mean, apart in ((55.0, 10.0), (37.5, 5.0)))
    assert f"| hft | 0.003 | {new} | {kept} | {ends} | 1.50 ± 0.00 |" in lines
    assert "| hft | 20.0 / 15.0 / 1.50 | 20.0 / 15.0 / 1.50 | 60.0 / 40.0 / 1.50 |" in lines
    assert "| b | 39.0 | 40.0 ± 0.0 | no | yes |" in lines  # one point above: certain, and too little


def test_the_streams_of_a_method_differ_in_it_alone(tmp_path: Path) -> None:
    raw = classic_stream.recipe(tmp_path, tmp_path, tmp_path)
    parsed = {
        name: Stream.parse(retention_real.stream(raw, name, 1e-3, 2))
        for name in (*retention_real.METHODS, retention_real.JOINT)
    }
    kinds = {name: [[m.type for m in stage.methods] for stage in one.stages] for name, one in parsed.items()}
    assert kinds["sequential"] == [[]] * 3
    assert kinds["hft + gere, margin"] == [["hft", "gere"]] * 3
    assert kinds["joint"] == [[]]
    assert set(parsed["joint"].eval_sources()) == set(parsed["sequential"].eval_sources())
    assert len({one.name for one in parsed.values()}) == len(parsed)
