"""Write a file completely or not at all."""

from pathlib import Path


def write_whole(path: Path, text: str) -> Path:
    """Write a file beside its place, then move it there. Returns the path."""
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_text(text, encoding="utf-8")
    return scratch.replace(path)
