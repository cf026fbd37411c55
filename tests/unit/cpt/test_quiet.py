"""What third parties say: chatter goes by name, what changes a result is always heard."""

import logging
import warnings

import pytest

from cpt import quiet as listed
from cpt.quiet import quiet

# Words of the libraries we stand on, each about something that changes what comes out.
TELLING = [
    "Mismatch between tokenized prompt and the start of tokenized prompt+completion.",
    "The tokenizer has new PAD/BOS/EOS tokens that differ from the model config and generation config.",
    "No autograd kernel is registered for gemm_4bit: gradients of this layer are not computed.",
    "bitsandbytes was compiled without GPU support. 8-bit optimizers are not available, falling back to AdamW",
    "CUDA is not available: falling back to the CPU",
    "`use_cache=True` is incompatible with gradient checkpointing",
    "Some weights of LlamaForCausalLM were not initialized from the model checkpoint",
    "You are training with packing and sdpa: rows may attend to each other",
]


@pytest.mark.parametrize("telling", TELLING)
def test_a_warning_that_changes_results_is_heard(telling: str) -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with quiet():
            warnings.warn(telling, UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in heard] == [telling]


@pytest.mark.parametrize("logger", sorted(listed.LOGGED))
def test_a_logger_is_silenced_for_one_sentence_only(logger: str, caplog: pytest.LogCaptureFixture) -> None:
    source = logging.getLogger(logger)
    source.addHandler(caplog.handler)
    try:
        with quiet():
            source.warning("%s (a sentence that goes on)", listed.LOGGED[logger])
            for telling in TELLING:
                source.warning(telling)
        source.warning(listed.LOGGED[logger])
    finally:
        source.removeHandler(caplog.handler)
    heard = list(dict.fromkeys(record.getMessage() for record in caplog.records))
    assert heard == [*TELLING, listed.LOGGED[logger]]


@pytest.mark.parametrize("chatter", listed.WARNINGS)
def test_chatter_goes_inside_only(chatter: str) -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with quiet():
            warnings.warn(f"Note: {chatter}!", FutureWarning, stacklevel=1)
        assert heard == []
        warnings.warn(f"Note: {chatter}!", FutureWarning, stacklevel=1)
    assert len(heard) == 1


def test_a_kernel_without_an_autograd_formula_is_heard() -> None:
    """As 4-bit kernels may lack one: torch computes no gradient through them, or a wrong one, and says so once."""
    import torch

    x = torch.ones(2, 3, requires_grad=True)
    library = torch.library.Library("cpt_tests_plain", "DEF")  # as kernels in C++ are registered
    library.define("matmul(Tensor x, Tensor weight) -> Tensor")
    library.impl("matmul", lambda x, weight: x @ weight, "CPU")
    out = torch.ops.cpt_tests_plain.matmul(x, torch.ones(3, 4)).sum()
    with quiet(), pytest.warns(UserWarning, match="autograd kernel was not registered"):
        out.backward()
