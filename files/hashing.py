"""Hashes of large files."""

import hashlib
import mmap
from pathlib import Path

WINDOW = 2**26  # bytes


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. It is mapped, not copied, and let go of window by window."""
    digest = hashlib.sha256()
    if not path.stat().st_size:  # which cannot be mapped
        return digest.hexdigest()
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as content,
    ):
        for begin in range(0, len(content), WINDOW):
            digest.update(content[begin : begin + WINDOW])
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED, begin, min(WINDOW, len(content) - begin))
    return digest.hexdigest()
