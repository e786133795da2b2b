"""Sizes in bytes: as users write them, and as they read them."""

from .errors import ConversionError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str | int) -> int:
    """Bytes of such as "5GB", "500MB" or "2GiB". Raises `ConversionError` for anything else."""
    digits = str(text).strip().upper().rstrip("BIKMGT")
    unit = str(text).strip().upper()[len(digits) :]
    try:
        size = int(float(digits) * UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise ConversionError(f"max_shard_size={text!r} is not a size; such as 5GB, 500MB or 2GiB are.")
    return size


def size(nbytes: float) -> str:
    """Bytes for a person to read."""
    unit = next(unit for unit in ("TB", "GB", "MB", "KB", "B") if nbytes >= UNITS[unit] or unit == "B")
    return f"{nbytes / UNITS[unit]:.3g} {unit}"
