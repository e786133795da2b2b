"""Train a small dense Llama on generated text, convert it, reload it, score both. No download.

A grammar generates a small world of facts from the seed; the tokenizer and the model are trained on its text; the
harness asks about it in all four ways it has. Everything is kept in the folder, ready to be looked into.
"""

import argparse

from .argument_types import positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `finedeep demo`."""
    parser.add_argument(
        "--output", default="finedeep-demo", metavar="DIR", help="folder to make (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed is another world (default: 0)")
    parser.add_argument("--steps", type=positive_int, default=300, help="training steps (default: %(default)s)")


def run(arguments: argparse.Namespace) -> dict[str, str]:
    """Run the demo and print its table."""
    from finedeep.demo import run_demo

    table = run_demo(arguments.output, seed=arguments.seed, steps=arguments.steps)
    return {"folder": arguments.output, "table": table}
