"""The metrics as modules of Hugging Face `evaluate`: `evaluate.load(metric_path("bwt_gem"))`, without network.

Each folder NAME holds NAME.py, one class over a function of `eval_harness.metrics`. `evaluate` copies that file into
its own cache and imports it from there, so it imports eval_harness as an installed package, and by whole modules: of
the classes that a file names, `evaluate` takes the first.
"""

from __future__ import annotations

from pathlib import Path

from eval_harness.suggest import did_you_mean

_HERE = Path(__file__).parent


def metric_names() -> list[str]:
    """What `metric_path` knows, sorted: the folders beside this file."""
    return sorted(file.parent.name for file in _HERE.glob("*/*.py") if file.stem == file.parent.name)


def metric_path(name: str) -> str:
    """The folder that `evaluate.load` takes for a metric.

    Raises:
        ValueError: there is no such metric.
    """
    names = metric_names()
    if name not in names:
        raise ValueError(f"no metric {name!r}: {did_you_mean(name, names)}must be one of {', '.join(names)}")
    return str(_HERE / name)
