"""The page of a comparison: its Pareto front, its plot, what differs between streams, its words and verdicts."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from typer.testing import CliRunner

from cpt.cli import app
from cpt.errors import ConfigError
from cpt.report import compare_page
from cpt.report.compare import compare, labels
from cpt.report.pareto import front, plasticity, trade_offs
from cpt.report.plane import Axis, Dot, plane
from cpt.report.stream_diff import differing
from tests.browser.made import write_run

# Few distinct values, so that ties and equal points are common.
POINTS = some.lists(some.tuples(some.integers(-3, 3), some.integers(-3, 3)), max_size=12)

# R by hand, a task's score after the base and after each stage; P is (3/4 + 1/2) / 2, BWT_GEM is 1/4 - 3/4.
NAIVE = {"one": [0.0, 0.75, 0.25], "two": [0.0, 0.0, 0.5], "kept": [1.0, 0.5, 0.25]}
REPLAY = {"one": [0.0, 0.5, 0.5], "two": [0.0, 0.125, 0.375], "kept": [1.0, 1.0, 0.875]}
WORSE = {"one": [0.0, 0.5, 0.25], "two": [0.0, 0.0, 0.25], "kept": [1.0, 0.25, 0.25]}
TASKS = ("one", "two")


# ---- the front ---------------------------------------------------------------------------------------


@given(POINTS)
def test_the_front_is_what_nothing_dominates(points: list[tuple[int, int]]) -> None:
    """By the definition, written the long way round."""
    best = front(points)
    for i, (x, y) in enumerate(points):
        better = [(a, b) for a, b in points if (a > x and b >= y) or (a >= x and b > y)]
        assert (i in best) == (not better)
        assert i in best or any(point in [points[j] for j in best] for point in better)
    assert [points[i][0] for i in best] == sorted(points[i][0] for i in best)
    falling = [points[i][1] for i in best]
    assert falling == sorted(falling, reverse=True)


@given(POINTS, some.randoms(use_true_random=False))
def test_the_front_depends_on_neither_order_nor_scale(points: list[tuple[int, int]], chance: Any) -> None:
    found = {points[i] for i in front(points)}
    shuffled = points.copy()
    chance.shuffle(shuffled)
    assert {shuffled[i] for i in front(shuffled)} == found
    scaled = [(math.exp(x), y**3 - 7.0) for x, y in points]
    assert {points[i] for i in front(scaled)} == found


def test_the_front_by_hand() -> None:
    assert front([]) == []
    assert front([(0.0, 0.0)]) == [0]
    #              best of x   on it     behind 1     best of y   equal to 1
    assert front([(4.0, 1.0), (2.0, 3.0), (2.0, 2.0), (1.0, 5.0), (2.0, 3.0)]) == [3, 1, 4, 0]
    with pytest.raises(ValueError, match=r"points\[1\] = \(nan, 1.0\): both coordinates must be finite"):
        front([(0.0, 0.0), (math.nan, 1.0)])


# ---- plasticity against stability --------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Three runs by hand that were trained unlike."""
    folder = tmp_path_factory.mktemp("runs")
    made = {"naive": (NAIVE, 0.0, 20), "replay": (REPLAY, 0.25, 20), "worse": (WORSE, 0.5, 10)}
    return {
        name: [write_run(folder / name, cells, TASKS, stream=name, ratio=ratio, steps=steps)]
        for name, (cells, ratio, steps) in made.items()
    }


def test_trade_offs_by_hand(runs: dict[str, list[Path]]) -> None:
    against_general, against_earlier = trade_offs(compare(runs))
    spots = {spot.label: spot for spot in against_general.spots}
    x = {label: spot.x.value for label, spot in spots.items() if spot.x}
    assert x == pytest.approx({"naive": 0.625, "replay": 0.4375, "worse": 0.375})
    assert [spot.y.value for spot in spots.values() if spot.y] == pytest.approx([-0.75, -0.125, -0.75])
    assert [label for label, spot in spots.items() if spot.on_front] == ["naive", "replay"]
    assert all(spot.x.low < spot.x.value < spot.x.high for spot in spots.values())  # type: ignore[union-attr,operator]
    assert (against_earlier.y.name, against_earlier.x.name) == ("BWT_GEM", "P")
    assert [spot.y.value for spot in against_earlier.spots if spot.y] == [-0.5, 0.0, -0.25]


