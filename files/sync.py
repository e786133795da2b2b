"""Bring files to the disk, and the folders that name them."""

import os
from contextlib import suppress
from pathlib import Path


def sync_tree(folder: Path) -> None:
    """Bring a folder with all that is in it to the disk: what a file is called is written in its folder."""
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            with Path(place, name).open("rb") as opened:
                os.fsync(opened.fileno())
        sync_folder(Path(place))


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can."""
    if os.name == "nt":  # which cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
