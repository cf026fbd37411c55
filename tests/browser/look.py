"""Pictures of a page: `python -m tests.browser.look FILE.html --out DIR` writes light, dark and phone PNGs."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.browser import chrome

VIEWS = {"light": (1200, "light", "screen"), "dark": (1200, "dark", "screen"), "phone": (375, "light", "screen")}
MORE = {"phone_dark": (375, "dark", "screen"), "print": (794, "light", "print")}  # 794 px: A4 at 96 dots an inch


def look(
    page: Path, out: Path, views: list[str] | None = None, height: int | None = None, prefix: str = ""
) -> list[Path]:
    """Write a PNG per view of `page` into `out`; gives the files. height: pixels from the top, None is all.

    Raises FileNotFoundError: there is no such page (the browser would draw that it misses it).
    """
    if not page.is_file():
        raise FileNotFoundError(f"{page}: no such page")
    known = VIEWS | MORE
    out.mkdir(parents=True, exist_ok=True)
    files = []
    with tempfile.TemporaryDirectory() as profile, chrome.browser(Path(profile)) as driver:
        for view in views or VIEWS:
            width, scheme, medium = known[view]
            chrome.resize(driver, width)
            chrome.appear(driver, scheme, medium)
            driver.get(page.resolve().as_uri())
            files.append(out / f"{prefix}{view}.png")
            chrome.picture(driver, files[-1], height)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, metavar="FILE.html")
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--views", nargs="+", choices=[*VIEWS, *MORE])
    parser.add_argument("--height", type=int, help="pixels from the top; default: the whole page")
    options = parser.parse_args()
    for file in look(options.page, options.out, options.views, options.height):
        print(file)


if __name__ == "__main__":
    main()
