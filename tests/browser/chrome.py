"""A headless Chromium of the system that can reach nothing, driven by Selenium.

Binary and driver are named explicitly: left to itself, Selenium would look for a driver on the network.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.browser import audit

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

BINARIES = ("chromium", "chromium-browser")
DRIVER = "chromedriver"
PHONE = 375  # pixels: the narrowest screen that the pages are made for
LONGEST = 8000  # pixels of height in one picture

OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # the sandbox refuses to start as root, which CI is
    "--disable-dev-shm-usage",  # /dev/shm is 64 MB in a container
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


class Found(NamedTuple):
    """Where browser and driver lie; empty where one is missing, and `reason` says which."""

    binary: str = ""
    driver: str = ""
    reason: str = ""


def find() -> Found:
    """Chromium and its driver on PATH, of one version."""
    binary = next((path for name in BINARIES if (path := shutil.which(name))), "")
    driver = shutil.which(DRIVER) or ""
    if not (binary and driver):
        return Found(reason=f"no {DRIVER if binary else 'chromium'} on PATH")
    if find_spec("selenium") is None:
        return Found(reason="selenium is not installed")
    versions = [_version(path) for path in (binary, driver)]
    if versions[0] != versions[1]:
        return Found(reason=f"chromium is {versions[0]}, its driver {versions[1]}: they must be of one version")
    return Found(binary, driver)


def _version(path: str) -> str:
    said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    number = re.search(r"\d+(\.\d+)+", said)
    return number[0] if number else f"unknown ({said.strip()!r})"


@contextmanager
def browser(profile: Path, width: int = 1200, height: int = 900) -> Iterator[Chrome]:
    """A browser with a profile of its own in `profile` (an empty folder), closed at the end."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    found = find()
    if found.reason:
        raise RuntimeError(f"{found.reason}; on Debian: apt-get install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = found.binary
    for option in (*OPTIONS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(executable_path=found.driver))
    driver.set_page_load_timeout(60)
    driver.set_script_timeout(60)
    try:
        driver.get("about:blank")
        driver.get_log("performance")  # what the browser's own start page loaded
        yield driver
    finally:
        driver.quit()


def resize(driver: Chrome, width: int, height: int = 900) -> None:
    """Lay the page out at this many CSS pixels; a headless window itself is never narrower than 500."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width <= PHONE}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def appear(driver: Chrome, scheme: str = "light", medium: str = "screen") -> None:
    """What the page sees as the reader's colour scheme and as the medium (screen, print)."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": medium, "features": features})


def picture(driver: Chrome, file: Path, height: int | None = None) -> None:
    """A PNG of the page from its top: `height` pixels, or all of it up to LONGEST."""
    width, whole = driver.execute_script("return [innerWidth, document.documentElement.scrollHeight]")
    clip = {"x": 0, "y": 0, "width": width, "height": min(height or whole, LONGEST), "scale": 1}
    how = {"format": "png", "clip": clip, "captureBeyondViewport": True}
    file.write_bytes(base64.b64decode(driver.execute_cdp_cmd("Page.captureScreenshot", how)["data"]))


def walk(driver: Chrome, most: int = 400) -> list[dict[str, Any]]:
    """What Tab reaches, one after another from the top of the page: `at`, `name` and `visible` of `audit.FOCUSED`."""
    from selenium.webdriver import ActionChains, Keys

    driver.execute_script("document.activeElement?.blur(); window.reached = new Set(); scrollTo(0, 0)")
    reached: list[dict[str, Any]] = []
    for _ in range(most):
        ActionChains(driver, duration=0).send_keys(Keys.TAB).perform()
        here = driver.execute_script(audit.FOCUSED, audit.CONTROLS)
        if here is None:
            break
        reached.append(here)
    return reached


def requests(driver: Chrome) -> list[str]:
    """Addresses asked for since the last call, answered or not; data: and blob: are within the page."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith(("data:", "blob:"))]


def complaints(driver: Chrome) -> list[dict[str, Any]]:
    """What the console says since the last call: script errors, violations of the content policy, warnings."""
    return [entry for entry in driver.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]
