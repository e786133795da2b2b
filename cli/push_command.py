"""Publish a Finedeep checkpoint on the Hub, with a model card, and check that it arrived.

The folder is first loaded as anybody would load it, without this project. Code in it that is not this version's is not
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `finedeep push`."""
    parser.add_argument("folder", metavar="DIR", help="the folder of a Finedeep model")
    parser.add_argument("repo_id", metavar="ORG/NAME", help="the repository; made where it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private; refuse a public one")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to, made where it does not exist")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--results", metavar="PATH", help="lm-eval's results JSON or a folder of such, for the card")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the folder's code even where it is not this package's"
    )
    parser.add_argument("--quiet", action="store_true", help="say nothing but the address")


def run(arguments: argparse.Namespace) -> Any:
    """Push and print the address."""
    check_folder(arguments.folder, "a Finedeep model", ("config.json",))
    from finedeep.convert import push_folder

    pushed = push_folder(
        arguments.folder,
        arguments.repo_id,
        private=arguments.private,
        revision=arguments.revision,
        create_pr=arguments.create_pr,
        results=arguments.results,
        trust_remote_code=arguments.trust_remote_code,
        say=not arguments.quiet,
    )
    print(pushed.url)
    if not arguments.quiet:
        print(f"revision {pushed.revision}: the same logits as {arguments.folder}")
    return pushed
