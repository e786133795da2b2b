"""Types of command-line arguments: what argparse should refuse, and how."""

import argparse
import json
import re
from collections.abc import Callable
from typing import Any

ASSIGNMENTS = ("contiguous", "strided", "random", "activity", "nonlinearity", "clusters")
PYTHONS = {"True": True, "False": False, "None": None}  # as users of Python will write them


def whole_number(least: int) -> Callable[[str], int]:
    """The type of whole numbers of at least that."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return value

    return number


positive_int, non_negative_int = whole_number(1), whole_number(0)


def names(text: str) -> list[str]:
    """Names separated by commas."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} holds no name")
    return found


def field(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as JSON or as text."""
    name, equals, value = text.partition("=")
    if not name.isidentifier() or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    if value in PYTHONS:
        return name, PYTHONS[value]
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def assignment(text: str) -> str:
    """The name of an assignment, or package:function."""
    if text not in ASSIGNMENTS and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither package:function nor one of {', '.join(ASSIGNMENTS)}")
    return text


def boolean(text: str) -> bool:
    """true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def batch(text: str) -> int | str:
    """A whole number of at least 1, or "auto"."""
    return text if text == "auto" else positive_int(text)


def device(text: str) -> str:
    """A device by torch's name."""
    if not re.fullmatch(r"cpu|mps|(cuda|xpu|npu|hpu)(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device; cpu, cuda or cuda:1 are")
    return text
