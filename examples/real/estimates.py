r"""What calibrating and healing a larger model takes on one H100: the table of docs/heal.md, from measured speeds.

    python examples/real/estimates.py

Operations and memory are those of the project's own plans, which are made of headers alone. Speeds are dense Llama's in
benchmarks/results/speed-cuda.json, and for products in float32 and float64 half of what NVIDIA states.
"""

import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import from_checkout  # noqa: F401
import torch
from finedeep.benchmarks.documents import put_table
from finedeep.convert.calibrate.run import Calibration
from finedeep.convert.conversion import plan_conversion
from finedeep.eval.compare.table import aligned_markdown
from finedeep_files.progress import in_words
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
SPEEDS = ROOT / "benchmarks/results/speed-cuda.json"
EXACT_SPEED = 67e12 / 2  # FLOP/s: half of FP64 Tensor Core's, https://www.nvidia.com/en-us/data-center/h100/
MODELS = {
    "Llama 3.2 1B": {
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
    },
    "Llama 3.1 8B": {
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
    },
}
HEALING_TOKENS = 20_000_000
RANK = 64
HEAD = ["model", "step", "tokens", "operations", "time", "memory", "disk"]


def speed(work: str, batch: int, tokens: int) -> float:
    """FLOP/s of dense Llama in a kind of work, at its median."""
    measured = json.loads(SPEEDS.read_text(encoding="utf-8"))
    for row in measured["rows"]:
        case = row["case"]
        if row["group"] == "model" and (case["work"], case["batch"], case["tokens"]) == (work, batch, tokens):
            rate = batch * tokens / statistics.median(row["seconds"]["dense"])
            return rate * (6 if work == "train" else 2) * measured["parameters"][case["shape"]]["dense"]
    raise SystemExit(f"{SPEEDS} has no {work} {batch}x{tokens}.")


def headers_of(sizes: dict[str, Any], folder: Path) -> Path:
    """A checkpoint in bfloat16 that is all header: its weights are a hole in the file."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, dtype="bfloat16"))
    model.config.save_pretrained(folder)
    header, end = {}, 0
    for name, tensor in model.named_parameters():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def rows() -> Iterator[list[str]]:
    """For each model: cut, sampled and calibrated; healed in whole, and by an adapter."""
    slowest = min(speed("train", 4, 2048), speed("prefill", 8, 512))
    for name, sizes in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            plan = plan_conversion(headers_of(sizes, Path(folder)), num_expert_sublayers=2, calibrate="self")
            operations = Calibration(plan, Path(folder), progress=False).operations()
        parameters, tokens = plan.dense_parameters, plan.options.calibration_tokens
        written = plan.nbytes  # twice while it is calibrated: layers are kept until all are there
        yield row(name, "`convert --calibrate self`", tokens, operations, EXACT_SPEED, plan.memory, 2 * written)
        adapter = RANK * sum(
            sum(entry.shape) for shard in plan.shards for entry in shard.entries if "_proj" in entry.name
        )
        teacher = 2 * parameters
        # What a training keeps on the disk, of each parameter it and AdamW's two numbers, and that for a moment twice.
        for step, factor, memory, trained in (
            ("`heal`", 8, 16 * parameters + teacher, parameters),
            (f"`heal --adapter-rank {RANK}`", 6, 4 * parameters + 16 * adapter + teacher, adapter),
        ):
            work = factor * parameters * HEALING_TOKENS
            yield row(name, step, HEALING_TOKENS, work, slowest, memory, written + 24 * trained)


def row(name: str, step: str, tokens: int, operations: float, flops: float, memory: int, disk: int) -> list[str]:
    """A line of the table."""
    exponent = int(math.log10(operations))
    said = f"{operations / 10**exponent:.1f}e{exponent}"
    return [
        name,
        step,
        f"{tokens:,}",
        said,
        in_words(operations / flops),
        f"{memory / 1e9:.0f} GB",
        f"{disk / 1e9:.0f} GB",
    ]


def table() -> str:
    """As it stands in the document."""
    return aligned_markdown(HEAD, [*rows()], 2)


if __name__ == "__main__":
    put_table("larger-estimates", table())
