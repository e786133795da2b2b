"""Publish a Finedeep checkpoint on the Hub, with a model card, and check that it arrived.

The folder is first loaded without this project, as its users will. Code in it that is not this version's is not
run unless --trust-remote-code is given, and a link that leads out of the folder is refused. Then code, weights,
tokenizer and receipt are uploaded, with a card that says what the model was made from, under which licence, and how to
load this very revision. Then the model is loaded from the Hub into an empty cache, and its logits are compared with the
folder's. The model is held in memory for both checks.

Log in first with `hf auth login`. If a push breaks off, run it again: what has arrived is not sent twice.

examples:
  finedeep push ./llama-finedeep ORG/llama-finedeep
  finedeep push ./llama-finedeep ORG/llama-finedeep --private --results ./results
  finedeep push ./llama-finedeep ORG/llama-finedeep --create-pr
"""

import argparse
from typing import Any

from finedeep_files.inputs import check_folder
from finedeep_files.publishing_options import PushOptions

from .option_arguments import add_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `finedeep push`."""
    parser.add_argument("folder", metavar="DIR", help="the folder of a Finedeep model")
    parser.add_argument("repo_id", metavar="ORG/NAME", help="the repository; made where it does not exist")
    add_options(parser, PushOptions)
    parser.add_argument("--quiet", action="store_true", help="say nothing but the address")


def run(arguments: argparse.Namespace) -> Any:
    """Push and print the address."""
    check_folder(arguments.folder, "a Finedeep model", ("config.json",))
    from finedeep.convert import push_folder

    given = vars(arguments).copy()
    folder, repo_id, quiet = given.pop("folder"), given.pop("repo_id"), given.pop("quiet")
    pushed = push_folder(folder, repo_id, say=not quiet, **given)
    print(pushed.url)
    if not quiet:
        print(f"revision {pushed.revision}: the same logits as {folder}")
    return pushed
