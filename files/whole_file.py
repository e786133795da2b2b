"""Write a file completely or not at all."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> Path:
    """Write a file beside its place, each process under a name of its own, then move it there. Returns the path."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.new")
    scratch.write_text(text, encoding="utf-8")
    return scratch.replace(path)
