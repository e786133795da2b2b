"""A parser that says what was probably meant: `finedeep covert` and `--sublayer 2`."""

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Names the nearest command or option in its errors. (From Python 3.14 on argparse does that for commands.)"""

    def parse_args(self, args: Sequence[str], namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        """As argparse's, with a suggestion for the first argument that it does not know."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            chosen = self.commands.get(next((word for word in args if word in self.commands), ""), self)
            chosen.error(
                f"unrecognized arguments: {' '.join(unknown)}{meant(unknown[0], chosen._option_string_actions)}"
            )
        return found

    @property
    def commands(self) -> dict[str, argparse.ArgumentParser]:
        """Of the parser's sub-parsers, by name."""
        return next((action.choices for action in self._actions if isinstance(action.choices, dict)), {})

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += meant(str(value), [str(choice) for choice in action.choices or ()])
            raise

    def error(self, message: str) -> NoReturn:
        """One line, and where to read more."""
        self.exit(2, f"{self.prog}: error: {message}\n`{self.prog} --help` lists what there is.\n")


def meant(word: str, choices: Sequence[str] | dict[str, Any]) -> str:
    """ "; did you mean ...?", or nothing where no choice is near."""
    near = get_close_matches(word.partition("=")[0], list(choices), n=1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else ""
