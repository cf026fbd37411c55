"""The questions asked of our pages notice what they are there for: every offence of this page, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.browser import audit, chrome

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytestmark = pytest.mark.browser

# Relative luminance of #777 is .1845, of #767676 .1812: 4.48 and 4.54 to one on white.
BAD = """<!doctype html><html lang="en"><head><meta name="viewport" content="width=device-width">
<style>
  :root { color-scheme: light dark; background: #fff; color: #222 }
  @media (prefers-color-scheme: dark) { :root { background: #111; color: #eee } }
  .bare:focus { outline: none }
</style>
<script src="https://example.org/lost.js"></script></head><body>
<p>fine</p><p style="color: #767676; background: #fff">just fine</p>
<p style="color: #777; background: #fff">grey</p>
<p style="opacity: .4">faint</p>
<p style="background: #fff; color: #222"><span style="background: rgba(0, 0, 0, .75)">blended</span></p>
<svg width="200" height="60">
  <rect width="200" height="30" fill="#333"></rect>
  <text x="10" y="20" fill="#fff">on dark</text><text x="10" y="50" fill="#888">off it</text>
</svg>
<div style="width: 500px">sticks out</div>
<div style="overflow: auto"><div style="width: 500px">scrolls</div></div>
<p>Beside <a href="#here">links in a line</a> there is <button style="width: 20px">!</button></p>
<button class="bare" style="width: 60px; height: 30px">bare</button>
<p>القراءة 3.5</p><p><bdi>2 القراءة</bdi></p><p><bdi>القراءة</bdi> 4.5</p><p><bdi>القراءة</bdi><b> 5.5</b></p>
</body></html>"""


@pytest.fixture(scope="module")
def bad(driver: Chrome, tmp_path_factory: pytest.TempPathFactory) -> Chrome:
    file = tmp_path_factory.mktemp("bad") / "bad.html"
    file.write_text(BAD, encoding="utf-8")
    chrome.resize(driver, chrome.PHONE)
    chrome.appear(driver, "light")
    driver.get(file.as_uri())
    return driver


def test_contrast(bad: Chrome) -> None:
    found = bad.execute_script(audit.CONTRAST, 4.5)
    assert [line.split('"')[1] for line in found["found"]] == ["grey", "faint", "blended", "off it"]
    assert found["found"][0].startswith("4.48")
    chrome.appear(bad, "dark")
    found = bad.execute_script(audit.CONTRAST, 4.5)
    assert [line.split('"')[1] for line in found["found"]] == ["grey", "faint", "blended"]
    chrome.appear(bad, "light")


def test_what_sticks_out(bad: Chrome) -> None:
    assert bad.execute_script(audit.TOO_WIDE) == ["DIV. to 508"]


def test_small_targets(bad: Chrome) -> None:
    (found,) = bad.execute_script(audit.SMALL_TARGETS, audit.CONTROLS, 24)
    assert found.startswith('BUTTON "!"')


def test_focus_that_is_not_seen(bad: Chrome) -> None:
    reached = chrome.walk(bad)
    assert [(one["name"], one["visible"]) for one in reached] == [
        ('DIV "scrolls"', True),
        ('A "links in a line"', True),
        ('BUTTON "!"', True),
        ('BUTTON "bare"', False),
    ]
    assert [one["at"] for one in reached[1:]] == bad.execute_script(audit.VISIBLE_CONTROLS, audit.CONTROLS) == [0, 1, 2]


def test_numbers_that_a_name_from_right_to_left_has_moved(bad: Chrome) -> None:
    assert bad.execute_script(audit.DISPLACED) == ['"القراءة" and "3.5"', '"2" and "القراءة"']
    assert bad.execute_script(audit.MIXED) == ["القراءة 3.5"]


def test_requests_and_complaints(bad: Chrome) -> None:
    bad.refresh()
    assert "https://example.org/lost.js" in chrome.requests(bad)
    assert any("lost.js" in entry["message"] for entry in chrome.complaints(bad))
