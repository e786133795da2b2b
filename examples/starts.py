"""From one dense checkpoint, the models whose continued training is compared.

    python examples/starts.py ./dense ./starts

dense         the checkpoint itself, in float32
m1-k8         the same function with M=1 K=8, whose routers have yet to learn
grow-m2-k8    the same function, with a second sub-layer that adds nothing yet
wider         the same function as a dense model: the new sub-layer's neurons are in the one FFN
calibrated    M=2 K=8, calibrated on a text that the dense model makes up
healed        that one, trained on to give the dense model's probabilities

What is there is not made again. examples/gpu_grid.py trains all of them with examples/continue_grid.yaml.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import from_checkout  # noqa: F401
import torch
from finedeep import FinedeepForCausalLM
from finedeep.convert import convert_checkpoint
from finedeep.convert.heal import heal
from prepare import made_whole
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

EXACT = {"num_experts_per_sublayer": 8, "dtype": "float32"}
SPLIT = EXACT | {"num_expert_sublayers": 2, "calibrate": "self"}


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path, help="a Llama checkpoint's folder")
    parser.add_argument("starts", type=Path, help="a folder for the models")
    parser.add_argument("--calibration-tokens", type=int, help="as of finedeep convert")
    parser.add_argument("--calibration-steps", type=int, help="as of finedeep convert")
    parser.add_argument("--heal-steps", type=int, help="as of finedeep heal")
    parser.add_argument("--heal-tokens", type=int, help="as of finedeep heal")
    arguments = parser.parse_args()
    calibration = {
        name: value
        for name in ("calibration_tokens", "calibration_steps")
        if (value := getattr(arguments, name)) is not None
    }
    healing = {"steps": arguments.heal_steps, "tokens": arguments.heal_tokens, "teacher": str(arguments.dense)}
    made = arguments.starts
    makers: dict[str, Callable[[Path], object]] = {
        "dense": lambda out: as_float32(arguments.dense, out),
        "m1-k8": lambda out: convert_checkpoint(arguments.dense, out, num_expert_sublayers=1, **EXACT),
        "grow-m2-k8": lambda out: convert_checkpoint(
            arguments.dense, out, num_expert_sublayers=2, mode="grow", **EXACT
        ),
        "wider": lambda out: widen(made / "dense", made / "grow-m2-k8", out),
        "calibrated": lambda out: convert_checkpoint(arguments.dense, out, resume=True, **SPLIT, **calibration),
        "healed": lambda out: heal(made / "calibrated", out, resume=True, **healing),
    }
    made.mkdir(parents=True, exist_ok=True)
    for name, make in makers.items():
        if not (made / name).exists():
            print(name, flush=True)
            make(made / name)


def as_float32(dense: Path, out: Path) -> None:
    """A copy, whole or not at all."""
    save(AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32), dense, out)


def widen(dense: Path, grown: Path, out: Path) -> None:
    """The dense model with the neurons of both of a grown one's sub-layers in its FFNs: W_down is zero for the new."""
    model = LlamaForCausalLM.from_pretrained(dense)
    tensors = FinedeepForCausalLM.from_pretrained(grown).state_dict()
    state = model.state_dict()
    for name in [name for name in state if ".mlp." in name]:
        layer, _, projection = name.partition(".mlp.")
        both = [tensors[f"{layer}.sublayers.{m}.{projection}"] for m in range(2)]
        state[name] = torch.cat(both, dim=1 if "down_proj" in projection else 0)
    model.config.intermediate_size = state["model.layers.0.mlp.up_proj.weight"].shape[0]
    wide = LlamaForCausalLM(model.config)
    wide.load_state_dict(state)
    save(wide, dense, out)


def save(model: torch.nn.Module, dense: Path, out: Path) -> None:
    """The model and the dense model's tokenizer."""
    with made_whole(out) as scratch:
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(dense).save_pretrained(scratch)


if __name__ == "__main__":
    main()
