"""The cases that say most, for eight minutes of a GPU or of two CPU cores.

    python examples/from_checkout.py finedeep.benchmarks --device cuda --quick --deadline 480 --output OUT

On a GPU models have the sizes of Llama 3.2 1B, on a CPU 28 million parameters. Dense and every M and K take turns in
one run. Cases stand in the order of what they say; those that the deadline leaves no time for are named and left out.
Needs torch, transformers and, on a GPU, Triton, and nothing else.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from finedeep_files.timing import let_go

from .cases import Case, take_turns
from .memory import measure, peak_of
from .models import SHAPES, build

GPU = Case("prefill", 1, 2048, shape="1.2B", dtype="bfloat16")
ALL = ((1, 8), (2, 8), (4, 4))
PAPERS = ((2, 8),)
TRAIN = replace(GPU, work="train", batch=4)
GRAPH = replace(GPU, work="decode", tokens=1, compiled=True, cache="static")
# What is timed, with which cuts M and K beside dense; compiled models take half a minute each to compile.
CPU = Case("prefill", 1, 1024, shape="28M")
QUICK: dict[str, tuple[tuple[Case, tuple[tuple[int, int], ...]], ...]] = {
    "cuda": (
        (GPU, ALL),
        (replace(GPU, batch=8, tokens=512), ALL),
        (TRAIN, ALL),
        (GRAPH, PAPERS),
        (replace(GPU, compiled=True), PAPERS),
        (replace(GRAPH, batch=64), PAPERS),
        (replace(GPU, work="decode", tokens=1), PAPERS),
        (replace(TRAIN, compiled=True), PAPERS),
    ),
    "cpu": (
        (CPU, ALL),
        (replace(CPU, work="decode", tokens=1), ALL),
        (replace(CPU, work="train", tokens=256), ALL),
    ),
}
MEMORY = {"cuda": TRAIN, "cpu": replace(CPU, work="train", batch=4)}
SHAPE = {"cuda": GPU.shape, "cpu": CPU.shape}


def rows(seconds: float, deadline: float, device: str) -> Iterator[dict[str, Any]]:
    """A row of results for each case and cut, as soon as it is measured, until `deadline` (of time.monotonic)."""
    for M, K in ALL:
        case = replace(MEMORY[device], M=M, K=K)
        yield {"group": "memory", "case": case.fields(), "bytes": peaks(case, device)}
    for case, cuts in QUICK[device]:
        if time.monotonic() > deadline:
            print(f"left out for want of time: {case.work} {case.batch}x{case.tokens} compiled={case.compiled}")
            continue
        taken = turns(case, cuts, seconds, device)
        for M, K in cuts:
            times = {"dense": taken["dense"], "finedeep": taken[f"{M}x{K}"]}
            yield {"group": "model", "case": replace(case, M=M, K=K).fields(), "seconds": times}


def turns(case: Case, cuts: tuple[tuple[int, int], ...], seconds: float, device: str) -> dict[str, list[float]]:
    """Seconds of one pass, one new token or one step, of dense and of each cut, in turn."""
    models = {"dense": build("dense", SHAPES[case.shape], 1, 1, case.dtype, device)}
    models |= {f"{M}x{K}": build("finedeep", SHAPES[case.shape], M, K, case.dtype, device) for M, K in cuts}
    return take_turns(case, models, seconds, device)


def peaks(case: Case, device: str) -> dict[str, int]:
    """Bytes at the most, of dense and Finedeep, one after the other; on a CPU in processes of their own."""
    if device == "cpu":
        return {contender: peak_of(contender, case, device) for contender in ("dense", "finedeep")}
    found = {}
    for contender in ("dense", "finedeep"):
        torch.cuda.reset_peak_memory_stats()
        found[contender] = measure(contender, case, device)
        let_go(device)
    return found
