"""What converting a large checkpoint takes, beside copying it: time, and memory at the most.

    python benchmarks/conversion.py SCRATCH

writes a synthetic Llama in bfloat16 of 8 GB, in several shards, under SCRATCH (which needs three times that), and then
in turn copies it and converts it, each in a process of its own, down to the disk (fsync) and from it (the source is
taken out of the page cache before). It prints the Markdown table of docs/convert.md and saves figures to
benchmarks/results/conversion.json; --update puts the table there.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from finedeep import __version__
from finedeep.benchmarks.documents import put_table
from finedeep_files.shards import Entry, ShardWriter, plan_shards, write_index
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "conversion.json"

SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
SHAPE |= {"vocab_size": 32000}
BYTES_A_LAYER = 436_224_000
COPY = """
import os, shutil, sys, time
begin = time.perf_counter()
shutil.copytree(sys.argv[1], sys.argv[2])
for name in os.listdir(sys.argv[2]):
    with open(os.path.join(sys.argv[2], name), "rb") as file:
        os.fsync(file.fileno())
status, seconds = 0, time.perf_counter() - begin
"""
CONVERT = """
import sys, time
import finedeep.convert
from finedeep_cli import main
begin = time.perf_counter()
status = main(sys.argv[1:])
seconds = time.perf_counter() - begin
"""
# The largest resident set of this program alone: getrusage would count what the process was before it.
PEAK = """
(line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(int(line.split()[1]) * 1024, seconds)
sys.exit(status)
"""
WAYS = {
    "copy": [],
    "M=1 K=8": ["--sublayers", "1"],
    "M=2 K=8": ["--sublayers", "2"],
    "M=2 K=8, random": ["--sublayers", "2", "--assignment", "random"],
}


def write_synthetic(folder: Path, layers: int) -> int:
    """Write a Llama of so many layers with random weights. Returns its bytes."""
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    shards = plan_shards([Entry(name, shape, torch.bfloat16) for name, shape in shapes.items()], 2 * 10**9)
    block = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16().flatten()
    folder.mkdir(parents=True)
    for shard in shards:
        writer = ShardWriter(folder, shard)
        for entry in shard.entries:
            values = block.repeat(-(-entry.numel // len(block)))[: entry.numel]
            writer.write(entry.name, values.view(entry.shape))
        writer.finish()
    write_index(folder, shards)
    config.save_pretrained(folder)
    return sum(shard.nbytes for shard in shards)


def run(way: str, source: Path, out: Path) -> dict[str, float]:
    """Copy or convert in a process of its own. Returns what it took.

    That is `seconds` of the work, `command` with starting Python and importing transformers, and `peak_rss`, the
    process's largest resident set in bytes.
    """
    evict(source)
    if way == "copy":
        command = [sys.executable, "-c", COPY + PEAK, source, out]
    else:
        command = [sys.executable, "-c", CONVERT + PEAK, "convert", source, out, "--quiet", *WAYS[way]]
    begin = time.perf_counter()
    printed = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True).stdout
    whole = time.perf_counter() - begin
    shutil.rmtree(out)
    peak, seconds = printed.split()
    return {"seconds": float(seconds), "command": whole, "peak_rss": int(peak)}


def evict(folder: Path) -> None:
    """Write everything to the disk and take the folder's files out of the page cache."""
    os.sync()
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Measure, save, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--gigabytes", type=float, default=8.4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--update", action="store_true", help="write the table into docs/convert.md")
    arguments = parser.parse_args()
    source = arguments.scratch / "dense"
    layers = max(1, round(arguments.gigabytes * 1e9 / BYTES_A_LAYER))
    nbytes = write_synthetic(source, layers)
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    try:
        for i in range(arguments.rounds):
            for way, done in runs.items():
                done.append(run(way, source, arguments.scratch / "out"))
                print(f"round {i + 1}: {way}: {done[-1]}", flush=True)
    finally:
        shutil.rmtree(source)
    content = {
        "command": f"python benchmarks/conversion.py SCRATCH --gigabytes {arguments.gigabytes}",
        "bytes": nbytes,
        "layers": layers,
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"finedeep": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "runs": runs,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    table = table_of(content)
    print(table)
    if arguments.update:
        put_table("conversion", table)


def table_of(content: dict) -> str:
    """The README's table, from what was saved: medians; the copy is that of the same round."""
    lines = ["| | seconds | of the copy's | with start-up | peak memory |", "| --- | ---: | ---: | ---: | ---: |"]
    for way, done in content["runs"].items():
        seconds = statistics.median(one["seconds"] for one in done)
        pairs = zip(done, content["runs"]["copy"], strict=True)
        ratios = [one["seconds"] / copy["seconds"] for one, copy in pairs]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        command = statistics.median(one["command"] for one in done)
        peak = max(one["peak_rss"] for one in done)
        lines.append(f"| {way} | {seconds:.1f} | {ratio} | {command:.1f} | {peak / 1e9:.2f} GB |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
