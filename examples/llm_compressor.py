"""What llm-compressor's recipes cost a Finedeep model, beside the same recipe on the dense model.

    python examples/llm_compressor.py CHECKPOINT TEXT

converts CHECKPOINT, calibrates and compresses dense and converted models under each recipe on the first half of TEXT,
loads what was saved again, measures its loss on the second half in windows of 512 tokens, and prints the Markdown table
of docs/quantise.md; --update writes it there. It runs on a CPU, but for AWQ. llm-compressor is not a dependency of
this project: `make test-programs` says how it is installed.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from compressed_tensors.quantization import QuantizationScheme
from datasets import Dataset
from finedeep.benchmarks.documents import put_table
from finedeep.convert import convert_checkpoint
from finedeep.convert.quantiser_mappings import mappings_of
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from loguru import logger
from measure import arguments_of, mean_loss, text_windows
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

MODELS = {"dense": None, "M=1 K=4": (1, 4), "M=2 K=4": (2, 4)}
HEAD = ["lm_head"]
INT8 = {"targets": "Linear", "ignore": HEAD, "scheme": "W8A8"}
# One scale for each row of a weight, whatever its width.
FOUR_BITS = {
    "ignore": HEAD,
    "config_groups": {
        "rows": QuantizationScheme(
            targets=["Linear"], weights={"num_bits": 4, "strategy": "channel", "symmetric": True}
        )
    },
}


def smoothed(config: PretrainedConfig) -> Modifier:
    """SmoothQuant, by llm-compressor's own mappings for Llama, or by the package's for Finedeep."""
    if config.model_type != "finedeep":
        return SmoothQuantModifier(smoothing_strength=0.5)
    pairs = mappings_of(config, norms_only=True)
    return SmoothQuantModifier(smoothing_strength=0.5, mappings=[(readers, layer) for layer, readers in pairs])


def balanced(config: PretrainedConfig) -> Modifier:
    """AWQ, likewise."""
    if config.model_type != "finedeep":
        return AWQModifier()
    return AWQModifier(mappings=[AWQMapping(layer, readers) for layer, readers in mappings_of(config)])


RECIPES: dict[str, Callable[[PretrainedConfig], list[Modifier]]] = {
    "int8, round to nearest": lambda config: [QuantizationModifier(**INT8)],
    "FP8, round to nearest": lambda config: [QuantizationModifier(**{**INT8, "scheme": "FP8_DYNAMIC"})],
    "SmoothQuant, int8": lambda config: [smoothed(config), QuantizationModifier(**INT8)],
    "4 bits, round to nearest": lambda config: [QuantizationModifier(**FOUR_BITS)],
    "GPTQ, 4 bits": lambda config: [GPTQModifier(**FOUR_BITS)],
    "AWQ, 4 bits": lambda config: [balanced(config), QuantizationModifier(**FOUR_BITS)],
    "SparseGPT 2:4": lambda config: [
        SparseGPTModifier(targets=[r"re:model\.layers\.\d+$"], sparsity=0.5, mask_structure="2:4")
    ],
}
ON_ACCELERATORS = ("AWQ, 4 bits",)


def compressed(
    folder: str | Path,
    recipe: Callable[[PretrainedConfig], list[Modifier]],
    windows: torch.Tensor,
    output: str | Path | None = None,
) -> PreTrainedModel:
    """A model under a recipe, calibrated on windows (rows, tokens), and saved where an output is named."""
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in windows]
    return oneshot(
        model=str(folder),
        trust_remote_code_model=True,
        recipe=recipe(AutoConfig.from_pretrained(folder, trust_remote_code=True)),
        dataset=Dataset.from_list(rows),
        num_calibration_samples=len(rows),
        output_dir=str(output) if output else None,
    ).eval()


def main() -> None:
    """Measure and print."""
    arguments = arguments_of(__doc__)
    transformers.logging.set_verbosity_error()
    logger.remove()  # llm-compressor's, which writes where the table goes
    windows = text_windows(arguments.checkpoint, arguments.text)
    learned, held_out = windows[: len(windows) // 2], windows[len(windows) // 2 :]
    lines, whole = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"dense": arguments.checkpoint}
        for name, shape in MODELS.items():
            if shape is not None:
                folders[name] = f"{scratch}/{name}"
                sizes = dict(zip(("num_expert_sublayers", "num_experts_per_sublayer"), shape, strict=True))
                convert_checkpoint(arguments.checkpoint, folders[name], **sizes, progress=False)
        for recipe in (None, *RECIPES):
            if recipe in ON_ACCELERATORS and not torch.accelerator.is_available():
                continue
            for name, folder in folders.items():
                place = folder
                if recipe:
                    place = f"{scratch}/{recipe}/{name}"
                    compressed(folder, RECIPES[recipe], learned, place)
                model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True, dtype="auto").eval()
                loss = mean_loss(model, held_out)
                whole.setdefault(name, loss)
                lines.append(f"| {recipe or 'none'} | {name} | {loss:.4f} | {loss - whole[name]:+.4f} |")
    table = "\n".join(["| recipe | model | loss | over none |", "| --- | --- | ---: | ---: |", *lines])
    print(table)
    if arguments.update:
        put_table("llm-compressor", table)


if __name__ == "__main__":
    main()
