"""What a long-running step tells whoever started it; how it is shown is the caller's business."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """`step` of `total` optimiser steps are done; `loss` is that step's mean per trained token, in nats."""

    step: int
    total: int
    loss: float


OnProgress = Callable[[Progress], None]


@contextmanager
def no_library_bars() -> Iterator[None]:
    """Keep transformers from drawing its own bars on the caller's terminal."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
