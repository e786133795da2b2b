"""What a user waits for before the first token: import, `from_pretrained`, conversion beside a copy."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from ..convert import convert_checkpoint
from .models import SHAPES, build
from .timing import Work, interleaved

IMPORTS = {
    "dense": "import torch; from transformers import AutoModelForCausalLM, LlamaForCausalLM",
    "finedeep": "import torch; from transformers import AutoModelForCausalLM; import finedeep",
}
LOADED = {"cpu": "325M", "cuda": "1.2B"}


def imports(seconds: float) -> dict[str, list[float]]:
    """Seconds from starting Python to having the classes, each time in a new process."""

    def work(code: str) -> Work:
        return Work(lambda: None, lambda _: subprocess.run([sys.executable, "-c", code], check=True))

    return interleaved({name: work(code) for name, code in IMPORTS.items()}, seconds, "cpu")


def loading(scratch: Path, shape: str, seconds: float, device: str) -> dict[str, list[float]]:
    """Seconds of `from_pretrained` from files that the operating system has in its cache.

    `remote code` is the folder with `trust_remote_code=True`, its code copied and imported by transformers.
    """
    folders = {"dense": {}, "finedeep": {}}
    for contender in folders:
        build(contender, SHAPES[shape], 2, 8, "bfloat16", "cpu").save_pretrained(scratch / contender)

    def work(folder: Path, **options: bool) -> Work:
        return Work(
            lambda: None,
            lambda _: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).to(device),
        )

    works = {name: work(scratch / name) for name in folders}
    works["remote code"] = work(scratch / "finedeep", trust_remote_code=True)
    return interleaved(works, seconds, device)


def conversion(scratch: Path, shape: str, seconds: float) -> dict[str, list[float]]:
    """Seconds of converting a checkpoint, and of copying it, both down to the disk."""
    source, out = scratch / "source", scratch / "out"
    build("dense", SHAPES[shape], 1, 1, "bfloat16", "cpu").save_pretrained(source)

    def fresh() -> None:
        shutil.rmtree(out, ignore_errors=True)
        os.sync()

    def copy(_: None) -> None:
        shutil.copytree(source, out)
        for file in out.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())

    def convert(_: None) -> None:
        convert_checkpoint(source, out, num_expert_sublayers=2, num_experts_per_sublayer=8, progress=False)

    return interleaved({"copy": Work(fresh, copy), "finedeep": Work(fresh, convert)}, seconds, "cpu")
