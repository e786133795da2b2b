"""Text files: one text, or JSON Lines with a text in each record."""

import json
from pathlib import Path

from .errors import ConversionError

FIELD = "text"
JSON_LINES = (".jsonl", ".ndjson")
LOOKED_AT = 2  # lines, to know JSON Lines under another name by


def read_documents(path: Path) -> list[str]:
    """The texts of a file: of JSON Lines each record's `text`, of anything else the file as one text.

    Raises:
        ConversionError: it cannot be read, is empty, or is JSON that has no such records. It names file and line.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} cannot be read as UTF-8 text ({error}).") from error
    if not content.strip():
        raise ConversionError(f"{path} is empty; name a text like those that the model is for.")
    if path.suffix == ".json":
        raise ConversionError(
            f"{path} is JSON, whose syntax would be learned as text; name a text file, or JSON Lines (.jsonl) with a "
            f"{FIELD!r} in each record."
        )
    if path.suffix not in JSON_LINES and not _is_json_lines(content):
        return [content]
    lines = enumerate(content.split("\n"), start=1)
    return [_text_of(path, number, line) for number, line in lines if line.strip()]


def _is_json_lines(content: str) -> bool:
    lines = [line for line in content[:100_000].split("\n", LOOKED_AT + 8) if line.strip()][:LOOKED_AT]
    return len(lines) == LOOKED_AT and all(isinstance(_json(line), dict) for line in lines)


def _json(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _text_of(path: Path, number: int, line: str) -> str:
    record = _json(line)
    if not isinstance(record, dict) or not isinstance(record.get(FIELD), str):
        found = f"has the fields {', '.join(record)}" if isinstance(record, dict) else "is no JSON object"
        raise ConversionError(
            f"{path}, line {number}, {found}; in JSON Lines each record needs a {FIELD!r}. Give the field "
            "that name, or make it a plain text file."
        )
    return record[FIELD]
