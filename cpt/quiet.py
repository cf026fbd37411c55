"""Third-party chatter that says nothing about results, silenced by name, in this one place.

A warning that changes results (a fall-back of device or optimizer, a tokenisation mismatch) never stands here.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import LogRecord, getLogger

WARNINGS = (
    # TRL sets the deprecated alias itself; transformers then warns the user about it.
    "`gradient_checkpointing` is deprecated",
    "`is_gradient_checkpointing` is deprecated",
    # DeepSpeed calls collectives by their old names.
    "`torch.distributed.all_gather_into_tensor` is deprecated",
    "`torch.distributed.reduce_scatter_tensor` is deprecated",
    # Training on a CPU has no memory to pin.
    "'pin_memory' argument is set as true but no accelerator is found",
)
LOGGED = {
    # A kernel that is missing on this processor; another of the same result is used.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # Said by every 8-bit layer in every forward pass.
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
    # Of a teacher that is chosen without TRL, by what the stage starts from.
    "trl.experimental.sdft.sdft_trainer": "The provided self-distillation student model already contains a PEFT",
    # Installed, DeepSpeed says on every import that there is no GPU.
    "DeepSpeed": "Setting accelerator to CPU",
    # A tied head is saved once, as the embedding; the trainer's loader notes its absence on every resume.
    "transformers.trainer": "There were missing keys in the checkpoint model loaded: ['lm_head.weight']",
}
CALLBACKS = ("PrinterCallback",)  # prints the same losses as a dict


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the block: no weight-loading and mapping bars, and nothing of what stands above."""
    import datasets
    from transformers.utils import logging

    had_bars, mapping_bars = logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    filters = {name: _unless(text) for name, text in LOGGED.items()}
    for name, keep in filters.items():
        getLogger(name).addFilter(keep)
    try:
        with warnings.catch_warnings():
            for message in WARNINGS:
                warnings.filterwarnings("ignore", message=f".*{message}")
            yield
    finally:
        for name, keep in filters.items():
            getLogger(name).removeFilter(keep)
        if mapping_bars:
            datasets.enable_progress_bars()
        if had_bars:
            logging.enable_progress_bar()


def _unless(text: str) -> Callable[[LogRecord], bool]:
    return lambda record: text not in record.getMessage()
