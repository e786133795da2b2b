"""Cut every FFN of a dense Llama checkpoint into M sub-layers of K experts.

The weights are kept as they are and every gate starts at exactly 1. With one sub-layer the logits equal the dense
model's. With two or more they do not: expect a higher loss until the model is trained on.

examples:
  finedeep convert ./llama ./llama-finedeep --sublayers 1 --experts 8     exact
  finedeep convert ORG/NAME ./finedeep --sublayers 2 --experts 8          from the Hub
"""

import argparse

from .argument_types import positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `finedeep convert`."""
    parser.add_argument("source", metavar="SRC", help="a folder with a safetensors checkpoint, or a Hub id")
    parser.add_argument("destination", metavar="DST", help="the folder to make; it must not exist, or be empty")
    parser.add_argument(
        "--sublayers",
        type=positive_int,
        default=2,
        metavar="M",
        help="sub-layers per decoder layer (default: 2)",
    )
    parser.add_argument(
        "--experts", type=positive_int, default=8, metavar="K", help="experts per sub-layer, all active (default: 8)"
    )
    parser.add_argument(
        "--routing-input",
        choices=("expert_output", "hidden_state"),
        default="expert_output",
        help="what an expert's score is read from (default: expert_output, the paper's method)",
    )
    parser.add_argument(
        "--routing-function",
        choices=("sigmoid", "softmax"),
        default="sigmoid",
        help="how scores become gates (default: sigmoid)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub source")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")


def run(arguments: argparse.Namespace) -> None:
    """Convert and say what was made."""
    from finedeep.convert import convert_checkpoint

    done = convert_checkpoint(
        arguments.source,
        arguments.destination,
        num_expert_sublayers=arguments.sublayers,
        num_experts_per_sublayer=arguments.experts,
        routing_input=arguments.routing_input,
        routing_function=arguments.routing_function,
        revision=arguments.revision,
        progress=not arguments.quiet,
    )
    if arguments.quiet:
        return
    M, K = done.num_expert_sublayers, done.num_experts_per_sublayer
    padding = f", {done.padded_neurons} of its neurons zero padding" if done.padded_neurons else ""
    growth = done.finedeep_parameters / done.dense_parameters - 1
    print(f"{done.folder}: M={M} sub-layers of K={K} experts, {done.expert_intermediate_size} neurons each")
    print(f"  FFN width {M * K * done.expert_intermediate_size} per decoder layer{padding}")
    print(f"  {done.finedeep_parameters:,} parameters (dense: {done.dense_parameters:,}, {growth:+.2%})")
    if M == 1:
        print("  exact: the logits equal the dense model's")
    else:
        print("  not exact: with M >= 2 the loss is higher than the dense model's until the model is trained on")
    print(f'  load it with AutoModelForCausalLM.from_pretrained("{done.folder}", trust_remote_code=True)')