def test_plasticity_is_resampled_as_the_matrix_is(runs: dict[str, list[Path]]) -> None:
    """Its resamples are the means of those of R[1][one] and R[2][two], drawn here again."""
    from cpt.report.compare import RunFiles, _Draws

    read = [RunFiles.read(paths[0]) for paths in runs.values()]
    draws = _Draws(read, 200, 0)
    learned = plasticity(compare(runs, resamples=200))
    assert learned is not None
    assert learned.drawn is not None
    for at in range(len(read)):
        cells = [draws.of(name, "exact_match")[at][row] for name, row in (("one", 1), ("two", 2))]  # type: ignore[index]
        assert learned.drawn[:, at] == pytest.approx(np.mean(cells, axis=0))


def test_where_lower_is_better_the_front_is_where_losses_are_small(tmp_path: Path) -> None:
    losses = {"quick": [3.0, 1.0, 2.0], "slow": [3.0, 2.0, 2.5], "kept": [1.0, 1.0, 1.0]}
    names = dict.fromkeys(("one", "two"), "answer_loss")
    made = {
        name: [write_run(tmp_path / name, {"one": by, "two": [3.0, 3.0, by[1]], "kept": [1.0, 0.5, 0.5]}, TASKS,
                         stream=name, measures=names)]
        for name, by in losses.items() if name != "kept"
    }  # fmt: skip
    _, against_earlier = trade_offs(compare(made))
    assert [spot.x.value for spot in against_earlier.spots if spot.x] == [1.0, 2.0]
    assert [spot.y.value for spot in against_earlier.spots if spot.y] == [-1.0, -0.5]
    assert all(spot.on_front for spot in against_earlier.spots)  # quick learns more, slow forgets less
    against_general, _ = trade_offs(compare(made))
    assert [spot.on_front for spot in against_general.spots] == [True, False]  # the same is kept, quick learns more


def test_one_task_has_no_backward_transfer_and_a_nan_no_place(tmp_path: Path) -> None:
    made = {
        name: [write_run(tmp_path / name, {"one": [0.0, learned], "kept": [1.0, 0.5]}, ("one",), stream=name)]
        for name, learned in (("good", 0.75), ("broken", math.nan))
    }
    (only,) = trade_offs(compare(made))
    good, broken = only.spots
    assert (only.y.name, good.x and good.x.value, good.on_front) == ("dG_i", 0.75, True)
    assert (broken.x, broken.on_front) == (None, False)
    assert broken.reason == "P: not finite: R[1][1] = nan"


# ---- what differs between streams --------------------------------------------------------------------


def stage(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "kind": "sft", "methods": [], "training": {}} | more


def test_what_differs_is_said_where_it_differs() -> None:
    replay = {"type": "replay", "ratio": 0.25, "earlier": None}
    a = {"name": "a", "seed": 0, "training": {"max_steps": 10}, "stages": [stage("x"), stage("y")]}
    b = {"name": "b", "seed": 0, "training": {"max_steps": 10, "packing": True}}
    b["stages"] = [stage("x", methods=[replay]), stage("y", methods=[replay])]
    assert differing([a, b]) == [
        ("training.packing", ("-", "true")),
        ("stages.*.methods", ("-", "[{type: replay, ratio: 0.25}]")),
    ]
    c = b | {"stages": [stage("x", methods=[replay]), stage("y", methods=[replay | {"ratio": 0.5}])]}
    assert differing([b, c]) == [("stages.y.methods.replay.ratio", ("0.25", "0.5"))]
    turned = b | {"stages": list(reversed(b["stages"]))}
    assert differing([b, turned]) == [("order of stages", ("x, y", "y, x"))]
    assert differing([a, a, a]) == []


