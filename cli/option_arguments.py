"""Arguments of a command, made of the fields of an options class."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any, get_args

from .argument_types import boolean, field, whole_number


def add_options(parser: argparse.ArgumentParser, options: type, **types: Callable[[str], Any]) -> None:
    """Declare an argument for each field.

    Args:
        parser: where to.
        options: the class, whose fields are made by `finedeep_files.options.option`.
        types: for some fields, what makes a value of the text that is given.
    """
    for found in dataclasses.fields(options):
        said = found.metadata
        more = {key: said[key] for key in ("metavar", "choices") if said.get(key) is not None}
        if found.default is dataclasses.MISSING:
            more |= {"default": [], "action": "append", "type": field}
        else:
            kind = types.get(found.name) or _type_of(found)
            if bool in _kinds(found):  # the flag alone says yes
                more |= {"nargs": "?", "const": True}
            more |= {"default": found.default, **({"type": kind} if kind else {})}
        flag = said.get("flag") or found.name.replace("_", "-")
        parser.add_argument(f"--{flag}", dest=found.name, help=said["help"], **more)


def _kinds(found: dataclasses.Field) -> set[Any]:
    return {found.type, *get_args(found.type)}


def _type_of(found: dataclasses.Field) -> Callable[[str], Any] | None:
    """What makes a field's value of a text; None: nothing need be made."""
    if found.metadata.get("least") is not None:
        return whole_number(found.metadata["least"])
    kinds = _kinds(found)
    if str in kinds:
        return None
    return next((made for kind, made in ((bool, boolean), (int, int), (float, float)) if kind in kinds), None)
