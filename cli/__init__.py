"""The `finedeep` command. Parsing arguments imports neither torch nor transformers."""

import argparse
import dataclasses
import importlib
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .suggestions import Parser

# name of the subcommand -> what it does; its module has `add_arguments(parser)` and `run(arguments)`, which returns
# what --json prints
SUBCOMMANDS = {
    "convert": "cut a dense checkpoint into a Finedeep checkpoint",
    "heal": "train a converted model on, to say what its dense teacher says",
    "export": "turn a Finedeep checkpoint that is a dense model back into one",
    "push": "publish a Finedeep checkpoint on the Hub, with a model card, and check that it arrived",
    "refresh": "bring the code of a Finedeep model up to the installed version's, weights untouched",
    "eval": "score a model with lm-evaluation-harness, and compare it with its dense baseline",
    "inspect": "measure how sparse a model's activations are, and what its gates do",
    "demo": "train, convert and score a small model here, with no download",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0, or 2 with one line on stderr where the input cannot be used."""
    parser = Parser(
        prog="finedeep",
        description="Finedeep: dense LLMs with their FFN cut into stacked, fine-grained, always-active experts.",
    )
    parser.add_argument("--version", action="version", version=f"finedeep {_version()}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, summary in SUBCOMMANDS.items():
        module = importlib.import_module(f"finedeep_cli.{name}_command")
        subparser = subparsers.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.add_argument(
            "--json", action="store_true", help="print the result as JSON on stdout, all that is told on stderr"
        )
        subparser.set_defaults(run=module.run)
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if "run" not in arguments:
        parser.print_help()
        return 0
    run, as_json = vars(arguments).pop("run"), vars(arguments).pop("json")
    # A library's chatter (progress of loading, advice) would drown the command's own lines.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for library in ("torchao", "torch.utils._pytree"):  # complain, on import, of kernels that this command never uses
        logging.getLogger(library).setLevel(logging.ERROR)
    usual = warnings.formatwarning
    # What this package warns of is for the user, and the line of code is not.
    warnings.formatwarning = lambda message, category, *rest: (
        f"finedeep: warning: {' '.join(str(message).split())}\n"
        if category is UserWarning
        else usual(message, category, *rest)
    )
    try:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            result = run(arguments)
        if as_json and result is not None:  # of several processes one has it
            print(json.dumps(_finite(json.loads(json.dumps(result, default=_in_json))), indent=1, allow_nan=False))
    except KeyboardInterrupt as interruption:
        print(". ".join(["finedeep: interrupted", *_notes(interruption)]), file=sys.stderr)
        return 130
    except ValueError as error:
        if not type(error).__module__.startswith("finedeep"):
            raise
        print(f"finedeep: error: {' '.join(' '.join([str(error), *_notes(error)]).split())}", file=sys.stderr)
        return 2
    finally:
        warnings.formatwarning = usual
    return 0


def _in_json(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)


def _finite(value: Any) -> Any:
    """The same with null for infinite numbers and those that are none, which JSON cannot say."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version() -> str:
    try:
        return version("finedeep")
    except PackageNotFoundError:  # a checkout that is not installed
        return "of a checkout"


def _notes(error: BaseException) -> list[str]:
    """What was added to an error on its way, such as where finished work is kept."""
    return getattr(error, "__notes__", [])
