"""Transformers' bars for reading and writing weights, which would tear a command's own bar apart."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def without_loading_bars() -> Iterator[None]:
    """Keep transformers from showing its bars. Also a decorator."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
