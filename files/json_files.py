"""JSON files: read with limits, as a stranger's are, and written for people to read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ConversionError
from .whole_file import write_whole

# More than any real configuration, index or tokenizer has; json needs some ten times as much memory.
MAX_JSON_BYTES = 200 * 10**6


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object. Raises `ConversionError` where the file is missing or holds anything else."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ConversionError(f"{path} has {path.stat().st_size / 1e6:.0f} MB, far too large for {what}.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConversionError(f"{path} is missing; {what} belongs beside the weights.") from None
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not valid JSON ({error}); it should hold {what}.") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}; it should be a JSON object with {what}.")
    return content


def as_json(content: Mapping[str, Any]) -> str:
    """JSON for people to read."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON for people to read, whole or not at all."""
    write_whole(path, as_json(content))
