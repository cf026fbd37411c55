"""Continual post-training and unlearning of language models: a stream of stages over one model.

from cpt import Stream, run
run(Stream.from_yaml("recipes/quickstart.yaml"))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpt.command import as_command
    from cpt.config import EvalSource, Evaluation, Retention, Source, Stage, Stream
    from cpt.errors import ConfigError, CptError, DataError, RunDirError, Stopped, TrainingError
    from cpt.methods.base import Method
    from cpt.report.page import write as write_report
    from cpt.report.summary import text as summarize
    from cpt.run_dir import Run
    from cpt.stream import run

__version__ = "0.1.0"

# Lazy, so that `import cpt`, `cpt --help` and validation never pay for torch.
_HOME = {
    "Stream": "cpt.config",
    "Stage": "cpt.config",
    "Source": "cpt.config",
    "EvalSource": "cpt.config",
    "Evaluation": "cpt.config",
    "Retention": "cpt.config",
    "Method": "cpt.methods.base",
    "Run": "cpt.run_dir",
    "run": "cpt.stream",
    "as_command": "cpt.command",
    "summarize": "cpt.report.summary:text",
    "write_report": "cpt.report.page:write",
    "CptError": "cpt.errors",
    "ConfigError": "cpt.errors",
    "DataError": "cpt.errors",
    "RunDirError": "cpt.errors",
    "TrainingError": "cpt.errors",
    "Stopped": "cpt.errors",
}

__all__ = [
    "ConfigError",
    "CptError",
    "DataError",
    "EvalSource",
    "Evaluation",
    "Method",
    "Retention",
    "Run",
    "RunDirError",
    "Source",
    "Stage",
    "Stopped",
    "Stream",
    "TrainingError",
    "__version__",
    "as_command",
    "run",
    "summarize",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        module, _, attribute = _HOME[name].partition(":")
        return getattr(import_module(module), attribute or name)
    raise AttributeError(f"module 'cpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
