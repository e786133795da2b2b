"""Cut every FFN of a dense checkpoint into M sub-layers of K experts.

The weights are kept as they are and every gate starts at exactly 1. With one sub-layer, which is the default, and in
grow mode, the logits equal the dense model's. A cut into more sub-layers loses much of the model: --calibrate fits each
layer's sub-layers to what the dense FFN did, on a text or on one that the dense model makes up; `finedeep heal` then
trains the whole.

Families: llama, mistral, qwen2, qwen3, smollm3, phi3, granite, seed_oss. Weights go from safetensors to safetensors one
tensor at a time; code in the source is never run. The folder appears at DST when it is complete.

examples:
  finedeep convert ./llama ./llama-finedeep                               M=1 K=8, exact
  finedeep convert ./llama ./llama-deeper --sublayers 2 --mode grow       exact, with twice the FFN
  finedeep convert ./llama ./llama-two --sublayers 2 --calibrate self     no text at hand
  finedeep convert ./llama ./llama-two --sublayers 2 --calibrate text.txt --resume     continues a stopped run
  finedeep convert ORG/NAME ./finedeep --experts 16                       from the Hub
  accelerate launch -m finedeep_cli convert ./llama ./llama-two --sublayers 2 --calibrate self     shared out
  finedeep convert ORG/NAME ./finedeep --dry-run                          show the plan, write nothing
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finedeep_files.conversion_options import Options
from finedeep_files.inputs import check_model, check_text
from finedeep_files.working_folder import WorkingFolder

from .argument_types import assignment
from .option_arguments import add_options, add_restart

if TYPE_CHECKING:
    from finedeep.convert import Conversion

# Nats per token on WikiText-2's validation text: examples/results/real.json.
CUT = (
    "a cut into more than one sub-layer loses much of the model (SmolLM2-135M: 8.9 instead of 3.3 nats per token); "
    "--calibrate self brings most of it back, then `finedeep heal` more. --sublayers 1 and --mode grow lose nothing."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `finedeep convert`."""
    parser.add_argument("source", metavar="SRC", help="a folder with a safetensors checkpoint, or a Hub id")
    parser.add_argument("destination", metavar="DST", help="the folder to make")
    add_options(parser, Options, assignment=assignment)
    option = parser.add_argument
    option("--revision", help="branch, tag or commit of a Hub source")
    add_restart(parser, "conversion")
    option(
        "--dry-run",
        action="store_true",
        help="print what would be made of what, sizes included; write nothing (a Hub id is downloaded for it)",
    )
    option("--quiet", action="store_true", help="no progress bar, no summary")


def run(arguments: argparse.Namespace) -> Any:
    """Convert and say what was made."""
    if not arguments.dry_run:
        WorkingFolder(Path(arguments.destination), resume=arguments.resume, overwrite=arguments.overwrite).check()
    check_model(arguments.source)
    for text in (arguments.calibrate, arguments.text):
        if text not in (None, "self"):
            check_text(text)
    if ":" in (arguments.assignment or ""):
        sys.path.append(os.getcwd())  # where a function of the user's may lie; what is installed comes first
    from finedeep.convert import convert_checkpoint, plan_conversion

    given = vars(arguments).copy()
    source, destination = given.pop("source"), given.pop("destination")
    quiet, dry_run = given.pop("quiet"), given.pop("dry_run")
    where = {name: given.pop(name) for name in ("resume", "overwrite")}
    plain_cut = arguments.num_expert_sublayers > 1 and arguments.mode == "split" and not arguments.calibrate
    if plain_cut and not quiet:
        print(f"finedeep: {CUT}", file=sys.stderr, flush=True)
    if dry_run:
        plan = plan_conversion(source, **given)
        print(plan.text())
        return {"plan": plan.text()}
    done = convert_checkpoint(source, destination, **where, progress=not quiet, **given)
    if not quiet and done is not None:  # else another process says it
        _tell(done, plain_cut, calibrate=arguments.calibrate)
    return done


def _tell(done: "Conversion", plain_cut: bool, calibrate: str | None) -> None:
    M, K = done.num_expert_sublayers, done.num_experts_per_sublayer
    padding = f", {done.padded_neurons} of its neurons zero padding" if done.padded_neurons else ""
    growth = done.finedeep_parameters / done.dense_parameters - 1
    print(f"{done.folder}: M={M} sub-layers of K={K} experts, {done.expert_intermediate_size} neurons each")
    print(f"  FFN width {M * K * done.expert_intermediate_size} per decoder layer{padding}")
    print(f"  {done.finedeep_parameters:,} parameters (dense: {done.dense_parameters:,}, {growth:+.2%})")
    if done.calibration:
        cut, calibrated = (max(getattr(layer, stage) for layer in done.calibration) for stage in ("cut", "calibrated"))
        print(f"  errors relative to the stream, on held-out text: up to {cut:.2f} as cut, {calibrated:.2f} calibrated")
    if done.exact:
        print("  exact: the logits equal the dense model's")
        if calibrate:
            print("  not calibrated: there was nothing to calibrate")
    elif done.calibration:
        print("  not exact: `finedeep heal` brings the loss nearer to the dense model's")
    else:
        print(f"  not exact: {CUT}")
    print(f'  load it with AutoModelForCausalLM.from_pretrained("{done.folder}", trust_remote_code=True)')
