"""What every test stands on: an offline environment, the tiny world, a tiny Llama, the research data."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

# Set before any test imports a library that reads them, and inherited by every process a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it on import: workers that share cores would thrash

pytest_plugins = ["tests.plugins"]

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def require() -> Callable[[str, bool, str], None]:
    """`require(name, present, reason)`: skip, or fail where CPT_REQUIRE names it; see tests/plugins.py."""
    from tests import plugins

    return plugins.require


@pytest.fixture(scope="session")
def shared(require: Callable[[str, bool, str], None]) -> Path:
    """The research data beside the checkout, or where CPT_SHARED points; never needed to run the library."""
    path = Path(os.environ.get("CPT_SHARED", ROOT.parent / "shared")).resolve()
    require("shared", (path / "data").is_dir(), f"no data folder in {path}")
    return path


@pytest.fixture(scope="session")
def tiny_world_dir() -> Path:
    """The embedded model and its tokenizer, as shipped."""
    return ROOT / "cpt" / "assets" / "tiny_world"


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_world_dir: Path) -> PreTrainedTokenizerBase:
    """The tiny world's tokenizer; shared by the session, so tests do not change it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_world_dir)


@pytest.fixture(scope="session")
def tiny_llama(request: pytest.FixtureRequest) -> Callable[..., LlamaForCausalLM]:
    """`tiny_llama(seed=0, vocab_size=None, **config)`: a new random Llama, hidden 16, for each call.

    2 layers, 4 heads of 4, 2 key-value heads, float32, no dropout unless `attention_dropout` says so.
    Without `vocab_size` it fits the tiny world's tokenizer. The global random state stays as it was.
    """

    from functools import partial

    from tests.models import llama

    return partial(llama, request.getfixturevalue("tiny_tokenizer"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_llama: Callable[..., Any], tiny_tokenizer: PreTrainedTokenizerBase) -> Callable[..., Path]:
    """`tiny_checkpoint(folder, **config)`: save a `tiny_llama(**config)` and its tokenizer there; gives the folder."""

    def save(folder: Path, **config: Any) -> Path:
        tiny_llama(**config).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def bitsandbytes(require: Callable[[str, bool, str], None]) -> None:
    """For `usefixtures`: weights in few bits."""
    from eval_harness import quantization

    require("bitsandbytes", quantization.is_installed(), "bitsandbytes is not installed")
