"""Curves as SVG: where points lie, what a gap does, what is kept of a long one; every colour has readable ink."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.report.charts import SHARE, SLOTS, SMALL, Curve, legend, line_chart, number, thinned
from cpt.report.scaffold import ASSETS

LEAST_CONTRAST = 4.5  # WCAG 2.1, 1.4.3, level AA


def drawn(*curves: Curve, **more: object) -> ET.Element:
    options: dict[str, object] = {"x_label": "", "description": "", "size": SMALL, "y_range": SHARE} | more
    return ET.fromstring(str(line_chart(curves, **options)))  # type: ignore[arg-type]


def paths(svg: ET.Element, kind: str) -> list[str]:
    return [one.get("d", "") for one in svg.iter("path") if kind in one.get("class", "").split()]


def test_points_lie_where_the_axes_say() -> None:
    svg = drawn(Curve("a", ((0, 0.0), (1, 100.0), (2, 50.0))))
    left, right = SMALL.left + 6, SMALL.width - SMALL.right
    low, high = SMALL.height - SMALL.bottom, SMALL.top
    places = [(left, low), ((left + right) / 2, high), (right, (low + high) / 2)]
    assert paths(svg, "curve") == ["M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)]
    assert len(paths(svg, "full")) == 3


def test_a_missing_number_is_a_gap() -> None:
    (path,) = paths(drawn(Curve("a", ((0, 10.0), (1, None), (2, 20.0), (3, 30.0)))), "curve")
    assert re.sub(r"[\d. ]+", "", path) == "MML"


def test_intervals_are_drawn_where_there_are_some() -> None:
    curve = Curve("a", ((0, 50.0), (1, 50.0), (2, None)), spans=((25.0, 75.0), None, (0.0, 1.0)))
    (path,) = paths(drawn(curve), "spread")
    assert path.count("M") == 1
    assert paths(drawn(Curve("a", ((0, 50.0),))), "spread") == []


def test_an_axis_reaches_over_what_is_still_to_come() -> None:
    svg = drawn(Curve("a", ((0, 0.0), (1, 1.0))), x_ticks=[(0, "0"), (1, "1"), (4, "4")])
    (path,) = paths(svg, "curve")
    end = float(path.rpartition("L")[2].split()[0])
    left, right = SMALL.left + 6, SMALL.width - SMALL.right
    assert end == pytest.approx(left + (right - left) / 4, abs=0.05)


def test_names_are_escaped() -> None:
    curve = Curve("<script>&", ((0, 1.0), (1, 2.0)))
    for text in (line_chart([curve], x_label="<b>", description='"<i>'), legend([curve, curve])):
        assert not {"<script>", "<b>", "<i>"} & set(re.findall(r"<\w+>", text))
        ET.fromstring(str(text))


def test_curves_are_told_apart_without_colour() -> None:
    css = (ASSETS / "report.css").read_text(encoding="utf-8")
    dashes = {css.split(f".s{slot} {{")[1].split("--d: ")[1].split(";")[0] for slot in range(SLOTS)}
    markers = {
        str(legend([Curve("", (), slot)] * 2)).split("</path>")[0].rpartition("<path")[2] for slot in range(SLOTS)
    }
    assert len(dashes) == SLOTS
    assert len({re.sub(r"s\d", "", one) for one in markers}) == SLOTS


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=300), st.integers(4, 60))
def test_a_long_curve_keeps_its_extremes_and_ends(ys: list[float | None], most: int) -> None:
    points = [(float(x), y) for x, y in enumerate(ys)]
    kept = thinned(points, most)
    assert len(kept) <= most or len(points) <= most
    assert {points[0], points[-1]} <= set(kept) <= set(points)
    known = [y for y in ys if y is not None]
    if known:
        assert {min(known), max(known)} <= {y for _, y in kept}
    assert list(kept) == sorted(kept, key=lambda point: point[0])


def test_numbers() -> None:
    assert [number(value) for value in (None, -0.5, 12345.0, 0.00012)] == ["-", "\u22120.5", "12,345", "0.00012"]


# ---- colours -----------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Relative, of #rgb or #rrggbb (WCAG 2.1)."""
    digits = colour.lstrip("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


PAIR = r"light-dark\((#\w+), (#\w+)\)"
CELL = re.compile(rf"^\.([hbwn]\d+) {{ background: {PAIR}; color: {PAIR}; }}", re.MULTILINE)
STYLES = "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in ("page.css", "report.css"))


def test_every_colour_of_a_cell_has_ink_that_is_readable_on_it() -> None:
    found = {name: colours for name, *colours in CELL.findall(STYLES)}
    wanted = {"n0", *(f"h{i}" for i in range(11)), *(f"{kind}{i}" for kind in "bw" for i in range(1, 6))}
    assert set(found) == wanted
    weak = [name for name, c in found.items() if min(contrast(c[0], c[2]), contrast(c[1], c[3])) < LEAST_CONTRAST]
    assert weak == []


def test_curves_stand_out_from_the_paper() -> None:
    paper = re.search(rf"--paper: {PAIR}", STYLES)
    assert paper
    curves = re.findall(rf"--c(\d): {PAIR}", STYLES)
    assert len(curves) == SLOTS
    weak = [slot for slot, *colours in curves if min(map(contrast, colours, paper.groups())) < 3]  # WCAG 1.4.11
    assert weak == []


def test_the_ratio_is_that_of_the_standard() -> None:
    assert contrast("#fff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#fff") == pytest.approx(4.478, abs=1e-3)
