"""Which files of a folder are a command's own: by the patterns of its plan, or by the list in its receipt."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

RECEIPTS = "finedeep_*.json"
LISTED = "files"  # a receipt's field: the paths of all files that were made, relative to the folder
COMPARISON = "comparison.json"  # of an evaluation's folder, from which a model card is made
SCRATCH = re.compile(r"\.?(.+?)(\.\d+)?\.(new|unfinished)")  # of a file that is being written


def is_scratch(path: Path) -> bool:
    """Whether a file is one that was being written."""
    return SCRATCH.fullmatch(path.name) is not None


class Names:
    """Patterns of relative paths, in which `*` stands for any characters, "/" among them.

    Args:
        patterns: of files. The folders that these are in are named with them.
        folders: of other folders.
    """

    def __init__(self, patterns: Iterable[str], folders: Iterable[str] = ()):
        self.patterns = tuple(patterns)
        self.folders = {str(parent) for pattern in self.patterns for parent in PurePosixPath(pattern).parents}
        self.folders.update(folders)

    def has_file(self, path: str) -> bool:
        """Whether a file of this path, or one that was to become it, is named."""
        place, slash, name = path.rpartition("/")
        scratch = SCRATCH.fullmatch(name)
        known = [path, *([f"{place}{slash}{scratch[1]}"] if scratch else [])]
        return any(fnmatchcase(name, pattern) for name in known for pattern in self.patterns)

    def has_folder(self, path: str) -> bool:
        """Whether a named file could be in a folder of this path."""
        return any(fnmatchcase(path, folder) for folder in self.folders) or self.has_file(f"{path}/x")


class Listed:
    """The files that the receipts in a finished folder list."""

    def __init__(self, folder: Path):
        self.paths = {path for receipt in sorted(folder.glob(RECEIPTS)) for path in _listed(receipt)}

    def has_file(self, path: str) -> bool:
        return path in self.paths

    def has_folder(self, path: str) -> bool:
        return any(known.startswith(f"{path}/") for known in self.paths)


def _listed(receipt: Path) -> list[str]:
    try:
        paths = json.loads(receipt.read_text(encoding="utf-8"))[LISTED]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [path for path in paths if isinstance(path, str)] if isinstance(paths, list) else []


def entries(folder: Path) -> Iterator[tuple[str, Path]]:
    """All that is in a folder and below, contents before their folder: (relative path, path). No link is followed."""
    for place, folders, files in os.walk(folder, topdown=False):
        for name in sorted([*files, *folders]):
            path = Path(place, name)
            yield path.relative_to(folder).as_posix(), path


def strangers(folder: Path, names: Names | Listed) -> Iterator[Path]:
    """What in a folder is not one of the named files or a folder for them. A link never is."""
    for relative, path in entries(folder):
        named = names.has_folder if path.is_dir() else names.has_file
        if not os.path.lexists(path):  # removed meanwhile, by the run that is at work here
            continue
        if path.is_symlink() or not (path.is_dir() or path.is_file()) or not named(relative):
            yield path


def remove_named(folder: Path, names: Names | Listed, but: Names | None = None) -> None:
    """Remove the named files, but for some, then the folders of theirs that are empty. Nothing else is touched.

    What a killed process was writing is removed even where its file is to stay.
    """
    foreign = set(strangers(folder, names))
    for relative, path in entries(folder):
        stays = but is not None and but.has_file(relative) and not is_scratch(path)
        if path in foreign or stays:
            continue
        if not path.is_dir():
            path.unlink()
        elif not any(path.iterdir()):
            path.rmdir()
