"""Write a folder completely or not at all: beside its place, and moved there at the end.

The folder beside it has a fixed name, so that a later run finds what a killed one has left, to go on with or to remove.
Its hidden files are the run's own, and go when the folder is in its place.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import ConversionError
from .receipt import NEURONS
from .shards import size
from .whole_file import write_whole

PLAN = ".plan.json"
LOCK = ".lock"
DIFFERENCES = ".differences.json"
KEPT = (".safetensors", DIFFERENCES, NEURONS)  # what a later run can go on with


class _KeptError(ConversionError):
    """An error at which what a stopped run left must stay."""


def check_free(destination: Path) -> None:
    """Raise `ConversionError` unless `destination` does not exist or is an empty folder."""
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise ConversionError(f"{destination} exists and is not a folder; name a folder that does not exist yet.")
    if destination.is_dir() and any(destination.iterdir()):
        raise ConversionError(
            f"{destination} exists and is not empty; nothing is ever overwritten. Name another folder or remove it."
        )
    if destination.is_dir() and (destination.samefile(Path.cwd()) or os.path.ismount(destination)):
        what = "a mount point" if os.path.ismount(destination) else "the current folder"
        raise ConversionError(
            f"{destination} is {what}, whose place a finished folder cannot take; name one inside it that does not "
            "exist yet."
        )


def unfinished_folder(destination: Path) -> Path:
    """Where a folder is written before it is whole."""
    place = Path(os.path.abspath(destination))
    return place.parent / f".{place.name}.unfinished"


def check_room(destination: Path, wanted: int) -> None:
    """Raise `ConversionError` where the disk has less room than `wanted` bytes, beside what a stopped run left."""
    folder = unfinished_folder(destination)
    place = next(parent for parent in [folder, *folder.parents] if parent.exists())
    left = sum(path.stat().st_blocks * 512 for path in folder.glob("*")) if folder.is_dir() else 0
    room = shutil.disk_usage(place).free + left
    if room < wanted:
        raise ConversionError(
            f"{destination} needs {size(wanted)} of disk, and {size(room)} are free. Make room or name a "
            "folder on another disk."
        )


@contextmanager
def alone(folder: Path, destination: Path) -> Iterator[None]:
    """Make a folder, and keep every other run that would write the same destination out of it.

    Raises:
        ConversionError: there is no permission, or another run at work on it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise ConversionError(f"{destination} cannot be made ({error.strerror}); name a folder that can.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ConversionError(f"another run is writing {destination}; wait for it or stop it.") from error
        except OSError:
            pass  # a file system without locks
        yield


@contextmanager
def whole_folder(destination: Path, plan: Mapping[str, Any], resume: bool = False) -> Iterator[Path]:
    """Give a folder beside `destination` to write in; move it into place at the end, or remove it on any failure.

    Args:
        destination: where the folder will be. It must not exist, or be empty.
        plan: what the folder will hold, as JSON. A run can go on from where another of the same plan has stopped.
        resume: whether to go on with what a stopped run left, and to keep what is there if this one stops too. Without
            it, an interrupted run (Ctrl-C) keeps what is there all the same, since it may have been hours of work.

    Raises:
        ConversionError: there is no room, no permission, another run at work on it, or a stopped run of another plan.
    """
    check_free(destination)
    folder = unfinished_folder(destination)
    plan = json.loads(json.dumps(plan))
    with alone(folder, destination):
        try:
            _begin(folder, destination, plan, resume)
            yield folder
            _finish(folder, destination)
        except OSError as error:
            if not resume:
                shutil.rmtree(folder, ignore_errors=True)
            kept = f" What is finished is kept in {folder}; --resume goes on." if resume else ""
            raise ConversionError(
                f"{destination} could not be written ({error}). Nothing was left there; make room or name another "
                f"folder.{kept}"
            ) from error
        except KeyboardInterrupt:
            if any(file.name.endswith(KEPT) for file in folder.glob("*")):
                raise KeyboardInterrupt(f"what is finished is kept in {folder}; --resume goes on") from None
            shutil.rmtree(folder, ignore_errors=True)
            raise
        except _KeptError:
            raise
        except BaseException:
            if not resume:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _begin(folder: Path, destination: Path, plan: Mapping[str, Any], resume: bool) -> None:
    """Leave in the folder what may be gone on with, and nothing else."""
    path = folder / PLAN
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if resume and before is not None and before != plan:
        raise _KeptError(
            f"the run to {destination} that stopped was another one: {differing(plan, before)} differ. Run without "
            "--resume to start again, or with what it was started with."
        )
    for file in folder.iterdir():
        kept = file.name in (LOCK, PLAN) or (resume and before == plan and file.name.endswith(KEPT))
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)  # of companions, which are copied again
        elif not kept:
            file.unlink()
    if before != plan or not resume:
        write_whole(path, json.dumps(plan))


def differing(plan: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """The names of what two plans do not have in common."""
    return ", ".join(sorted(key for key in {*plan, *before} if plan.get(key) != before.get(key)))


def _finish(folder: Path, destination: Path) -> None:
    for file in folder.rglob("[!.]*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    try:
        check_free(destination)
    except ConversionError as error:
        raise _KeptError(f"{error} What was made is whole, in {folder}: rename that, and it is kept.") from error
    folder.rename(destination)
    for file in destination.glob(".*"):
        with suppress(OSError):
            file.unlink()
