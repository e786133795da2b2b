"""Options, stated once: fields of a dataclass with their help, of which signatures, checks and parsers are made."""

import dataclasses
import inspect
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from .errors import ConversionError, check_whole_number

SELF = "self"  # in place of a text: sampled from the dense model
Function = TypeVar("Function", bound=Callable[..., Any])


def option(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    metavar: str | None = None,
    choices: Collection[str] | None = None,
    least: int | None = None,
) -> Any:
    """A field of an options class.

    Args:
        default: its value where none is given.
        help: what the command line says of it.
        flag: its name on the command line, where that is not the field's.
        metavar: what the value is called there.
        choices: the values that there are.
        least: a whole number of at least that is asked for.
    """
    return dataclasses.field(
        default=default,
        metadata={"help": help, "flag": flag, "metavar": metavar, "choices": choices, "least": least},
    )


def check_fields(options: Any) -> None:
    """Raise `ConversionError` for a value that its field's `choices` or `least` does not allow."""
    for field in dataclasses.fields(options):
        value, known = getattr(options, field.name), field.metadata.get("choices")
        if known is not None and value not in known:
            raise ConversionError(f"{field.name}={value!r} is not known; known are: {', '.join(map(repr, known))}.")
        if field.metadata.get("least") is not None and not (value is None and field.default is None):
            check_whole_number(field.name, value, field.metadata["least"])


def takes_options(kind: type) -> Callable[[Function], Function]:
    """Give a function that hands its `**options` to an options class the signature that says which there are."""

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        given = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=p.default, annotation=p.annotation)
            for name, p in inspect.signature(kind).parameters.items()
        ]
        function.__signature__ = signature.replace(parameters=[*own, *given])
        return function

    return decorate
