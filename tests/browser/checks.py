"""What every page of ours must be, asserted in the browser that has it open."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tests.browser import audit, chrome

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

LEAST_CONTRAST = 4.5  # WCAG 2.1, 1.4.3, level AA
LEAST_TARGET = 24  # CSS pixels: WCAG 2.2, 2.5.8, level AA
LARGEST = 2_000_000  # bytes of a page


def open_page(driver: Chrome, file: Path, width: int = 1200) -> None:
    """Load `file` anew, light, at this width; forgets what was asked for and said before."""
    chrome.resize(driver, width)
    chrome.appear(driver)
    chrome.requests(driver), chrome.complaints(driver)
    driver.get(file.as_uri())


def stands_alone(driver: Chrome, file: Path) -> None:
    """It renders, asks for nothing but itself, breaks no rule of its own content policy, and runs without an error."""
    open_page(driver, file)
    assert chrome.requests(driver) == [file.as_uri()]
    assert chrome.complaints(driver) == []
    loaded = driver.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert loaded == []
    policy = "return document.querySelector('meta[http-equiv=Content-Security-Policy]')?.content ?? ''"
    assert "default-src 'none'" in driver.execute_script(policy)
    assert file.stat().st_size < LARGEST
    assert driver.execute_script("return document.querySelectorAll('h1').length") == 1


def is_readable(driver: Chrome, least_texts: int = 20) -> None:
    """Every text, that within closed details too, stands out enough in both themes."""
    driver.execute_script("document.querySelectorAll('details').forEach(one => one.open = true)")
    for scheme in ("light", "dark"):
        chrome.appear(driver, scheme)
        found = driver.execute_script(audit.CONTRAST, LEAST_CONTRAST)
        assert found["found"] == [], scheme
        assert found["seen"] >= least_texts
    chrome.appear(driver)


def fits_a_phone(driver: Chrome, file: Path) -> None:
    """At 375 pixels the page does not scroll sideways, and a finger can hit what it offers."""
    open_page(driver, file, chrome.PHONE)
    driver.execute_script("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert driver.execute_script(audit.TOO_WIDE) == []
    assert driver.execute_script("return document.scrollingElement.scrollWidth") <= chrome.PHONE
    assert driver.execute_script(audit.SMALL_TARGETS, audit.CONTROLS, LEAST_TARGET) == []


def scrolls_in_its_own_box(driver: Chrome, selector: str) -> None:
    """What is wider than the page moves under its first column, which stays in sight."""
    moved = driver.execute_script(
        """
        const table = document.querySelector(arguments[0]);
        let box = table;
        while (box && box.scrollWidth <= box.clientWidth + 1) box = box.parentElement;
        if (!box || box === document.scrollingElement || box === document.body) return null;
        const [head, cell] = table.querySelectorAll('tbody tr:last-child > *');
        const before = [head, cell].map(part => part.getBoundingClientRect().left);
        box.scrollLeft = 60;
        const after = [head, cell].map(part => part.getBoundingClientRect().left);
        box.scrollLeft = 0;
        return after.map((left, i) => left - before[i]);
        """,
        selector,
    )
    assert moved is not None, f"{selector}: nothing around it scrolls by itself"
    assert abs(moved[0]) < 1.5, "the first column is carried away"
    assert moved[1] <= -30, "the other columns do not move"


def works_by_keyboard(driver: Chrome, file: Path) -> None:
    """Tab reaches every control, in the order of the page, and one sees where it is."""
    open_page(driver, file)
    reached = chrome.walk(driver)
    assert [one["name"] for one in reached if not one["visible"]] == []
    controls = [one["at"] for one in reached if one["at"] >= 0]
    assert controls == driver.execute_script(audit.VISIBLE_CONTROLS, audit.CONTROLS)
    assert len(controls) >= 2


def changes_its_theme(driver: Chrome, file: Path) -> None:
    """The button turns the theme of the system into the other one, and back."""
    from selenium.webdriver.common.by import By

    paper = "return getComputedStyle(document.documentElement).backgroundColor"
    for scheme in ("light", "dark"):
        open_page(driver, file)
        chrome.appear(driver, scheme)
        seen = [driver.execute_script(paper)]
        for _ in range(2):
            driver.find_element(By.ID, "theme").click()
            seen.append(driver.execute_script(paper))
        assert seen[0] == seen[2] != seen[1]
    chrome.appear(driver)


def prints(driver: Chrome, file: Path) -> None:
    """On paper there are no controls, and the theme is light whatever the screen had."""
    open_page(driver, file)
    chrome.appear(driver, "dark", "print")
    visible = "return [...document.querySelectorAll('button, summary')].filter(one => one.checkVisibility()).length"
    assert driver.execute_script(visible) == 0
    paper = driver.execute_script("return getComputedStyle(document.documentElement).backgroundColor")
    assert paper == "rgb(255, 255, 255)"
    chrome.appear(driver)
    assert driver.execute_script(visible) > 0


def keeps_numbers_in_place(driver: Chrome) -> None:
    """A number beside a name in Arabic stays on its side of it, and every such name is set apart from its line."""
    driver.execute_script("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert driver.execute_script("return /[\\u0600-\\u06ff]/.test(document.body.innerText)"), "no name in Arabic"
    assert driver.execute_script(audit.DISPLACED) == []
    assert driver.execute_script(audit.MIXED) == []


def cells(driver: Chrome, stages: Sequence[str], sets: Sequence[str]) -> dict[tuple[str, str], str]:
    """(stage, set) -> value of the first heat map of these sets, as it is rendered, by the headers of rows and columns.

    A header's name is its `bdi`; a cell's value its `.value`, or the first word of it.
    """
    heads, rows = driver.execute_script(
        """
        const name = cell => (cell.querySelector('bdi') ?? cell).innerText.trim();
        const value = cell => (cell.querySelector('.value') ?? cell).innerText.trim().split(/\\s+/)[0];
        const heads = table => [...table.tHead.rows[0].cells].map(name);
        const table = [...document.querySelectorAll('table')]
          .find(table => table.tHead && arguments[0].every(set => heads(table).includes(set)));
        const rows = [...table.tBodies[0].rows].map(row => [name(row.cells[0]), ...[...row.cells].slice(1).map(value)]);
        return [heads(table), rows];
        """,
        list(sets),
    )
    assert [row[0] for row in rows] == list(stages)
    places = [heads.index(name) for name in sets]
    return {(row[0], name): row[at] for row in rows for name, at in zip(sets, places, strict=True)}
