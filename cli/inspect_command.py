"""How sparse a model is, and what its gates do, on a text: a Finedeep model or a dense one.

NSAR, the non-sparse activation rate, is the share of FFN activations act(gate) whose size is above a threshold, 0.1 in
the paper (arXiv:2502.12928). Of a Finedeep model there are the gates as well: mean, spread, entropy, how many are near
0 or 1, how experts go together, and experts that never matter (less than 1 % of their sub-layer's output on every
token).

The text is read as it goes, in windows of 512 tokens; memory does not grow with it.

examples:
  finedeep inspect ./llama-finedeep --text text.txt
  finedeep inspect ./llama-finedeep --text text.txt --baseline ./llama --output ./inspection
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from finedeep_files.inputs import check_model, check_text
from finedeep_files.inspection_options import InspectionOptions
from finedeep_files.working_folder import WorkingFolder

from .argument_types import device
from .option_arguments import add_options, add_restart


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `finedeep inspect`."""
    option = parser.add_argument
    option("model", metavar="MODEL", help="a folder or a Hub id, Finedeep or dense")
    option("--text", required=True, metavar="FILE", help="a UTF-8 text")
    option("--baseline", metavar="DENSE", help="another model, to be put beside it")
    option("--output", metavar="DIR", help="where to write inspection.json and the figures, as PNG and SVG")
    add_restart(parser, "inspection", resume=False, where="--output")
    add_options(parser, InspectionOptions, device=device)
    option("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Inspect and print a table."""
    given = vars(arguments).copy()
    model, baseline, text = given.pop("model"), given.pop("baseline"), given.pop("text")
    output, overwrite, quiet = given.pop("output"), given.pop("overwrite"), given.pop("quiet")
    if output:
        WorkingFolder(Path(output), overwrite=overwrite).check()
    for name in filter(None, (model, baseline)):
        check_model(name)
    check_text(text)
    from finedeep.convert.code_files import advice
    from finedeep.eval.inspect.inspection import inspect, prepare, save, table_of

    if line := advice(model):
        print(line, file=sys.stderr)
    if output:
        prepare(output, overwrite)
    models = {"dense": baseline, "finedeep": model} if baseline else {"model": model}
    found = {name: inspect(model, text, progress=not quiet, **given) for name, model in models.items()}
    print(table_of(found))
    if output:
        for path in save(found, output, overwrite):
            print(path)
    return found
