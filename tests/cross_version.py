"""Folders that one version of transformers writes and another loads: `python tests/cross_version.py write|read FOLDER`.

`write` saves models of several kinds under FOLDER with the logits that they give; `read` loads whatever it finds there
by trust_remote_code, compares logits, saves again, reloads and compares again. tests/matrix.py runs it in every
version.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
import transformers
from safetensors.torch import load_file, save_file

SHAPE = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS = {
    "rope theta 5000": {"rope_theta": 5000.0},
    "llama3 scaling": {"rope_theta": 5000.0, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}},
    "tied embeddings": {"tie_word_embeddings": True},
    "biases, sandwich norm": {"attention_bias": True, "mlp_bias": True, "sublayer_output_norm": True},
    "ablations": {"routing_input": "hidden_state", "routing_function": "softmax"},
    "norms of queries and keys, a window": {
        "qk_norm": True,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "multipliers, a layer without RoPE": {
        "no_rope_layers": [1, 0],
        "attention_multiplier": 0.1,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "biases as in Qwen2": {"attention_bias": True, "attention_output_bias": False},
    "bfloat16": {"dtype": "bfloat16"},
}
IDS = torch.arange(2 * 60).reshape(2, 60)


def write(root: Path) -> None:
    """Save a model of each kind, sharded, with its logits beside it."""
    from finedeep import FinedeepConfig, FinedeepForCausalLM

    for kind, changes in KINDS.items():
        torch.manual_seed(0)
        fields = SHAPE | changes
        dtype = fields.pop("dtype", "float32")
        model = FinedeepForCausalLM(FinedeepConfig(**fields)).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
            parameter.data = parameter.data.to(getattr(torch, dtype))  # not the buffers: RoPE stays in float32
        folder = root / transformers.__version__ / kind
        model.config.dtype = getattr(torch, dtype)
        model.save_pretrained(folder, max_shard_size="40KB")
        save_file({"logits": model(IDS).logits.detach().contiguous()}, folder / "expected.logits")


def difference(folder: Path, expected: torch.Tensor, again: Path | None) -> float:
    """Largest difference to the expected logits, of the folder as it is or, first saved to `again`, as reloaded."""
    if again is not None:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
        loaded.save_pretrained(again)
        folder = again
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    assert str(model.dtype) == str(expected.dtype), (model.dtype, expected.dtype)
    return (model(IDS).logits - expected).abs().max().item()


def read(root: Path) -> dict[str, float]:
    """{version that wrote: largest difference over all kinds}."""
    found = {}
    for expected in sorted(root.glob("*/*/expected.logits")):
        folder = expected.parent
        logits = load_file(expected)["logits"]
        with tempfile.TemporaryDirectory() as scratch:
            worst = max(difference(folder, logits, None), difference(folder, logits, Path(scratch) / "again"))
        found[folder.parent.name] = max(worst, found.get(folder.parent.name, 0.0))
    return found


if __name__ == "__main__":
    verb, place = sys.argv[1:]
    with torch.no_grad():
        print(json.dumps(write(Path(place)) if verb == "write" else read(Path(place))))
