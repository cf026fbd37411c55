"""`cpt report`: what the page and the markdown say, of a finished run, one under way, one with damaged files."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt.errors import RunDirError
from cpt.report import examples, facts, page
from cpt.report.headline import headline
from cpt.report.heatmap import FULL, heat_map, verdict
from cpt.report.markdown import markdown
from cpt.report.read import Score, points, read
from tests.browser.made import MISSING, write_run

SCRIPT = "<script>alert(1)<|script>"
ARABIC = "القراءة"
TASKS = ("people", SCRIPT, ARABIC)
HAND = {
    "people": [0.0, 0.75, 0.5, 0.25],
    SCRIPT: [0.25, 0.25, 1.0, math.nan],
    ARABIC: [0.0, MISSING, 0.5, 0.875],
    "facts": [1.0, 1.0, 0.75, 0.5],
    "text": [0.5, 0.625, 1.25, 2.0],
}


class Cells(HTMLParser):
    """The heat map's cells as they stand in the page: (stage, set) -> its texts, value first; and their titles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: dict[tuple[str, str], list[str]] = {}
        self.titles: dict[tuple[str, str], str] = {}
        self.classes: dict[tuple[str, str], list[str]] = {}
        self.here: tuple[str, str] | None = None
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        if tag == "td":
            self.here = (given["data-stage"], given["data-set"]) if "data-stage" in given else None
        if tag == "td" and self.here:
            self.texts[self.here] = []
            self.titles[self.here], self.classes[self.here] = given["title"], given.get("class", "").split()

    def handle_endtag(self, tag: str) -> None:
        self.here = None if tag == "td" else self.here

    def handle_data(self, data: str) -> None:
        if self.here and data.strip():
            self.texts[self.here].append(data.strip())


