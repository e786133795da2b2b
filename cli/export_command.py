"""Turn a Finedeep model that is a dense model in disguise back into the dense model.

That is one with one sub-layer and gates that are all 1: as it was converted, or trained with its routers frozen. With
the conversion's receipt in the folder, the dense family and the order of neurons are restored, and the tensors equal
the ones that were converted. Anything else is refused.

examples:
  finedeep export ./llama-finedeep ./llama-again
"""

import argparse
from pathlib import Path

from finedeep_files.inputs import check_model
from finedeep_files.working_folder import WorkingFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `finedeep export`."""
    parser.add_argument("source", metavar="SRC", help="the folder of a Finedeep model with one sub-layer")
    parser.add_argument("destination", metavar="DST", help="the folder to make; it must not exist, or be empty")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file (default: 5GB)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")


def run(arguments: argparse.Namespace) -> dict[str, str]:
    """Export and say where."""
    WorkingFolder(Path(arguments.destination)).check()
    check_model(arguments.source)
    from finedeep.convert import export_checkpoint

    folder = export_checkpoint(
        arguments.source,
        arguments.destination,
        max_shard_size=arguments.max_shard_size,
        progress=not arguments.quiet,
    )
    if not arguments.quiet:
        print(f'{folder}: load it with AutoModelForCausalLM.from_pretrained("{folder}")')
    return {"folder": str(folder)}
