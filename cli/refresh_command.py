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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `finedeep refresh`."""
    parser.add_argument("model", metavar="DIR_OR_REPO", help="a Finedeep model's folder or Hub id")
    parser.add_argument("--revision", metavar="BRANCH", help="the branch of a Hub id (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the old code too, and compare logits")
    parser.add_argument("--dry-run", action="store_true", help="say what would be changed, and change nothing")
    parser.add_argument("--quiet", action="store_true", help="say nothing")


def run(arguments: argparse.Namespace) -> None:
    """Refresh and say what was changed."""
    from finedeep.convert.hub.refresh import refresh_code, summary_of

    done = refresh_code(
        arguments.model,
        revision=arguments.revision,
        create_pr=arguments.create_pr,
        trust_remote_code=arguments.trust_remote_code,
        dry_run=arguments.dry_run,
    )
    if not arguments.quiet:
        print(summary_of(arguments.model, done, arguments.dry_run))
