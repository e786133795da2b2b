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
        options: the class. Its fields that are made by `finedeep_files.options.option` become arguments.
        types: for some fields, what makes a value of the text that is given.
    """
    for found in dataclasses.fields(options):
        said = found.metadata
        if "help" not in said:  # for Python alone
            continue
        more = {key: said[key] for key in ("metavar", "choices") if said.get(key) is not None}
        if found.default is dataclasses.MISSING:
            more |= {"default": [], "action": "append", "type": field}
        else:
            more["default"] = found.default
            kind = types.get(found.name) or _type_of(found)
            if found.type is bool:
                more["action"] = "store_true"
            elif kind:
                more["type"] = kind
            if found.type is not bool and bool in _kinds(found):  # the flag alone says yes
                more |= {"nargs": "?", "const": True}
        flag = said.get("flag") or found.name.replace("_", "-")
        parser.add_argument(f"--{flag}", dest=found.name, help=said["help"], **more)


def add_restart(parser: argparse.ArgumentParser, done: str, *, resume: bool = True, where: str = "DST") -> None:
    """Declare --overwrite, and --resume where a stopped run of the command can be continued.

    Args:
        parser: where to.
        done: what a finished run has made, such as "conversion".
        resume: whether a stopped run can be continued.
        where: the destination, as the command's help calls it.
    """
    again = ""
    if resume:
        parser.add_argument("--resume", action="store_true", help="continue from what a stopped run has finished")
        again = "; start again where a run was stopped"
    said = f"replace a finished {done} at {where}, its own files only{again}"
    parser.add_argument("--overwrite", action="store_true", help=said)


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
