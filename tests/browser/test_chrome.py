"""What counts as a browser that the tests can use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser import chrome


def program(folder: Path, name: str, said: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\necho '{said}'\n")
    file.chmod(0o755)


def test_browser_and_driver_must_be_there_and_of_one_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("selenium")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert chrome.find().reason == "no chromium on PATH"
    program(tmp_path, "chromium", "Chromium 156.0.8078.79 built on Debian")
    assert chrome.find().reason == "no chromedriver on PATH"
    program(tmp_path, "chromedriver", "ChromeDriver 155.0.1.2 (a21ce95c)")
    assert chrome.find().reason == "chromium is 156.0.8078.79, its driver 155.0.1.2: they must be of one version"
    program(tmp_path, "chromedriver", "ChromeDriver 156.0.8078.79 (a21ce95c)")
    assert chrome.find() == (str(tmp_path / "chromium"), str(tmp_path / "chromedriver"), "")
