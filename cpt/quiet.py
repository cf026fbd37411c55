"""Third-party chatter that says nothing about results, silenced by name, in this one place.

A warning that changes results (a fall-back of device or optimizer, a tokenisation mismatch) never stands here.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

WARNINGS = (
    # TRL sets the deprecated alias itself; transformers then warns the user about it.
    "`gradient_checkpointing` is deprecated",
    # Training on a CPU has no memory to pin.
    "'pin_memory' argument is set as true but no accelerator is found",
)
CALLBACKS = ("PrinterCallback",)  # prints the same losses as a dict


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the block: no weight-loading bars, and none of the warnings above."""
    from transformers.utils import logging

    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for message in WARNINGS:
                warnings.filterwarnings("ignore", message=f".*{message}")
            yield
    finally:
        if had_bars:
            logging.enable_progress_bar()
