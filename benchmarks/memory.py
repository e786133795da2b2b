"""How much memory a model takes at the most, each in a process of its own.

    python -m finedeep.benchmarks.memory CONTENDER CASE-AS-JSON DEVICE

prints bytes: on a GPU what torch has allocated at the most, on a CPU how far the resident set has risen above what it
was before the model was made, with glibc told to hand back what is freed (else it is its own habits that are measured,
which move a figure by 5 %). Both hold weights, gradients, AdamW's moments and what backward has kept.
"""

import json
import sys
from dataclasses import replace

from finedeep_files.peak_memory import peak_during, printed_by

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


def measure(contender: str, case: Case, device: str) -> int:
    """Bytes at the most, in this process."""

    def do() -> None:
        work = WORKS[case.work](case, build(contender, SHAPES[case.shape], case.M, case.K, case.dtype, device), device)
        for _ in range(STEPS):
            work.do(work.prepare())

    return peak_during(do, device)


if __name__ == "__main__":
    contender, case, device = sys.argv[1:]
    print(measure(contender, Case(**json.loads(case)), device))
