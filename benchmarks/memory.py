"""How much memory a model takes at the most, each in a process of its own.

    python -m finedeep.benchmarks.memory CONTENDER CASE-AS-JSON DEVICE

prints bytes: on a GPU what torch has allocated at the most, on a CPU how far the resident set has risen above what it
was before the model was made, with glibc told to hand back what is freed (else it is its own habits that are measured,
which move a figure by 5 %). Both hold weights, gradients, AdamW's moments and what backward has kept.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from finedeep_files.timing import wait_for

from .cases import WORKS, Case
from .models import CONTENDERS, SHAPES, build

# Attention of 1,024 tokens and a small batch, so that activations are several times the weights, as in real training.
TRAINING = Case("train", 4, 1024)
CASES = {
    "cpu": [
        *(replace(TRAINING, M=M, K=K) for M, K in ((1, 8), (2, 8), (4, 4))),
        replace(TRAINING, checkpointing=True),
        replace(TRAINING, dtype="bfloat16"),
        Case("prefill", 4, 1024),
    ],
    "cuda": [
        *(
            replace(TRAINING, tokens=2048, shape="1.2B", dtype="bfloat16", M=M, K=K)
            for M, K in ((1, 8), (2, 8), (4, 4))
        ),
        replace(TRAINING, tokens=2048, shape="1.2B", dtype="bfloat16", checkpointing=True),
        Case("prefill", 4, 2048, shape="1.2B", dtype="bfloat16"),
    ],
}
STEPS = 2  # the optimizer has its moments from the first on


def run_case(case: Case, device: str) -> dict[str, int]:
    """Bytes at the most, by contender. There is next to no spread, hence one run of each."""
    return {contender: peak_of(contender, case, device) for contender in CONTENDERS}


def peak_of(contender: str, case: Case, device: str) -> int:
    """Bytes at the most, measured in a new process."""
    return int(printed_by(__spec__.name, contender, json.dumps(case.fields()), device))


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


def measure(contender: str, case: Case, device: str) -> int:
    """Bytes at the most, in this process."""

    def do() -> None:
        work = WORKS[case.work](case, build(contender, SHAPES[case.shape], case.M, case.K, case.dtype, device), device)
        for _ in range(STEPS):
            work.do(work.prepare())

    return peak_during(do, device)


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


if __name__ == "__main__":
    contender, case, device = sys.argv[1:]
    print(measure(contender, Case(**json.loads(case)), device))
