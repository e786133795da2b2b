"""Write a folder completely or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ConversionError


def check_free(destination: Path) -> None:
    """Raise `ConversionError` unless `destination` does not exist or is an empty folder."""
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise ConversionError(f"{destination} exists and is not a folder; name a folder that does not exist yet.")
    if destination.is_dir() and any(destination.iterdir()):
        raise ConversionError(
            f"{destination} exists and is not empty; nothing is ever overwritten. Name another folder or remove it."
        )


@contextmanager
def whole_folder(destination: Path) -> Iterator[Path]:
    """Give a folder beside `destination` to write in; move it into place at the end, or remove it on any failure."""
    check_free(destination)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}.partial-", dir=destination.parent))
    except OSError as error:
        raise ConversionError(f"{destination} cannot be made ({error.strerror}); name a folder that can.") from error
    try:
        yield partial
        partial.chmod(0o755)
        check_free(destination)
        partial.rename(destination)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ConversionError(
            f"{destination} could not be written ({error}). Nothing was left there; make room or name another folder."
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