@pytest.fixture
def hand(tmp_path: Path) -> Path:
    """A finished run by hand, with a NaN, a missing cell, and names that are code or Arabic."""
    return write_run(tmp_path / "run", HAND, TASKS, measures={"text": "bits_per_byte"})


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A finished run of two tasks and a general set, of 160 items each."""
    cells = {"one": [0.05, 0.8, 0.3], "two": [0.1, 0.1, 0.9], "facts": [1.0, 0.9, 0.7]}
    return write_run(tmp_path / "plain", cells, ("one", "two"), items=160)


def written(run: Path) -> str:
    return page.write(run).read_text(encoding="utf-8")


# ---- the page ----------------------------------------------------------------------------------------


def test_the_heat_map_is_the_matrix(hand: Path) -> None:
    cells = Cells(written(hand))
    assert {place: texts[0] for place, texts in cells.texts.items()} == {
        ("base", "people"): "0.0", ("people", "people"): "75.0", (SCRIPT, "people"): "50.0", (ARABIC, "people"): "25.0",
        ("base", SCRIPT): "25.0", ("people", SCRIPT): "25.0", (SCRIPT, SCRIPT): "100.0", (ARABIC, SCRIPT): "NaN",
        ("base", ARABIC): "0.0", ("people", ARABIC): "-", (SCRIPT, ARABIC): "50.0", (ARABIC, ARABIC): "87.5",
        ("base", "facts"): "100.0", ("people", "facts"): "100.0", (SCRIPT, "facts"): "75.0", (ARABIC, "facts"): "50.0",
        ("base", "text"): "0.500", ("people", "text"): "0.625", (SCRIPT, "text"): "1.250", (ARABIC, "text"): "2.000",
    }  # fmt: skip
    assert cells.texts["people", "people"] == ["75.0", "[42.9, 100.0]", "+75.0 better"]
    assert cells.texts[ARABIC, ARABIC][2] == "+37.5 ~"  # .375 <= 1.96 sqrt(.25/7 + .109375/7)
    assert "not measured" in cells.titles["people", ARABIC]
    assert "NaN: the value is not a number" in cells.titles[ARABIC, SCRIPT]
    assert {place for place, kinds in cells.classes.items() if "own" in kinds} == {(name, name) for name in TASKS}


def test_colours_follow_the_measure(hand: Path) -> None:
    colours = {place: kinds[0] for place, kinds in Cells(written(hand)).classes.items() if kinds}
    assert (colours["base", "people"], colours["people", "people"], colours[SCRIPT, SCRIPT]) == ("h0", "h8", "h10")
    # Bits per byte against the base's .5: +25 % is not beyond the third step, +150 % and +300 % beyond the last.
    shades = [colours[stage, "text"] for stage in ("base", "people", SCRIPT, ARABIC)]
    assert shades == ["n0", "w2", "w5", "w5"]
    assert (ARABIC, SCRIPT) not in {place for place, kind in colours.items() if kind != "own"}


def test_a_name_is_no_code(hand: Path) -> None:
    text = written(hand)
    assert "<script>alert" not in text
    assert Cells(text).tags.count("script") == 1
    assert "style=" not in text.partition("<body>")[2]
    assert "http" not in text.replace("http-equiv", "")


def test_the_interval_of_a_share_and_of_a_loss() -> None:
    def score(value: float, stderr: float | None, n: int, definition: str = "exact_match@1()") -> Score:
        found = Score.of({"value": value, "stderr": stderr, "n": n, "definition": definition})
        assert found
        return found

    assert score(0.5, 0.1, 26).interval == pytest.approx((0.304, 0.696), abs=1e-3)
    assert score(0.95, 0.1, 26).interval == pytest.approx((0.754, 1.0), abs=1e-3)  # no share is above 1
    assert score(1.0, 0.0, 160).interval == pytest.approx((0.025 ** (1 / 160), 1.0))
    assert score(0.0, 0.0, 160).interval == pytest.approx((0.0, 1 - 0.025 ** (1 / 160)))
    assert score(1.4, 0.5, 9, "answer_loss@1()").interval == pytest.approx((0.42, 2.38), abs=1e-2)
    assert score(0.5, None, 1).interval is None
    assert score(1.4, 0.0, 9, "answer_loss@1()").interval is None  # a width of 0 would be a lie


@pytest.mark.parametrize(
    ("before", "now", "stderr", "higher", "said"),
    [
        (0.5, 0.8, 0.1, True, "better"),
        (0.5, 0.8, 0.1, False, "worse"),
        (0.8, 0.5, 0.1, False, "better"),
        (0.5, 0.77, 0.1, True, "~"),  # 1.96 sqrt(2) .1 = .277
        (0.5, 0.8, None, True, ""),
    ],
)
def test_a_change_is_judged_by_its_error_and_the_measure(
    before: float, now: float, stderr: float | None, higher: bool, said: str
) -> None:
    one, other = (Score(value, None, 9, stderr, "loss@1()", higher) for value in (now, before))
    assert verdict(one, other) == said


def test_the_headline_says_what_was_learned_and_kept(plain: Path) -> None:
    found = headline(read(plain))
    verdict = found.verdict.replace("\u00a0", " ")  # a line does not break within a figure
    assert verdict == "2 tasks learned (85 %), earlier ones now at 30 %, general average 100 \u2192 70 %"
    assert found.status == "finished: 2 stages trained and measured"
    assert [tile.figure for tile in found.tiles] == ["85.0", "30.0", "70.0"]
    assert (
        found.tiles[0].sentence == "Right after its stage a task stands at 85.0 % on average, right before it at 7.5 %."
    )
    assert "Lost: one \u221250.0 points." in found.tiles[1].sentence
    assert found.tiles[2].unit == "% (\u221230.0)"


def test_a_task_within_its_error_is_not_said_to_be_learned(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"one": [0.5, 0.55], "facts": [0.9, 0.89]}, ("one",), items=100)
    found = headline(read(run))
    assert found.verdict.startswith("0 of 1 task learned (55\u00a0%)")
    assert "Not learned, as far as the error tells: one." in found.tiles[0].sentence
    assert "None is worse beyond its error." in found.tiles[1].sentence


def test_a_general_set_that_is_no_share_is_said_to_be_lost(tmp_path: Path) -> None:
    cells = {"one": [0.1, 0.9], "facts": [0.9, 0.9], "text": [0.2, 1.4]}
    both = write_run(tmp_path / "both", cells, ("one",), items=100, measures={"text": "bits_per_byte"})
    tile = headline(read(both)).tiles[-1]
    assert (tile.figure, tile.sentence.split(". ")[1]) == ("90.0", "Lost: text +1.200.")
    alone = write_run(
        tmp_path / "alone",
        {name: cells[name] for name in ("one", "text")},
        ("one",),
        items=100,
        measures={"text": "bits_per_byte"},
    )
    tile = headline(read(alone)).tiles[-1]
    assert (tile.figure, tile.sentence) == ("-", "No share to average. Lost: text +1.200.")


def test_halves_are_rounded_alike_wherever_they_come_from() -> None:
    assert {points(share, "+") for share in (0.0125, 0.5125 - 0.5, 0.9125 - 0.9)} == {"+1.2"}
    assert points(-0.09749999999999996, "+") == points(-0.0975, "+") == "-9.8"


def test_a_run_that_measures_nothing_can_be_finished(plain: Path) -> None:
    (plain / "matrix.json").unlink()
    for file in plain.glob("stages/*/eval/*.json"):
        file.unlink()
    for done in plain.glob("stages/*/eval/DONE"):
        done.write_text(json.dumps({"plan": "0", "sets": [], "facts": {}}))
    view = read(plain)
    assert view.finished
    said = "finished: 2 stages trained; no test and no evaluation, so nothing was measured"
    assert headline(view).status == said


def test_cost_is_summed(plain: Path) -> None:
    view = read(plain)
    base, one, _, whole = facts.cost(view)
    assert base == ("0 base", "-", "1.5", "100 %", "-", "-", "-", "-")
    # 11 s in all and 1.5 s of evaluation after it; 14,000 tokens in 10 s of training; 2 MB
    assert one == ("1 one", "10.0", "1.5", "12 %", "14,000", "1,400", "0.50", "2.0")
    assert whole == ("all", "20.0", "4.5", "17 %", "28,000", "1,400", "0.50", "4.0")


def test_facts_and_origins(plain: Path) -> None:
    view = read(plain)
    assert facts.method_facts(view)[0] == ("1 one", "replay", "ratio 0.25", "rows 100")
    assert dict(facts.stage_facts(view)[0][1])["trained parameters"] == "541,536 of 541,536 (100 %)"
    assert facts.origins(view)[0][:5] == ("1 one", "sft", "1", "made/one:train", "800")
    assert dict(facts.provenance(view))["base"] == "tiny-world"


def test_superseded_stages_are_named(plain: Path) -> None:
    shutil.copytree(plain / "stages" / "01_one", plain / "stages" / "01_one.superseded-1")
    view = read(plain)
    assert view.superseded == ["01_one.superseded-1"]
    assert len(view.stages) == 3
    assert "01_one.superseded-1" in written(plain)


def test_drift_and_the_stability_gap_are_shown_where_they_were_measured(plain: Path) -> None:
    assert "Drift from the start" not in written(plain)
    matrix = json.loads((plain / "matrix.json").read_text())
    kl = {"n": 8, "stderr": 0.01, "definition": "forward_kl@1(nats_per_token,base,full_vocabulary,plain)"}
    for row in matrix["rows"]:
        row["scores"]["drift"] = {"forward_kl": kl | {"value": 0.1 * row["index"], "higher_is_better": False}}
    gap = {"min_acc": {"value": 0.125}, "wc_acc": {"value": None, "reason": "why"}}
    matrix["rows"][2]["within"] = {"every": 5, "rows": 32, "measures": {"exact_match": gap}}
    (plain / "matrix.json").write_text(json.dumps(matrix))
    text = written(plain)
    assert "Drift from the start" in text
    assert "nats per token" in text
    assert "drift" not in {name for _, name in Cells(text).texts}
    assert ("2 two", "12.5", "-", "-", "-", "-", "32", "5") in page.curves.gap_rows(read(plain))[1]


def test_curves_within_the_stages_are_joined(plain: Path) -> None:
    measures = {"exact_match": {"definition": "exact_match@1()", "higher_is_better": True, "n": 8}}
    known = {name: {"group": group, "measures": measures} for name, group in (("one", "task"), ("facts", "general"))}
    for index, name in ((1, "one"), (2, "two")):
        lines: list[dict[str, Any]] = [{"every": 10, "rows": 8, "steps": 20, "plan": "p", "sets": known}]
        lines += [
            {"step": s, "scores": {n: {"exact_match": s / 40 / index} for n in ("one", "facts")}} for s in (0, 10, 20)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (plain / "stages" / f"{index:02d}_{name}" / "within.jsonl").write_text(text + '{"step": 30')
    figure = page.curves.within_figure(read(plain), page.LIMITS[0])
    assert figure is not None
    assert figure.header == ("step", "facts", "one")
    assert [row[0] for row in figure.rows] == ["0", "10", "20", "30", "40"]
    assert figure.rows[3] == ("30", "12.5", "12.5")  # step 10 of the second stage
    assert "1 one" in figure.svg
    assert "2 two" in figure.svg


def test_a_long_log_is_thinned_and_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"one": [0.0, 1.0]}, ("one",), steps=1000)
    loss, *_ = page.curves.training_figures(read(run).stages[1], page.LIMITS[0])
    assert len(loss.rows) == 40
    assert (loss.rows[0][0], loss.rows[-1][0]) == ("1", "1000")
    assert loss.cut == "40 of 1000 lines, evenly spaced. All are in stages/01_one/metrics.jsonl."


def test_a_method_s_terms_are_drawn_by_name(plain: Path) -> None:
    log = plain / "stages" / "01_one" / "metrics.jsonl"
    log.write_text(
        "".join(json.dumps({"step": s, "loss": 1 / s, "replay/kept": s, "other/x": 1}) + "\n" for s in (1, 2))
    )
    titles = {one.title: one for one in page.curves.training_figures(read(plain).stages[1], page.LIMITS[0])}
    assert titles["Terms of the methods"].header == ("step", "replay/kept")
    assert "Rewards" not in titles


# ---- size --------------------------------------------------------------------------------------------


def test_a_large_run_is_cut_and_counted(tmp_path: Path) -> None:
    tasks = [f"task_{i:02d}" for i in range(60)]
    cells = {name: [(7 * i * j % 9) / 8 if i * j % 9 < 8 else 1.0 for i in range(61)] for j, name in enumerate(tasks)}
    cells |= {f"general_{j:02d}": cells[tasks[j]] for j in range(40)}
    run = write_run(tmp_path / "run", cells, tasks)
    text = written(run)
    assert len(text.encode()) < 2_000_000
    assert len(Cells(text).texts) == 100 * 61 > FULL
    assert (run / "report" / "report.md").stat().st_size < 60_000
    assert "more sets are in matrix.json" in (run / "report" / "report.md").read_text(encoding="utf-8")
    small = heat_map(read(run), 1000)
    assert (len(small.columns), small.cut) == (16, 84)


def test_what_is_too_large_is_made_again_with_less(plain: Path) -> None:
    view = read(plain)
    whole = page.html(view)
    assert len(page.html(view, largest=len(whole.encode()) - 1).encode()) < len(whole.encode())


def test_many_stages_are_cut_and_counted(tmp_path: Path) -> None:
    tasks = [f"stage_{i}" for i in range(50)]
    view = read(write_run(tmp_path / "run", {"stage_0": [0.5] * 51, "facts": [1.0] * 51}, tasks))
    text = page.html(view, largest=1)
    assert text.count("<details") < page.html(view).count("<details")
    assert "10 earlier stages are in their DONE" in text
    assert "12 earlier stages are counted in the sum" in text  # the base and the sum are lines of that table too
    assert "47 earlier stages are in their metrics.jsonl" in text


# ---- runs that are not whole -------------------------------------------------------------------------


def cut_off(run: Path, after: int) -> None:
    """As a run looks that has only measured so many stages."""
    matrix = json.loads((run / "matrix.json").read_text())
    matrix["rows"] = matrix["rows"][:after]
    (run / "matrix.json").write_text(json.dumps(matrix))
    for folder in sorted((run / "stages").iterdir())[after:]:
        shutil.rmtree(folder)


def test_nothing_has_begun(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    text = written(tmp_path)
    assert "no stage has begun, and nothing was measured" in text
    assert "run.json: is missing" in text
    assert "stream.yaml: is missing" in text


def test_only_the_base_was_measured(plain: Path) -> None:
    cut_off(plain, 1)
    view = read(plain)
    assert headline(view).verdict == "general average of the base 100\u00a0%"
    assert headline(view).status == "not finished: 0 of 2 stages trained; 1 one: to do"
    assert set(Cells(written(plain)).texts) == {("base", name) for name in ("one", "two", "facts")}
    assert facts.commands(view)[0] == ("go on with this run", ("cpt", "resume", str(plain)))


def test_a_stage_in_training_shows_how_far_it_is(plain: Path) -> None:
    cut_off(plain, 2)
    begun = plain / "stages" / "02_two"
    begun.mkdir()
    (begun / "stage.json").write_text(json.dumps({"kind": "sft", "training": {"max_steps": 60}}))
    (begun / "metrics.jsonl").write_text('{"step": 10, "loss": 2.5}\n{"step": 20, "loss": NaN}\n{"step": 3')
    view = read(plain)
    assert "2 two: in training or stopped: step 20 of 60" in headline(view).status
    text = written(plain)
    assert "in training or stopped: step 20 of 60, last line 2" in text
    assert "Loss of stage 2" in text
    assert view.problems == []  # an unfinished last line is being written


FILES = (
    "run.json", "stream.yaml", "matrix.json", "stages/00_base/stage.json", "stages/01_one/stage.json",
    "stages/01_one/DONE", "stages/01_one/metrics.jsonl", "stages/01_one/eval/DONE", "stages/01_one/eval/one.json",
)  # fmt: skip
NOT_REQUIRED = {"DONE", "metrics.jsonl", "one.json"}


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(plain: Path, name: str) -> None:
    (plain / name).unlink()
    text = written(plain)
    assert (f"{name}: is missing" in text) == (Path(name).name not in NOT_REQUIRED)
    assert Cells(text).texts["two", "one"][0] == "30.0"


@pytest.mark.parametrize("name", FILES)
def test_a_half_written_file_is_named(plain: Path, name: str) -> None:
    content = (plain / name).read_bytes()
    (plain / name).write_bytes(content[: len(content) // 2] + (b"\n\n{,\n" if name.endswith("jsonl") else b"\n: ["))
    text = written(plain)
    assert (name in text) == (Path(name).name != "one.json"), "items are for the examples only"
    assert Cells(text).texts["two", "one"][0] == "30.0"


def test_without_its_matrix_scores_come_from_the_stages(plain: Path) -> None:
    (plain / "matrix.json").unlink()
    view = read(plain)
    assert [view.score(row, "one").value for row in view.rows] == [0.05, 0.8, 0.3]  # type: ignore[union-attr]
    assert (view.tasks, view.general) == (["one", "two"], ["facts"])


@pytest.mark.parametrize("name", FILES)
def test_no_content_of_a_file_is_a_traceback(hand: Path, name: str) -> None:
    """Every value of its upper levels replaced by one of another kind."""
    file = hand / name.replace("one", "people")
    whole = file.read_text(encoding="utf-8")
    is_yaml, is_log = name.endswith("yaml"), name.endswith("jsonl")
    content = yaml.safe_load(whole) if is_yaml else json.loads(whole.partition("\n")[0] if is_log else whole)
    for wrong in (None, [], "x", math.nan, {"a": 1}):
        for changed in replaced(content, wrong, depth=2):
            file.write_text(yaml.safe_dump(changed) if is_yaml else json.dumps(changed) + "\n", encoding="utf-8")
            view = read(hand)
            page.html(view)
            markdown(view, headline(view))


def test_no_value_deep_in_a_file_is_a_traceback(plain: Path) -> None:
    with_items(plain, "facts", [[1, 1, 1, 0], [1, 0, 0, 0], [0, 1, 0, 1]], ROWS)
    items = plain / "stages" / "01_one" / "eval" / "facts.json"
    matrix, stream, result = plain / "matrix.json", plain / "stream.yaml", json.loads(items.read_text())
    result["exact_match"]["per_item"] = {"a": {"b": 1}, "c": None, "d": [2]}
    items.write_text(json.dumps(result))
    scores = json.loads(matrix.read_text())
    scores["rows"][1]["within"] = {"every": [], "measures": {"exact_match": {"min_acc": math.nan}, "acc": 3}}
    scores["summary"]["exact_match"] = {"average_performance": {"value": "x", "formula": ["AP"]}, "bwt_gem": 2}
    matrix.write_text(json.dumps(scores))
    for source in ({"rows": 7}, {"rows": [7]}, {"rows": ROWS, "fields": 1e400}, {"file": ["a"]}, {"task": {"a": 1}}, 3):
        plan = yaml.safe_load(stream.read_text())
        plan["evaluation"]["general"]["facts"] = source
        stream.write_text(yaml.safe_dump(plan))
        assert Cells(written(plain)).texts["one", "one"][0] == "80.0"


def replaced(content: Any, wrong: Any, depth: int) -> list[Any]:
    """The content with each of its values, down to `depth`, in turn replaced; of a list the first only."""
    found = [wrong]
    if depth and isinstance(content, dict):
        for key, value in list(content.items())[:8]:
            found += [{**content, key: part} for part in replaced(value, wrong, depth - 1)]
    elif depth and isinstance(content, list) and content:
        found += [[part, *content[1:]] for part in replaced(content[0], wrong, depth - 1)]
    return found


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="is no run directory"):
        page.write(tmp_path)


def test_a_folder_that_cannot_be_written_is_said(plain: Path) -> None:
    (plain / "report").write_text("a file where the folder should be")
    with pytest.raises(RunDirError, match="cannot be written"):
        page.write(plain)


# ---- examples ----------------------------------------------------------------------------------------

ROWS = [{"prompt": f"Say {i}", "completion": f" {i}"} for i in range(4)]


def with_items(run: Path, name: str, values: list[list[float]], rows: list[dict[str, str]]) -> None:
    """Give a set's items their ids and values after every stage, and the stream the rows they are of."""
    from eval_harness.rows import canonical

    stream = yaml.safe_load((run / "stream.yaml").read_text())
    stream["evaluation"]["general"][name] = {"rows": rows}
    (run / "stream.yaml").write_text(yaml.safe_dump(stream))
    for folder, by_item in zip(sorted((run / "stages").iterdir()), values, strict=True):
        file = folder / "eval" / f"{name}.json"
        result = json.loads(file.read_text())
        result["exact_match"]["per_item"] = {canonical(row).id: v for row, v in zip(ROWS, by_item, strict=True)}
        file.write_text(json.dumps(result))


