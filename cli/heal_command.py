"""Train a converted model as a whole, to say what its dense teacher says.

What calibration leaves of the gap to the dense model is closed here, with transformers' Trainer: mixed precision,
checkpoints, loggers and everything else in its TrainingArguments by --set NAME=VALUE; several processes, FSDP and
DeepSpeed by `accelerate launch -m finedeep_cli heal ...`. --resume continues a stopped run.

The loss is W * KL(teacher || model) + (1 - W) * next-token loss, both in nats per token. Where the teacher has as many
layers of the same size, H times the relative distance of each layer's output from the teacher's comes on top, with an H
that goes down to 0.

All parameters are trained by AdamW in float32: some 16 bytes of memory for each, beside the teacher, activations and
logits. --adapter-rank trains LoRA instead, which is merged into the weights at the end: some 4 bytes for each.

examples:
  finedeep heal ./llama-finedeep ./healed --teacher ./llama                       on text that the teacher makes up
  finedeep heal ./llama-finedeep ./healed --teacher ./llama --data text.txt
  finedeep heal ./llama-finedeep ./healed --teacher ./llama --data ORG/DATASET --tokens 50000000
  finedeep heal ./llama-finedeep ./healed --data text.txt                         without a teacher: next-token loss
  finedeep heal ./llama-finedeep ./healed --teacher ./llama --set bf16=true --set gradient_accumulation_steps=4
  finedeep heal ./llama-finedeep ./healed --teacher ./llama --adapter-rank 64     in a fraction of the memory
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finedeep_files.healing_options import HealingOptions
from finedeep_files.inputs import check_model
from finedeep_files.working_folder import WorkingFolder

from .option_arguments import add_options, add_restart

if TYPE_CHECKING:
    from finedeep.convert.heal.run import Healed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `finedeep heal`."""
    option = parser.add_argument
    option("model", metavar="DIR", help="the folder, or the Hub id, of a Finedeep checkpoint")
    option("destination", metavar="DST", help="the folder to make")
    add_options(parser, HealingOptions)
    add_restart(parser, "healing")
    option("--quiet", action="store_true", help="no progress bar, no summary")


def run(arguments: argparse.Namespace) -> Any:
    """Heal and say how far it went."""
    WorkingFolder(Path(arguments.destination), resume=arguments.resume, overwrite=arguments.overwrite).check()
    for model in filter(None, (arguments.model, arguments.teacher)):
        check_model(model)
    from finedeep.convert.heal import heal
    from finedeep_files.processes import is_first_process

    given = vars(arguments).copy()
    model, destination, quiet = given.pop("model"), given.pop("destination"), given.pop("quiet")
    done = heal(model, destination, progress=not quiet, **{**given, "training": dict(given["training"])})
    if not is_first_process():
        return None
    if not quiet:
        _tell(done)
    return done


def _tell(done: "Healed") -> None:
    print(f"{done.folder}: trained on {done.tokens_seen:,} tokens; on held-out ones, in nats per token:")
    names = {"next_token": "next-token loss", "divergence": "KL from the teacher"}
    for name, before in done.before.items():
        print(f"  {names[name]} {before:.4f} -> {done.after[name]:.4f}")
    if all(done.after[name] > before for name, before in done.before.items()):
        print("  which is worse than before: try a lower --learning-rate, or more text", file=sys.stderr)
    print(f'  load it with AutoModelForCausalLM.from_pretrained("{done.folder}", trust_remote_code=True)')
