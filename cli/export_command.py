"""Turn a Finedeep model that is a dense model in disguise back into the dense model.

That is one with one sub-layer and gates that are all 1: as it was converted, or trained with its routers frozen. With
the conversion's receipt in the folder, the dense family and the order of neurons are restored, and the tensors equal
the ones that were converted. Anything else is refused.

examples:
  finedeep export ./llama-finedeep ./llama-again
"""

import argparse
from pathlib import Path

from finedeep_files.conversion_options import ExportOptions
from finedeep_files.inputs import check_model
from finedeep_files.working_folder import WorkingFolder

from .option_arguments import add_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `finedeep export`."""
    parser.add_argument("source", metavar="SRC", help="the folder of a Finedeep model with one sub-layer")
    parser.add_argument("destination", metavar="DST", help="the folder to make; it must not exist, or be empty")
    add_options(parser, ExportOptions)
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")


def run(arguments: argparse.Namespace) -> dict[str, str]:
    """Export and say where."""
    given = vars(arguments).copy()
    source, destination, quiet = given.pop("source"), given.pop("destination"), given.pop("quiet")
    WorkingFolder(Path(destination)).check()
    check_model(source)
    from finedeep.convert import export_checkpoint

    folder = export_checkpoint(source, destination, progress=not quiet, **given)
    if not quiet:
        print(f'{folder}: load it with AutoModelForCausalLM.from_pretrained("{folder}")')
    return {"folder": str(folder)}
