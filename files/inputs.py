"""What can be said of a command's inputs without reading them, and so before torch is imported."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class InputError(ValueError):
    """An input is not there. The message says what was found and what to do."""


def check_model(model: str | Path, error: type[ValueError] = InputError) -> None:
    """Raise `error` unless it is a folder, or could be a Hub id."""
    if os.path.isdir(model):
        return
    if os.path.exists(model):
        raise error(f"{model} is a file; name the folder of a checkpoint, or a Hub id.")
    if not HUB_ID.fullmatch(str(model)):
        raise error(f"{model} does not exist; name the folder of a checkpoint, or a Hub id.")


def check_text(text: str | Path) -> None:
    """Raise `InputError` unless it is a file that can be opened."""
    if not os.path.isfile(text):
        what = "is a folder" if os.path.isdir(text) else "does not exist"
        raise InputError(f"{text} cannot be read: it {what}; name a file of UTF-8 text.")
    if not os.access(text, os.R_OK):
        raise InputError(f"{text} cannot be read: there is no permission to.")


def check_folder(folder: str | Path, content: str, patterns: Sequence[str] = ("*",)) -> None:
    """Raise `InputError` unless it is a folder with a file of one of the patterns; `content` says what it is for."""
    if not os.path.isdir(folder):
        what = "is a file" if os.path.exists(folder) else "does not exist"
        raise InputError(f"{folder} {what}; name a folder with {content}.")
    if not any(next(Path(folder).glob(pattern), None) for pattern in patterns):
        raise InputError(f"{folder} holds no {' and no '.join(patterns)}; name a folder with {content}.")
