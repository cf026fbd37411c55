"""The page of `cpt report` as a reader has it: at a desk, on a phone, in the dark, on paper, by keyboard."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cpt.report.page import write
from tests.browser import checks, chrome
from tests.browser.made import HAND, MEASURES, OWNED, SHOWN, STAGES, TASKS, write_run

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by hand: a NaN, a missing cell, names that are code or Arabic, a stage that is still in training."""
    run = write_run(tmp_path_factory.mktemp("run") / "hand", HAND, TASKS, stream=OWNED, measures=MEASURES)
    begun = run / "stages" / "04_begun"
    begun.mkdir()
    (begun / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    return write(run)


def test_it_stands_alone(driver: Chrome, page: Path) -> None:
    checks.stands_alone(driver, page)
    assert driver.title != "owned"
    assert driver.execute_script("return document.querySelectorAll('img, iframe, object, embed').length") == 0


def test_its_heat_map_is_the_matrix(driver: Chrome, page: Path) -> None:
    checks.open_page(driver, page)
    assert checks.cells(driver, STAGES, list(HAND)) == SHOWN


def test_it_is_readable(driver: Chrome, page: Path) -> None:
    checks.open_page(driver, page)
    checks.is_readable(driver, least_texts=150)


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


def test_a_hundred_tasks_and_sixty_stages(driver: Chrome, tmp_path: Path) -> None:
    """Tests of forty stages are not there yet; the page opens within 5 s and still fits a phone."""
    names = [f"task{i}" for i in range(100)]
    cells = {name: [i * j % 9 / 8 for i in range(61)] for j, name in enumerate(names)}
    run = write_run(tmp_path / "large", cells | {"kept": [1.0] * 61}, names[:60], items=8)
    file = write(run)
    begun = time.perf_counter()
    checks.stands_alone(driver, file)
    assert time.perf_counter() - begun < 5
    checks.fits_a_phone(driver, file)


@pytest.mark.parametrize("damage", ["no stage", "half a matrix", "no matrix"])
def test_what_is_missing_is_said(driver: Chrome, tmp_path: Path, damage: str) -> None:
    run = write_run(tmp_path / "run", HAND, TASKS, measures=MEASURES)
    matrix = json.loads((run / "matrix.json").read_text(encoding="utf-8"))
    if damage == "no stage":
        (run / "matrix.json").write_text(json.dumps(matrix | {"rows": matrix["rows"][:1]}))
    elif damage == "half a matrix":
        (run / "matrix.json").write_text((run / "matrix.json").read_text(encoding="utf-8")[:400], encoding="utf-8")
    else:
        (run / "matrix.json").unlink()
    checks.stands_alone(driver, write(run))
