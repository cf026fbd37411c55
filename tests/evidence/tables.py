"""What the evidence pages share: their command, figures with intervals over seeds, and the places of table and data."""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from scipy import stats

from cpt import Run, Stream, run

OUT = Path(__file__).parents[2] / "docs" / "evidence"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"


def over_seeds(
    doc: str | None, streams: Callable[[int, Path], dict[str, Stream]], figures: Callable[[Run], Any]
) -> tuple[int, dict[str, list[Any]]]:
    """A page's command: run the streams of every seed, finished ones are kept; (seeds, stream -> figures by seed)."""
    import torch

    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the tiny model's matrices are too small to share
    data: dict[str, list[Any]] = {}
    for seed in range(arguments.seeds):
        for name, stream in streams(seed, arguments.runs).items():
            print(f"seed {seed}: {name}", flush=True)
            data.setdefault(name, []).append(figures(run(stream, say=lambda line: None)))
    return arguments.seeds, data


def exact_match(matrix: dict[str, Any], row: int, name: str) -> float:
    """Share in per cent of a set after one row of a run's matrix (0 is the base)."""
    return 100 * matrix["rows"][row]["scores"][name]["exact_match"]["value"]


def spread(values: Iterable[float], digits: int = 1) -> str:
    """Mean and the half-width of its 95 % t-interval over seeds; the mean alone where there is one."""
    values = [float(value) for value in values]
    mean = statistics.mean(values)
    return f"{mean:.{digits}f}" if len(values) < 2 else f"{mean:.{digits}f} ± {half_width(values):.{digits}f}"


def half_width(values: Iterable[float]) -> float:
    """Half of the 95 % t-interval of the mean; needs two values."""
    values = [float(value) for value in values]
    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def line(*cells: str) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def rule(cells: int) -> str:
    """The row beneath a table's head."""
    return "|" + "---|" * cells


def publish(name: str, data: dict[str, Any], lines: list[str], page: str | None = None) -> None:
    """Write the data of a page, its table or the whole `page` anew, and print the table."""
    (OUT / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    if page is None:
        replace_table(OUT / f"{name}.md", lines)
    else:
        (OUT / f"{name}.md").write_text(page, encoding="utf-8")
    print("\n".join(lines))


def replace_table(page: Path, lines: list[str]) -> None:
    """Put the lines between the page's two marks. Raises ValueError where a mark is missing."""
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page}: needs the lines {BEGIN.strip()} and {END.strip()} around its table")
    head, tail = text.split(BEGIN)[0], text.split(END)[-1]
    page.write_text("\n".join([head + BEGIN.strip(), *lines, END + tail]), encoding="utf-8")
