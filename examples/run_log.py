"""A training's log: lines of JSON, first what is trained, then what was measured."""

import json
import re
from pathlib import Path
from typing import Any

import from_checkout  # noqa: F401
import torch
import transformers
from finedeep import __version__
from finedeep.eval.report.cost import flops
from finedeep_files.masking import masked
from finedeep_files.whole_file import write_whole
from recipe import Recipe, without_folders
from transformers import PreTrainedModel

# bfloat16 products without sparsity, TFLOP/s, by words of the device's name; as NVIDIA's data sheets have them
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165}


def first_line(recipe: Recipe, model: PreTrainedModel) -> dict[str, Any]:
    """What is trained, without folders and secrets."""
    context = recipe["data"]["context"]
    return {
        "recipe": masked(without_folders(recipe)),
        "parameters": model.num_parameters(),
        "trained": model.num_parameters(only_trainable=True),
        "flops_per_token": flops(model, torch.zeros(1, context, dtype=torch.long)) / context,
        "versions": {"finedeep": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def begin_log(path: Path, first: dict[str, Any], step: int) -> None:
    """A log with its first line; of one that is there, after a kill, what came after `step` is cut."""
    before = path.read_text(encoding="utf-8").splitlines() if step and path.exists() else []
    kept = [line for line in before if json.loads(line).get("step", 0) <= step]
    write_whole(path, "\n".join([*(kept or [json.dumps(first)]), ""]))


def add_to_log(path: Path, line: dict[str, Any]) -> None:
    """One more line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def speed(tokens: int, seconds: float, flops_per_token: float, processes: int = 1) -> dict[str, float]:
    """Tokens per second, and which part of what the device can do their products are (forward and backward)."""
    rate = tokens / seconds
    found = {"tokens_per_second": round(rate, 1)}
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)
    if peak:
        found["model_flops_utilisation"] = round(3 * flops_per_token * rate / (1e12 * peak * processes), 4)
    return found
