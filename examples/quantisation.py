"""What quantisation costs a Finedeep model, beside the same recipe on the dense model.

    python examples/quantisation.py CHECKPOINT TEXT

converts CHECKPOINT, loads dense and converted models under each recipe, measures size and loss on TEXT in windows of
512 tokens, and prints the Markdown table of docs/quantise.md; --update writes it there. It runs on a CPU.
"""

import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import finedeep  # noqa: F401  (registers the model)
import torch
import transformers
from finedeep.benchmarks.documents import put_table
from finedeep.convert import convert_checkpoint
from measure import arguments_of, mean_loss, text_windows
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

# K=4, so that no width is a multiple of 16 but not of 64: bitsandbytes 0.50.2 misreads such 4-bit weights on a CPU.
MODELS = {"dense": None, "M=1 K=4": (1, 4), "M=2 K=4": (2, 4)}


def full_precision(folder: str) -> nn.Module:
    """float32, as it is."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def torchao_int8(folder: str) -> nn.Module:
    """torchao, int8 weights only."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    recipe = TorchAoConfig(Int8WeightOnlyConfig())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=recipe)


def bitsandbytes_int8(folder: str) -> nn.Module:
    """bitsandbytes LLM.int8: activations are rounded too."""
    recipe = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=recipe)


def bitsandbytes_nf4(folder: str) -> nn.Module:
    """bitsandbytes 4-bit normal float."""
    recipe = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=recipe)
    # In eval mode some CPUs repack the weights, which only widths divisible by 32 allow. There is no dropout here.
    return model.train()


def torch_dynamic_int8(folder: str) -> nn.Module:
    """torch's dynamic int8: activations are rounded too."""
    return torch.ao.quantization.quantize_dynamic(full_precision(folder), {nn.Linear}, dtype=torch.qint8)


RECIPES: dict[str, Callable[[str], nn.Module]] = {
    "float32": full_precision,
    "torchao int8 weight-only": torchao_int8,
    "bitsandbytes int8": bitsandbytes_int8,
    "bitsandbytes nf4": bitsandbytes_nf4,
    "torch dynamic int8": torch_dynamic_int8,
}


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, with the scales that a quantiser keeps beside its values."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(stored_bytes(getattr(tensor, name)) for name in names)
    if tensor.is_quantized:
        scales = tensor.q_per_channel_scales() if tensor.qscheme() == torch.per_channel_affine else torch.empty(1)
        return tensor.numel() * tensor.element_size() + 2 * scales.numel() * 4
    total = tensor.numel() * tensor.element_size()
    state = getattr(tensor, "quant_state", None)  # bitsandbytes 4-bit, whose scales may be quantised in their turn
    while state is not None:
        total += state.absmax.numel() * state.absmax.element_size()
        state = state.state2
    scales = getattr(tensor, "SCB", None)  # bitsandbytes int8
    return total if scales is None else total + scales.numel() * scales.element_size()


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    for module in model.modules():
        if isinstance(module, torch.ao.nn.quantized.dynamic.Linear):
            tensors[id(module)] = module.weight()
    return sum(stored_bytes(tensor) for tensor in tensors.values())


def main() -> None:
    """Measure and print."""
    arguments = arguments_of(__doc__)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")

    windows = text_windows(arguments.checkpoint, arguments.text)
    table = "| recipe | model | loss | over float32 | size of float32's |\n| --- | --- | ---: | ---: | ---: |\n"
    lines, whole = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"dense": arguments.checkpoint}
        for name, shape in MODELS.items():
            if shape is not None:
                M, K = shape
                folders[name] = str(Path(scratch) / f"{M}-{K}")
                convert_checkpoint(
                    arguments.checkpoint,
                    folders[name],
                    num_expert_sublayers=M,
                    num_experts_per_sublayer=K,
                    progress=False,
                )
        for recipe, load in RECIPES.items():
            for name, folder in folders.items():
                model = load(folder)
                loss, size = mean_loss(model, windows), model_bytes(model)
                whole.setdefault(name, (loss, size))
                exact, full = whole[name]
                lines.append(f"| {recipe} | {name} | {loss:.4f} | {loss - exact:+.4f} | {size / full:.3f} |")
    table += "\n".join(lines)
    print(table)
    if arguments.update:
        put_table("quantisation", table)


if __name__ == "__main__":
    main()
