"""The page of `cpt compare --html` as a reader has it: at a desk, on a phone, in the dark, on paper, by keyboard."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cpt.report import compare_page
from cpt.report.compare import compare
from tests.browser import checks, chrome
from tests.browser.made import ARABIC, HAND, MEASURES, OWNED, SHOWN, STAGES, TASKS, write_run

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytestmark = pytest.mark.browser

KEPT = {name: [1.0, 1.0, 1.0, 1.0] for name in HAND} | {"text": [0.5, 0.5, 0.5, 0.5]}
LESS = KEPT | {"people": [0.0, 0.5, 0.5, 0.5], "facts": [1.0, 1.0, 1.0, 0.75]}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Groups of runs by hand, the first with a NaN, a missing cell and names that are code or Arabic."""
    folder = tmp_path_factory.mktemp("runs")
    groups = {
        OWNED: [write_run(folder / "hand", HAND, TASKS, stream=OWNED, measures=MEASURES)],
        ARABIC: [write_run(folder / f"{i}", KEPT, TASKS, stream=ARABIC, measures=MEASURES, seed=i) for i in (0, 1)],
        "less": [write_run(folder / "less", LESS, TASKS, measures=MEASURES, ratio=0.5)],
    }
    return compare_page.write(compare(groups), folder / "compare.html")


def test_it_stands_alone(driver: Chrome, page: Path) -> None:
    checks.stands_alone(driver, page)
    assert driver.title == "3 groups of runs compared"  # what the names would have changed


def test_it_shows_the_scores(driver: Chrome, page: Path) -> None:
    checks.open_page(driver, page)
    assert checks.cells(driver, STAGES, list(HAND)) == SHOWN


def test_it_is_readable(driver: Chrome, page: Path) -> None:
    checks.open_page(driver, page)
    checks.is_readable(driver, least_texts=150)


def test_every_colour_of_the_heat_map_is_readable(driver: Chrome, page: Path) -> None:
    checks.open_page(driver, page)
    paint = (
        "[...document.querySelectorAll('table.matrix td')].slice(0, 11).forEach((cell, i) => cell.className = `h${i}`)"
    )
    colours = (
        "new Set([...document.querySelectorAll('table.matrix td')].map(c => getComputedStyle(c).backgroundColor)).size"
    )
    assert driver.execute_script(f"{paint}; return {colours}") >= 11
    checks.is_readable(driver)


def test_it_fits_a_phone(driver: Chrome, page: Path) -> None:
    checks.fits_a_phone(driver, page)
    checks.scrolls_in_its_own_box(driver, "table.matrix")


def test_it_works_by_keyboard(driver: Chrome, page: Path) -> None:
    checks.works_by_keyboard(driver, page)


def test_its_theme_changes(driver: Chrome, page: Path) -> None:
    checks.changes_its_theme(driver, page)


def test_it_prints(driver: Chrome, page: Path) -> None:
    checks.prints(driver, page)


@pytest.mark.parametrize("width", [1200, chrome.PHONE])
def test_numbers_stay_beside_names_from_right_to_left(driver: Chrome, page: Path, width: int) -> None:
    checks.open_page(driver, page, width)
    checks.keeps_numbers_in_place(driver)


def test_thirty_runs_of_a_hundred_tasks(driver: Chrome, tmp_path: Path) -> None:
    tasks = [f"task{i}" for i in range(100)]
    cells = {name: [round(8 * (i * j % 7) / 7) / 8 for i in range(3)] for j, name in enumerate(tasks)}
    few = {f"run{i}": [write_run(tmp_path / f"run{i}", cells, tasks[:2], seed=i)] for i in range(30)}
    file = compare_page.write(compare(few, resamples=50), tmp_path / "many.html")
    begun = time.perf_counter()
    checks.stands_alone(driver, file)
    assert time.perf_counter() - begun < 5
    checks.fits_a_phone(driver, file)
    assert driver.execute_script("return document.querySelectorAll('table.matrix').length") == 30