def test_a_long_value_is_cut() -> None:
    ((key, values),) = differing([{"prompt": "a" * 500}, {"prompt": "b"}])
    assert (key, len(values[0]), values[1]) == ("prompt", 160, "b")
    assert values[0].endswith("...")


# ---- the plot ----------------------------------------------------------------------------------------


@given(some.floats(-1e6, 1e6), some.floats(1e-6, 1e6))
def test_ticks_are_few_and_round(low: float, width: float) -> None:
    axis = Axis.around([low, low + width], 0.0, 100.0)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 7
    assert all(axis.low - 1e-9 * abs(low) <= tick <= axis.high + 1e-9 * abs(low) for tick in ticks)
    step = ticks[1] - ticks[0]
    assert float(f"{step:.0e}") == pytest.approx(step, rel=1e-3, abs=1e-9 * abs(low))
    assert f"{step:.0e}"[0] in "125"


def test_the_front_is_drawn_through_its_points() -> None:
    """The axes hold 0 to 1 and 8 % beyond: x from 50 to 406 pixels, y from 274 up to 12."""
    dots = [Dot("a", "", 0.0, 1.0, on_front=True), Dot("b", "", 1.0, 0.0, on_front=True), Dot("c", "", 0.0, 0.0)]
    x, y = ({v: start + (v + 0.08) / 1.16 * (end - start) for v in (0, 1)} for start, end in ((50, 406), (274, 12)))
    right = f"M50.0 {y[1]:.1f}V{y[1]:.1f}H{x[0]:.1f}V{y[0]:.1f}H{x[1]:.1f}V274.0"
    assert f'class="front" d="{right}"' in plane(dots, "x", "said")
    losses = [Dot("a", "", 1.0, 1.0, on_front=True), Dot("b", "", 0.0, 0.0, on_front=True)]
    left = f"M406.0 {y[1]:.1f}V{y[1]:.1f}H{x[1]:.1f}V{y[0]:.1f}H{x[0]:.1f}V274.0"
    assert f'class="front" d="{left}"' in plane(losses, "x", "said", more_is_right=False)


def test_labels_stay_in_the_plot_and_off_each_other() -> None:
    dots = [Dot(f"name{i}", "", 1.0 + 1e-3 * i, 1.0) for i in range(4)] + [Dot("<b>", "", 0.0, 0.0)]
    drawn = plane(dots, "x", "said")
    places = [(float(x), float(y)) for x, y in re.findall(r'class="label" x="([\d.]+)" y="([\d.]+)"', drawn)]
    assert len({place for place in places}) == 5
    assert all(50 <= x <= 406 and 12 <= y <= 274 for x, y in places)
    assert "&lt;b&gt;" in drawn
    assert "<b>" not in drawn


# ---- the page ----------------------------------------------------------------------------------------


