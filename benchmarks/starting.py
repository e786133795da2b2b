"""What a user waits for before the first token: import, `from_pretrained`, conversion beside a copy."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from finedeep_files.timing import Work, interleaved

from ..convert import convert_checkpoint
from .models import SHAPES, build

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


# `finedeep` has its classes registered by the package; `remote code` is the same folder in a process without it, where
# transformers copies and imports the code that lies there.
LOAD = """
import sys, time, torch
from transformers import AutoModelForCausalLM
{registered}
folder, device = sys.argv[1:]
begin = time.perf_counter()
AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, {options}).to(device)
print(time.perf_counter() - begin)
"""
LOADS = {
    "dense": ("dense", LOAD.format(registered="from transformers import LlamaForCausalLM", options="")),
    "finedeep": ("finedeep", LOAD.format(registered="import finedeep", options="")),
    "remote code": ("finedeep", LOAD.format(registered="", options="trust_remote_code=True")),
}


def loading(scratch: Path, shape: str, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of `from_pretrained`, each in a new process, from files that the operating system has in its cache."""
    for contender in ("dense", "finedeep"):
        build(contender, SHAPES[shape], 2, 8, "bfloat16", "cpu").save_pretrained(scratch / contender)
    taken: dict[str, list[float]] = {name: [] for name in LOADS}
    for i in range(rounds + 1):
        for name, (folder, code) in LOADS.items():
            command = [sys.executable, "-c", code, scratch / folder, device]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            if i:  # the first round is for the operating system's cache
                taken[name].append(float(printed))
    return taken


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
