"""Cut every FFN of a dense checkpoint into M sub-layers of K experts.

The weights are kept as they are and every gate starts at exactly 1. With one sub-layer, and in grow mode, the logits
equal the dense model's. Otherwise they do not, and much of the model is lost: --calibrate fits each layer's sub-layers
to what the dense FFN did, on a text or on one that the dense model makes up; `finedeep heal` then trains the whole.

Families: llama, mistral, qwen2, qwen3, smollm3, phi3, granite, seed_oss. Weights go from safetensors to safetensors one
tensor at a time; code in the source is never run. The folder appears at DST when it is complete.

examples:
  finedeep convert ./llama ./llama-finedeep --sublayers 1 --experts 8     exact
  finedeep convert ./llama ./llama-deeper --sublayers 2 --mode grow       exact, with twice the FFN
  finedeep convert ./llama ./llama-two --sublayers 2 --calibrate self     no text at hand
  finedeep convert ./llama ./llama-two --calibrate text.txt --resume      hours of work, gone on with when stopped
  finedeep convert ORG/NAME ./finedeep --sublayers 2 --experts 8          from the Hub
  accelerate launch -m finedeep_cli convert ./llama ./llama-two --calibrate self      several processes share the work
  finedeep convert ORG/NAME ./finedeep --dry-run                          show the plan, write nothing
"""

import argparse
from pathlib import Path

from finedeep_files.inputs import check_model, check_text
from finedeep_files.working_folder import WorkingFolder

from .argument_types import non_negative_int, positive_int

# The command's name for each of `finedeep.convert.plan.Options`. Their meaning and their defaults are said here, since
# --help must not import torch; a test holds the two against each other.
ASSIGNMENTS = ("contiguous", "strided", "random", "activity", "nonlinearity", "clusters")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `finedeep convert`."""
    parser.add_argument("source", metavar="SRC", help="a folder with a safetensors checkpoint, or a Hub id")
    parser.add_argument("destination", metavar="DST", help="the folder to make")
    option = parser.add_argument
    option(
        "--sublayers",
        dest="num_expert_sublayers",
        type=positive_int,
        default=2,
        metavar="M",
        help="sub-layers per decoder layer (default: 2)",
    )
    option(
        "--experts",
        dest="num_experts_per_sublayer",
        type=positive_int,
        default=8,
        metavar="K",
        help="experts per sub-layer, all active (default: 8)",
    )
    option(
        "--mode",
        choices=("split", "grow"),
        default="split",
        help="split: sub-layers share the dense neurons, same size (default). grow: sub-layer 1 has them all and new "
        "ones start at zero; exact, larger",
    )
    option(
        "--assignment",
        choices=ASSIGNMENTS,
        help="which neuron goes to which expert: in their own order (contiguous, default), dealt out (strided), "
        "shuffled (random), the most active on a text first (activity), the least linear first (nonlinearity, default "
        "with --calibrate), or by direction of their gates (clusters)",
    )
    option(
        "--assignment-text",
        dest="text",
        metavar="FILE",
        help="the text on which activity is measured, without --calibrate",
    )
    option(
        "--calibrate",
        metavar="TEXT",
        help="fit each layer to the dense one on a text file, or on a text sampled from the dense model (self); there "
        "is nothing to fit where the conversion is exact",
    )
    option(
        "--calibration-tokens",
        type=positive_int,
        metavar="N",
        help="of the text; a sixteenth is held out (default: by the model's size, at least 65,536)",
    )
    option(
        "--calibration-steps",
        type=non_negative_int,
        metavar="N",
        help="of 4,096 tokens, for each layer; 0: closed-form corrections only (default: 100)",
    )
    option(
        "--seed", type=int, default=0, help="for random, clusters, new weights, calibration and the probe (default: 0)"
    )
    option(
        "--routing-input",
        choices=("expert_output", "hidden_state"),
        default="expert_output",
        help="what an expert's score is read from (default: expert_output, the paper's method)",
    )
    option(
        "--routing-function",
        choices=("sigmoid", "softmax"),
        default="sigmoid",
        help="how scores become gates (default: sigmoid)",
    )
    option(
        "--dtype",
        choices=("keep", "float32", "bfloat16", "float16"),
        default="keep",
        help="of the weights that are written (default: keep)",
    )
    option("--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file (default: 5GB)")
    option("--revision", help="branch, tag or commit of a Hub source")
    option("--resume", action="store_true", help="continue from what a stopped run has finished")
    option(
        "--overwrite",
        action="store_true",
        help="replace a finished conversion at DST, its own files only; start again where a run was stopped",
    )
    option(
        "--dry-run",
        action="store_true",
        help="print what would be made of what, sizes included; write nothing (a Hub id is downloaded for it)",
    )
    option("--quiet", action="store_true", help="no progress bar, no summary")


def run(arguments: argparse.Namespace) -> None:
    """Convert and say what was made."""
    if not arguments.dry_run:
        WorkingFolder(Path(arguments.destination), resume=arguments.resume, overwrite=arguments.overwrite).check()
    check_model(arguments.source)
    for text in (arguments.calibrate, arguments.text):
        if text not in (None, "self"):
            check_text(text)
    from finedeep.convert import convert_checkpoint, plan_conversion

    given = vars(arguments).copy()
    source, destination = given.pop("source"), given.pop("destination")
    quiet, dry_run = given.pop("quiet"), given.pop("dry_run")
    where = {name: given.pop(name) for name in ("resume", "overwrite")}
    given.pop("run", None)
    if dry_run:
        print(plan_conversion(source, **given).text())
        return
    done = convert_checkpoint(source, destination, **where, progress=not quiet, **given)
    if quiet or done is None:  # another process says it
        return
    M, K = done.num_expert_sublayers, done.num_experts_per_sublayer
    padding = f", {done.padded_neurons} of its neurons zero padding" if done.padded_neurons else ""
    growth = done.finedeep_parameters / done.dense_parameters - 1
    print(f"{done.folder}: M={M} sub-layers of K={K} experts, {done.expert_intermediate_size} neurons each")
    print(f"  FFN width {M * K * done.expert_intermediate_size} per decoder layer{padding}")
    print(f"  {done.finedeep_parameters:,} parameters (dense: {done.dense_parameters:,}, {growth:+.2%})")
    if done.calibration:
        cut, calibrated = (max(getattr(layer, rung) for layer in done.calibration) for rung in ("cut", "calibrated"))
        print(f"  errors relative to the stream, on held-out text: up to {cut:.2f} as cut, {calibrated:.2f} calibrated")
    else:
        worst = max(done.relative_ffn_difference)
        print(f"  FFN outputs differ by up to {worst:.1e} of the dense ones on a probe batch")
    if done.exact:
        print("  exact: the logits equal the dense model's")
        if arguments.calibrate:
            print("  not calibrated: there was nothing to calibrate")
    elif done.calibration:
        print("  not exact: `finedeep heal` brings the loss nearer to the dense model's")
    else:
        print("  not exact: much is lost with M >= 2; --calibrate keeps most of it, and `finedeep heal` the rest")
    print(f'  load it with AutoModelForCausalLM.from_pretrained("{done.folder}", trust_remote_code=True)')
