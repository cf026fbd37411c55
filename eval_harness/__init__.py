"""Everything that only looks at a model: rows, prompts, scores, measures. Imports nothing of cpt.

The public names load on first use (PEP 562), so that `import eval_harness` costs milliseconds and
works where torch is not installed. The function that ties it together is `eval_harness.measure.measure`:
a package attribute of that name would be the module or the function depending on what was imported first.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval_harness.cache import Cache, CacheError
    from eval_harness.errors import Interrupted, ScoringError
    from eval_harness.generation import Generation, generate
    from eval_harness.hf import metric_names, metric_path
    from eval_harness.loading import Loaded, LoadError, TokenizerError, check_tokenizer, load
    from eval_harness.measure import MEASURES, EvalSet, MeasureError
    from eval_harness.prompts import Encoded, PromptError, Prompting, encode, prompt_ids
    from eval_harness.results import SCHEMA_VERSION, Result
    from eval_harness.rows import Row, RowError, canonical, content_key, normalise
    from eval_harness.scoring import Score, score
    from eval_harness.sources import SourceError, fingerprint, read_rows

_HOME = {
    "cache": ("Cache", "CacheError"),
    "errors": ("Interrupted", "ScoringError"),
    "generation": ("Generation", "generate"),
    "hf": ("metric_names", "metric_path"),
    "loading": ("LoadError", "Loaded", "TokenizerError", "check_tokenizer", "load"),
    "measure": ("MEASURES", "EvalSet", "MeasureError"),
    "prompts": ("Encoded", "PromptError", "Prompting", "encode", "prompt_ids"),
    "results": ("SCHEMA_VERSION", "Result"),
    "rows": ("Row", "RowError", "canonical", "content_key", "normalise"),
    "scoring": ("Score", "score"),
    "sources": ("SourceError", "fingerprint", "read_rows"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [  # noqa: RUF022  (grouped as above)
    "Interrupted", "ScoringError",
    "LoadError", "Loaded", "TokenizerError", "check_tokenizer", "load",
    "MEASURES", "EvalSet", "MeasureError",
    "Encoded", "PromptError", "Prompting", "encode", "prompt_ids",
    "metric_names", "metric_path",
    "SCHEMA_VERSION", "Result",
    "Row", "RowError", "canonical", "content_key", "normalise",
    "Score", "score", "Generation", "generate", "Cache", "CacheError",
    "SourceError", "fingerprint", "read_rows",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
