"""Train a converted model as a whole, to say what its dense teacher says.

What calibration leaves of the gap to the dense model is closed here, with transformers' Trainer: mixed precision,
checkpoints, loggers and everything else in its TrainingArguments is had by --set NAME=VALUE, and several processes,
FSDP and DeepSpeed by `accelerate launch -m finedeep_cli heal ...`. A stopped run goes on with --resume.

The loss is W * KL(teacher || model) + (1 - W) * next-token loss, both in nats per token. Where the teacher has as many
layers of the same size, H times the relative distance of each layer's output from the teacher's comes on top, with an H
that goes down to 0.

All parameters are trained by AdamW in float32: some 16 bytes of memory for each, beside the teacher, activations and
logits.

examples:
  finedeep heal ./llama-finedeep ./healed --teacher ./llama                       on text that the teacher makes up
  finedeep heal ./llama-finedeep ./healed --teacher ./llama --data text.txt
  finedeep heal ./llama-finedeep ./healed --teacher ./llama --data ORG/DATASET --tokens 50000000
  finedeep heal ./llama-finedeep ./healed --data text.txt                         without a teacher: next-token loss
  finedeep heal ./llama-finedeep ./healed --teacher ./llama --set bf16=true --set gradient_accumulation_steps=4
"""

import argparse
import sys
from pathlib import Path

from finedeep_files.inputs import check_model
from finedeep_files.working_folder import WorkingFolder

from .argument_types import field, positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `finedeep heal`."""
    option = parser.add_argument
    option("model", metavar="DIR", help="the folder, or the Hub id, of a Finedeep checkpoint")
    option("destination", metavar="DST", help="the folder to make")
    option("--teacher", metavar="DENSE", help="a folder or a Hub id: the dense model that DIR was converted from")
    option(
        "--data",
        default="self",
        metavar="D",
        help="a text file, or JSON Lines with a 'text' in each record; a dataset with a column 'text', as NAME, "
        "NAME:CONFIG or NAME:CONFIG:SPLIT; or self, to sample from the teacher (default)",
    )
    option("--tokens", type=positive_int, default=1_048_576, metavar="N", help="of the data (default: %(default)s)")
    option(
        "--context",
        type=positive_int,
        default=512,
        metavar="N",
        help="tokens in a sequence, at most (default: %(default)s)",
    )
    option("--steps", type=positive_int, default=1000, metavar="N", help="of the optimiser (default: %(default)s)")
    option("--batch-size", type=positive_int, default=16, metavar="N", help="sequences a device (default: %(default)s)")
    option(
        "--learning-rate",
        type=float,
        metavar="R",
        help="its peak (default: 0.064 / hidden size, which is 1e-3 for 64 and 1.6e-5 for 4096)",
    )
    option(
        "--divergence",
        type=float,
        metavar="W",
        help="the teacher's share of the loss, from 0 to 1 (default: 1 with a teacher, 0 without)",
    )
    option(
        "--hidden-states",
        type=float,
        metavar="H",
        help="the first weight of the distance of each layer's output from the teacher's (default: 10 where the two "
        "can be compared and W is above 0)",
    )
    option("--seed", type=int, default=0, help="for sampling and the order of the data (default: 0)")
    option(
        "--set",
        dest="training",
        type=field,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of transformers' TrainingArguments, the value as JSON or as text; may be given again",
    )
    option("--resume", action="store_true", help="continue from the last checkpoint of a run that was stopped")
    option(
        "--overwrite",
        action="store_true",
        help="replace a finished healing at DST, its own files only; start again where a run was stopped",
    )
    option("--quiet", action="store_true", help="no progress bar, no summary")


def run(arguments: argparse.Namespace) -> None:
    """Heal and say how far it went."""
    WorkingFolder(Path(arguments.destination), resume=arguments.resume, overwrite=arguments.overwrite).check()
    for model in filter(None, (arguments.model, arguments.teacher)):
        check_model(model)
    from finedeep.convert.heal.run import heal, is_main_process

    given = vars(arguments).copy()
    given.pop("run", None)
    model, destination, quiet = given.pop("model"), given.pop("destination"), given.pop("quiet")
    done = heal(model, destination, progress=not quiet, **{**given, "training": dict(given["training"])})
    if quiet or not is_main_process():
        return
    print(f"{done.folder}: trained on {done.tokens_seen:,} tokens; on held-out ones, in nats per token:")
    names = {"next_token": "next-token loss", "divergence": "KL from the teacher"}
    for name, before in done.before.items():
        print(f"  {names[name]} {before:.4f} -> {done.after[name]:.4f}")
    if all(done.after[name] > before for name, before in done.before.items()):
        print("  which is worse than before: a lower --learning-rate is wanted, or more text", file=sys.stderr)
    print(f'  load it with AutoModelForCausalLM.from_pretrained("{done.folder}", trust_remote_code=True)')
