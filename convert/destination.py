"""Where a checkpoint is written, and whether there is room for it."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finedeep_files.errors import ConversionError
from finedeep_files.shards import size
from finedeep_files.working_folder import Contents, WorkingFolder


def working_folder(
    destination: str | Path, *, resume: bool | None = None, overwrite: bool | None = None
) -> WorkingFolder:
    """The destination of a checkpoint, with the hidden folder beside it. It raises `ConversionError`."""
    return WorkingFolder(Path(destination), ConversionError, resume, overwrite)


def check_room(work: WorkingFolder, wanted: int) -> None:
    """Raise `ConversionError` where the disk has less room than `wanted` bytes, beside what a stopped run left."""
    place = next(parent for parent in [work.path, *work.path.parents] if parent.exists())
    left = sum(path.lstat().st_blocks * 512 for path in work.path.rglob("*")) if work.path.is_dir() else 0
    room = shutil.disk_usage(place).free + left
    if room < wanted:
        raise ConversionError(
            f"{work.destination} needs {size(wanted)} of disk, and {size(room)} are free. Make room or name a "
            "folder on another disk."
        )


@contextmanager
def whole_folder(work: WorkingFolder, contents: Contents, plan: Mapping[str, Any]) -> Iterator[Path]:
    """As `WorkingFolder.begun`, with an error of the disk told in one line.

    Raises:
        ConversionError: there is no room or no permission, another run at work, or a stopped run of another plan.
    """
    try:
        with work.begun(contents, plan) as folder:
            yield folder
    except OSError as error:
        refusal = ConversionError(
            f"{work.destination} could not be written ({error}). Make room or name another folder."
        )
        for note in getattr(error, "__notes__", ()):
            refusal.add_note(note)
        raise refusal from error