def test_items_that_turned_are_counted_and_shown(plain: Path) -> None:
    with_items(plain, "facts", [[1, 1, 1, 0], [1, 0, 0, 0], [0, 1, 0, 1]], ROWS)
    found, notes = examples.turned(read(plain), 20)
    last, since_base, first = found
    assert [(one.after.index, one.before.index) for one in found] == [(2, 1), (2, 0), (1, 0)]
    by_set = [dict((name, (lost, won)) for name, lost, won in one.by_set)["facts"] for one in found]
    assert by_set == [(1, 2), (2, 1), (2, 0)]
    assert [one.prompt for one in last.lost_examples if one.name == "facts"] == ["Say 0"]
    assert [one.answer for one in last.won_examples if one.name == "facts"] == [" 1", " 3"]
    assert since_base.command is not None
    assert since_base.command.striptags() == f"cpt ask {plain} 'Say 0' --stages 0,2"
    assert first.compared == 2 * 160 + 4
    assert [note for note in notes if note.startswith("facts")] == []


def test_a_text_is_shown_only_of_the_row_that_was_asked(plain: Path) -> None:
    changed = [row | {"completion": " another"} for row in ROWS]
    with_items(plain, "facts", [[1, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0]], changed)
    found, _ = examples.turned(read(plain), 20)
    (one,) = (one for one in found[-1].lost_examples if one.name == "facts")
    assert (one.prompt, one.answer) == (None, None)


