"""Bars of others: transformers' for reading and writing weights, which would tear a command's own bar apart, and those
that libraries show whatever they are told.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
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


@contextmanager
def without_bars(hidden: bool = True) -> Iterator[None]:
    """Keep tqdm from showing any bar, those too for which a library says that they are to be shown."""
    usual = tqdm.__init__

    def init(self: tqdm, *args: Any, **named: Any) -> None:
        usual(self, *args, **{**named, "disable": True})

    if hidden:
        tqdm.__init__ = init
    try:
        yield
    finally:
        tqdm.__init__ = usual
