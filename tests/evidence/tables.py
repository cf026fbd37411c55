"""What the evidence pages share: a figure with its interval over seeds, and the place of a table in a page."""

import statistics
from collections.abc import Iterable
from pathlib import Path

from scipy import stats

BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"


def spread(values: Iterable[float], digits: int = 1) -> str:
    """Mean and the half-width of its 95 % t-interval over seeds; the mean alone where there is one."""
    values = [float(value) for value in values]
    mean = statistics.mean(values)
    return f"{mean:.{digits}f}" if len(values) < 2 else f"{mean:.{digits}f} ± {half_width(values):.{digits}f}"


def half_width(values: Iterable[float]) -> float:
    """Half of the 95 % t-interval of the mean; needs two values."""
    values = [float(value) for value in values]
    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def replace_table(page: Path, lines: list[str]) -> None:
    """Put the lines between the page's two marks. Raises ValueError where a mark is missing."""
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page}: needs the lines {BEGIN.strip()} and {END.strip()} around its table")
    head, tail = text.split(BEGIN)[0], text.split(END)[-1]
    page.write_text("\n".join([head + BEGIN.strip(), *lines, END + tail]), encoding="utf-8")