def text_of(page: str) -> str:
    """What a reader sees, in a line."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    body = re.sub(r"</?(bdi|span|code)\b[^>]*>", "", body)  # these stand within a line
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", body)))


def test_it_says_who_is_on_the_front_and_what_it_cost(runs: dict[str, list[Path]]) -> None:
    said = text_of(compare_page.html(compare(runs)))
    assert "General ability: naive and replay are on the Pareto front; worse is behind it." in said
    # Two stages of 20 steps: 2 x 10 s, 2 x 14,000 tokens, 2 x 2 MB; measured three times for 1.5 s.
    assert "naive 20.0 4.5 28,000 1,400 0.50 4.0" in said
    assert "stages.*.methods.replay.ratio 0.0 0.25 0.5" in said
    assert "To repeat this page cpt compare" in said


def test_better_and_worse_are_those_of_the_measure(tmp_path: Path) -> None:
    """B's losses are half of A's, so is what it forgets."""
    a = {"one": [4.0, 1.0, 2.0], "two": [4.0, 4.0, 2.0], "kept": [1.0, 1.0, 2.0]}
    b = {name: [value / 2 for value in by_row] for name, by_row in a.items()}
    measures = dict.fromkeys(a, "answer_loss")
    paths = [
        write_run(tmp_path / name, cells, TASKS, stream=name, measures=measures) for name, cells in (("a", a), ("b", b))
    ]
    for pair, verdict in ((paths, "better"), (paths[::-1], "worse")):
        said = text_of(compare_page.html(compare(labels(pair))))
        for name in ("one", "two", "kept", "AP", "BWT_GEM", "F_max", "dG_i"):
            line = said[said.index(f" {name} ", said.index("Scores, with")) :]
            assert re.match(rf" {name} \S+ \[\S+\] \S+ \[\S+\] \S+ \[\S+\] {verdict}", line), (name, line[:80])


def test_verdicts_need_an_interval_beyond_0(runs: dict[str, list[Path]]) -> None:
    said = text_of(compare_page.html(compare({name: runs[name] for name in ("naive", "replay")})))
    kept = said[said.index("kept 25.0") :].split("%")[0]
    assert re.match(r"kept 25.0 \[\S+ 87.5 \[\S+ \+62.5 \[\S+ better", kept)
    two = said[said.index("two 50.0") :]
    assert re.match(r"two 50.0 \[\S+ 37.5 \[\S+ -12.5 \[\S+ General", two)


def test_what_is_cut_is_counted(runs: dict[str, list[Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_page, "MOST_CELLS", 3 * 3 * 2)
    monkeypatch.setattr(compare_page, "MOST_VALUES", 3)
    said = text_of(compare_page.html(compare(runs)))
    assert "naive, the first 2 of 3 sets; all are in its matrix.json" in said
    assert "1 more are in the files" in said


def test_without_a_plot_it_says_why(tmp_path: Path) -> None:
    made = [write_run(tmp_path / name, {"one": [0.0, 0.5]}, ("one",), stream=name) for name in ("a", "b")]
    said = text_of(compare_page.html(compare(labels(made))))
    assert (
        "No plot: no run has finite scores of both; what was kept is said by a general set or by a second task." in said
    )
    general = [write_run(tmp_path / f"{n}2", {"kept": [1.0, 0.5]}, ("x",), stream=n) for n in ("a", "b")]
    assert "No plot: no task has a score in every run." in text_of(compare_page.html(compare(labels(general))))


def test_its_command_makes_it_again(runs: dict[str, list[Path]]) -> None:
    paths = [path for by in runs.values() for path in by]
    grouped = compare({"it's": paths[:1], "rest": paths[1:2]})

    def command(page: str) -> list[str]:
        return shlex.split(text_of(page).split("To repeat this page")[1])

    assert command(compare_page.html(grouped, "exact_match")) == [
        "cpt", "compare", "--group", f"it's={paths[0]}", "--group", f"rest={paths[1]}", "--measure",
        "exact_match", "--html", "compare.html",
    ]  # fmt: skip
    plain = compare_page.html(compare(labels(paths)))
    assert command(plain) == ["cpt", "compare", *map(str, paths), "--html", "compare.html"]


def test_the_command(runs: dict[str, list[Path]], tmp_path: Path) -> None:
    paths = [str(path) for by in runs.values() for path in by]
    file = tmp_path / "new" / "page.html"
    shell = CliRunner()
    done = shell.invoke(app, ["compare", *paths, "--html", str(file)], catch_exceptions=False)
    assert done.stdout.splitlines()[0] == "A  naive: seed 0"  # the table as before
    assert done.stdout.splitlines()[-1] == f"wrote {file}"
    assert "3 runs compared" in file.read_text(encoding="utf-8")
    done = shell.invoke(app, ["compare", *paths, "--html", str(file), "--json"], catch_exceptions=False)
    assert json.loads(done.stdout)["first"] == "naive"
    with pytest.raises(
        ConfigError, match=r"--html .*new: cannot be written \(Is a directory\); give the name of a file"
    ):
        shell.invoke(app, ["compare", *paths, "--html", str(file.parent)], catch_exceptions=False)


def test_it_loads_no_training_code(root: Path) -> None:
    code = "import sys, cpt.report.compare_page; sys.exit(sum(m in sys.modules for m in ('torch', 'scipy', 'trl')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
