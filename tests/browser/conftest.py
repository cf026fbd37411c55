"""One browser per module, with a profile of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from tests.browser import chrome

if TYPE_CHECKING:
    from selenium.webdriver import Chrome


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory, require: Callable[[str, bool, str], None]) -> Iterator[Chrome]:
    """Chromium; the test is skipped, or fails where CPT_REQUIRE names `browser`, without it."""
    found = chrome.find()
    require("browser", not found.reason, found.reason)
    with chrome.browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened
