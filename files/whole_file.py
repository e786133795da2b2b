"""Write a file completely or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def scratch_of(path: Path) -> Iterator[Path]:
    """A path beside a file's place, each process with one of its own, from which it is moved there at the end.

    After an error nothing is there.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield scratch
        scratch.replace(path)
    except BaseException:
        with suppress(OSError):
            scratch.unlink()
        raise


def write_whole(path: Path, text: str) -> Path:
    """Write a text, in UTF-8. Returns the path."""
    with scratch_of(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
    return path