def test_rows_of_the_hub_are_not_fetched(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = yaml.safe_load((plain / "stream.yaml").read_text())
    stream["evaluation"]["general"]["facts"] = {"hub": "someone/facts", "split": "test"}
    (plain / "stream.yaml").write_text(yaml.safe_dump(stream))
    monkeypatch.setattr("eval_harness.sources._read_hub", lambda *_: pytest.fail("the Hub was asked"))
    _, notes = examples.turned(read(plain), 20)
    assert "facts: rows are shown by their ids: someone/facts lies on the Hub" in notes


def test_examples_are_capped(plain: Path) -> None:
    found, _ = examples.turned(read(plain), 5)
    assert sum(len(one.lost_examples) + len(one.won_examples) for one in found) <= 5
    assert sum(one.lost for one in found) > 5


# ---- markdown ----------------------------------------------------------------------------------------


def test_markdown_is_a_table_whatever_the_names(hand: Path) -> None:
    page.write(hand)
    text = (hand / "report" / "report.md").read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line.startswith("|")][:6]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert "\\<script\\>alert(1)\\<\\|script\\>" in table[0]
    assert "<script>" not in text
    assert table[3].startswith("| 1 people | **75.0** | 25.0 | - |")
    assert "NaN" in table[5]


# ---- the command -------------------------------------------------------------------------------------


