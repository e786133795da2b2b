"""Bring the code of a Finedeep model up to the installed package's. The weights stay as they are.

A model carries the Python files that it is loaded with. Those of a model that was made or pushed earlier are of the
version of that day; programs that merge or save models may leave them out. The configuration is checked first. None of
the model's own code is run unless --trust-remote-code is given; with it, logits on a few tokens are compared, with the
old code and the new, and where they differ nothing is changed.

A repository on the Hub is changed by a commit, to which only the files of code, config.json, the receipt and the card's
pinned revision belong; log in first with `hf auth login`.

examples:
  finedeep refresh ./llama-finedeep
  finedeep refresh ./llama-finedeep --trust-remote-code --dry-run
  finedeep refresh ORG/llama-finedeep --create-pr
"""

import argparse
from typing import Any

from finedeep_files.publishing_options import RefreshOptions

from .option_arguments import add_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `finedeep refresh`."""
    parser.add_argument("model", metavar="DIR_OR_REPO", help="a Finedeep model's folder or Hub id")
    add_options(parser, RefreshOptions)
    parser.add_argument("--quiet", action="store_true", help="say nothing")


def run(arguments: argparse.Namespace) -> Any:
    """Refresh and say what was changed."""
    from finedeep.convert.hub.refresh import refresh_code, summary_of

    given = vars(arguments).copy()
    model, quiet = given.pop("model"), given.pop("quiet")
    done = refresh_code(model, **given)
    if not quiet:
        print(summary_of(model, done, arguments.dry_run))
    return done
