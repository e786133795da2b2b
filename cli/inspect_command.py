"""How sparse a model is, and what its gates do, on a text: a Finedeep model or a dense one.

NSAR is the share of FFN activations act(gate) whose size is above a threshold, 0.1 in the paper (arXiv:2502.12928). Of
a Finedeep model there are the gates as well: mean, spread, entropy, how many are near 0 or 1, how experts go together,
and experts that never matter (less than 1 % of their sub-layer's output on every token).

The text is read as it goes, in windows of 512 tokens; memory does not grow with it.

examples:
  finedeep inspect ./llama-finedeep --text text.txt
  finedeep inspect ./llama-finedeep --text text.txt --baseline ./llama --output ./inspection
"""

import argparse
import sys
from pathlib import Path

from finedeep_files.evaluation_options import DTYPES
from finedeep_files.inputs import check_model, check_text
from finedeep_files.working_folder import WorkingFolder

from .argument_types import device, positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `finedeep inspect`."""
    option = parser.add_argument
    option("model", metavar="MODEL", help="a folder or a Hub id, Finedeep or dense")
    option("--text", required=True, metavar="FILE", help="a UTF-8 text")
    option("--baseline", metavar="DENSE", help="another model, to be put beside it")
    option(
        "--tokens", type=positive_int, default=65_536, metavar="N", help="of the text at most (default: %(default)s)"
    )
    option("--output", metavar="DIR", help="where to write inspection.json and the figures, as PNG and SVG")
    option("--overwrite", action="store_true", help="replace an inspection in --output, its own files only")
    option("--device", type=device, help="such as cpu or cuda:0 (default: a GPU where there is one)")
    option("--dtype", default="auto", choices=DTYPES, help="default: auto, the checkpoint's own")
    option("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> None:
    """Inspect and print a table."""
    if arguments.output:
        WorkingFolder(Path(arguments.output), overwrite=arguments.overwrite).check()
    for model in filter(None, (arguments.model, arguments.baseline)):
        check_model(model)
    check_text(arguments.text)
    from finedeep.convert.code_files import advice
    from finedeep.eval.inspect.inspection import inspect, prepare, save, table_of

    if line := advice(arguments.model):
        print(line, file=sys.stderr)
    if arguments.output:
        prepare(arguments.output, arguments.overwrite)
    models = {"dense": arguments.baseline} if arguments.baseline else {}
    models["finedeep" if arguments.baseline else "model"] = arguments.model
    found = {
        name: inspect(
            model,
            arguments.text,
            tokens=arguments.tokens,
            device=arguments.device,
            dtype=arguments.dtype,
            progress=not arguments.quiet,
        )
        for name, model in models.items()
    }
    print(table_of(found))
    if arguments.output:
        for path in save(found, arguments.output, arguments.overwrite):
            print(path)
