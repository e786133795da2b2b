"""What a process has of a model that cannot import this project: the folder, its own code, and transformers."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from finedeep_files.errors import ConversionError
from safetensors.torch import load_file

# Importing this project raises ImportError here.
SCRIPT = """
import sys
sys.modules["finedeep"] = None
import logging, os
logging.disable(logging.WARNING)
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
torch.manual_seed(0)
name, revision, path = sys.argv[1], sys.argv[2] or None, sys.argv[3]
model = AutoModelForCausalLM.from_pretrained(name, revision=revision, trust_remote_code=True, dtype="auto").eval()
ids = torch.randint(model.config.vocab_size, (1, 48), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    logits = model(ids).logits.contiguous()
assert torch.isfinite(logits).all(), "its logits are not finite"
save_file({"logits": logits}, path)
"""
LOGITS = "logits.safetensors"


def standalone_logits(
    name: str, revision: str | None = None, environment: Mapping[str, str] = {}, called: str | None = None
) -> torch.Tensor:
    """Logits (1, 48, vocabulary), in the model's dtype, on tokens drawn by a fixed seed.

    Args:
        name: an absolute path, or a Hub id.
        revision: of a Hub id.
        environment: variables that the process has beside this one's.
        called: what an error calls the model, by default its name.

    Raises:
        ConversionError: the model does not load there, or its logits are not finite.
    """
    with tempfile.TemporaryDirectory(prefix="finedeep-standalone-") as elsewhere:
        path = Path(elsewhere) / LOGITS
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, name, revision or "", path],
            capture_output=True,
            text=True,
            cwd=elsewhere,
            env={**os.environ, "HF_MODULES_CACHE": f"{elsewhere}/modules", **environment},
            check=False,
        )
        if done.returncode == 0 and path.is_file():
            return load_file(path)["logits"]
    reason = done.stderr.strip().splitlines()[-1:] or [f"it ended with status {done.returncode} and no message"]
    raise ConversionError(f"{called or name} does not load on its own: {reason[0]}. Nobody else could use it.")
