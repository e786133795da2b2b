"""The Python files that travel with every checkpoint, and the version that those of a folder are of.

Nothing here runs a folder's code: versions are read as text.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finedeep_files.json_files import read_json
from huggingface_hub import hf_hub_download
from packaging.version import InvalidVersion, Version

from ..configuration_finedeep import FinedeepConfig, __version__

CODE = "*_finedeep.py"
CODE_FILES = tuple(sorted(Path(__file__).parents[1].glob(CODE)))
MARKED = "configuration_finedeep.py"  # the file that says the version of them all
UNMARKED = "before versions were noted"
MARK = re.compile(r'^__version__ = "([^"\n]+)"$', re.MULTILINE)


def copy_code(folder: Path) -> None:
    """Copy the installed package's files into a folder, over those that are there."""
    for file in CODE_FILES:
        shutil.copyfile(file, folder / file.name)


def missing_code(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Names of the files that a folder's code consists of and that are not there.

    Which they are is known for the installed version; of another one, those that `auto_map` names.
    """
    named = {f"{reference.rpartition('--')[2].partition('.')[0]}.py" for reference in auto_map_of(config).values()}
    if version_in(folder / MARKED) == __version__:
        named |= {file.name for file in CODE_FILES}
    return sorted(name for name in named if not (folder / name).is_file())


def auto_map_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The references of `auto_map` that are text, as all of a model are."""
    found = config.get("auto_map")
    return {key: value for key, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}


def version_in(file: Path) -> str | None:
    """The version that a file says it is of; None where it says none, or is not there."""
    try:
        found = MARK.search(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
    return found.group(1) if found else None


def is_older(version: str | None) -> bool:
    """Whether a version is older than the installed one; None is that of code from before versions were noted."""
    try:
        return version is None or Version(version) < Version(__version__)
    except InvalidVersion:
        return True


def is_newer(version: str) -> bool:
    """Whether a version is newer than the installed one."""
    try:
        return Version(version) > Version(__version__)
    except InvalidVersion:
        return False


def advice(model: str | Path, revision: str | None = None) -> str | None:
    """A line for the user where a Finedeep model's code is older than the package, or incomplete; else None.

    Args:
        model: a folder or a Hub id. Of the latter, two small files are read.
        revision: branch, tag or commit of a Hub id.
    """
    folder = Path(model)
    try:
        if not folder.is_dir():
            fetched = [hf_hub_download(str(model), name, revision=revision) for name in (MARKED, "config.json")]
            folder = Path(fetched[0]).parent
        config = read_json(folder / "config.json", "the model's configuration")
    except Exception:  # no such file, no connection: whoever loads the model says so better
        return None
    if config.get("model_type") != FinedeepConfig.model_type:
        return None
    version = version_in(folder / MARKED)
    if Path(model).is_dir() and (missing := missing_code(folder, config)):
        found = f"its code lacks {', '.join(missing)}"
    elif is_older(version):
        found = f"its code is of Finedeep {version or UNMARKED}, older than the installed {__version__}"
    else:
        return None
    return f"{model}: {found}; `finedeep refresh {model}` updates it."
