"""Weights held in 4 or 8 bits by bitsandbytes, and the guard without which 4-bit training goes wrong on some CPUs."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

Quantization = Literal["4bit", "8bit"]
INSTALL = "pip install 'cpt[quant]'"


def is_installed() -> bool:
    """Whether bitsandbytes can be imported; does not import it."""
    return find_spec("bitsandbytes") is not None


def quantization_config(kind: Quantization, compute_dtype: Any) -> Any:
    """The BitsAndBytesConfig of from_pretrained: NF4 (arXiv 2305.14314, section 3), or LLM.int8() (arXiv 2208.07339).

    compute_dtype: torch dtype that 4-bit layers multiply in; LLM.int8() has its own.
    """
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)


def keep_gradients_right(model: Any) -> Any:
    """Keep every 4-bit layer from repacking its weights; call it before the first forward.

    On a CPU with AVX512-BF16 a forward in eval mode repacks a layer for a kernel that has no backward: gradients of
    every later training step are wrong, and only a warning says so.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model
