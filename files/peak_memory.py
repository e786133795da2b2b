"""How much memory something takes at the most, in this process or in one of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from .timing import wait_for


def printed_by(module: str, *arguments: str) -> str:
    """What a module prints last, run in a new process whose glibc hands back what is freed.

    Raises:
        RuntimeError: it failed; the last line that it wrote on stderr.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"{module} ended with {done.returncode}"])[-1])
    return done.stdout.splitlines()[-1]


def peak_during(do: Callable[[], object], device: str) -> int:
    """Bytes at the most while something is done in this process, over what there was before."""
    on_cpu = device == "cpu"
    if on_cpu:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew (proc(5))
    do()
    wait_for(device)
    return resident("VmHWM") - before if on_cpu else torch.cuda.max_memory_allocated()


def resident(which: str) -> int:
    """Bytes of the resident set, now (VmRSS) or at the most (VmHWM)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which)]
    return int(line.split()[1]) * 1024