@pytest.fixture
def cpt(root: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cpt", *map(str, arguments)]
        env = os.environ | {"PYTHONPATH": str(root)}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env)

    return call


def test_the_command_says_where_the_page_is(plain: Path, cpt: Callable[..., Any]) -> None:
    done = cpt("report", plain)
    assert done.returncode == 0
    assert "after stage" in done.stdout
    assert f"wrote {plain / 'report' / 'report.html'}" in done.stdout
    assert (plain / "report" / "report.md").is_file()


def test_the_command_works_on_what_is_not_whole(tmp_path: Path, plain: Path, cpt: Callable[..., Any]) -> None:
    (plain / "run.json").write_text("{")
    (plain / "matrix.json").write_text('{"rows": [')
    done = cpt("report", plain, plain)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"no table: {plain / 'matrix.json'}: is damaged" in done.stdout
    assert f"cpt compare {plain} {plain}" in done.stdout
    for other in ("[]", '{"rows": 3}'):
        (plain / "matrix.json").write_text(other)
        done = cpt("report", plain)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"matrix.json: is damaged (it is no matrix of scores); `cpt resume {plain}`" in done.stdout
    (plain / "matrix.json").unlink()
    assert f"matrix.json: is missing; `cpt resume {plain}` writes it again" in cpt("report", plain).stdout
    assert cpt("report", tmp_path / "nothing").returncode == 3
