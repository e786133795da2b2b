"""How much of what a cut loses calibration and healing bring back, on held-out text.

    python -m finedeep.benchmarks.gap CHECKPOINT TEXT --name stories260k

cuts TEXT in two, calibrates on the first half (or on text sampled from CHECKPOINT), measures on the second, and adds a
line for each rung to benchmarks/results/gap.jsonl. --render makes the tables of convert/README.md from all lines.

Each rung is a command of its own, in a process of its own; its seconds are those of the whole command. The loss is the
mean next-token loss in nats; the share of the gap is (cut - rung) / (cut - dense).
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..version import __version__
from .readme import put_into_readme
from .results import markdown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gap.jsonl"
PAGE = ROOT / "convert" / "README.md"
MOST_TOKENS = 100_000  # to measure on


def main() -> None:
    """Measure, or render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("checkpoint", nargs="?", type=Path)
    option("text", nargs="?", type=Path)
    option("--name", help="the checkpoint's, in the table")
    option("--learn-from", type=Path, help="a text to calibrate on, instead of TEXT's first half")
    option("--window", type=int, default=512, help="tokens in a window to measure on (default: 512)")
    option("--shapes", nargs="+", default=["2x8", "4x4"], metavar="MxK")
    option("--sources", nargs="+", default=["self", "text"], choices=("self", "text"))
    option("--seeds", nargs="+", type=int, default=[0, 1, 2])
    option("--rungs", nargs="+", default=list(RUNGS), choices=list(RUNGS))
    option("--convert", default="", metavar="ARGUMENTS", help="more arguments of `finedeep convert`")
    option("--heal", default="", metavar="ARGUMENTS", help="more arguments of `finedeep heal`")
    option("--heal-longer", default="", metavar="ARGUMENTS", help="those of the longer one")
    option("--render", action="store_true", help="only make the page anew")
    arguments = parser.parse_args()
    if not arguments.render:
        with tempfile.TemporaryDirectory() as scratch:
            for line in measure(arguments, Path(scratch)):
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(line, flush=True)
    else:
        lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
        put_into_readme("gap", table_of(lines), PAGE)


# What each rung is called in the table, from which rung's folder it starts, and its command.
RUNGS: dict[str, tuple[str | None, list[str]]] = {
    "closed form": (
        None,
        ["convert", "{dense}", "{out}", "--calibrate", "{data}", "--calibration-steps", "0", "{convert}"],
    ),
    "layer by layer": (None, ["convert", "{dense}", "{out}", "--calibrate", "{data}", "{convert}"]),
    "healed": ("layer by layer", ["heal", "{before}", "{out}", "--teacher", "{dense}", "--data", "{data}", "{heal}"]),
    "healed longer": (
        "layer by layer",
        ["heal", "{before}", "{out}", "--teacher", "{dense}", "--data", "{data}", "{heal_longer}"],
    ),
}


def measure(arguments: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    """A line for each rung of each shape, source and seed."""
    content = arguments.text.read_text(encoding="utf-8")
    half = 0 if arguments.learn_from else len(content) // 2
    learnt = arguments.learn_from or scratch / "text.txt"
    if half:
        learnt.write_text(content[:half], encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(arguments.checkpoint)(content[half:], verbose=False)["input_ids"]
    window = arguments.window
    windows = torch.tensor(ids[: min(MOST_TOKENS, len(ids)) // window * window]).view(-1, window)
    dense = loss_of(arguments.checkpoint, windows)
    for shape in arguments.shapes:
        M, K = shape.split("x")
        cut = scratch / f"cut-{shape}"
        run(["convert", arguments.checkpoint, cut, "--sublayers", M, "--experts", K])
        for source in arguments.sources:
            for seed in arguments.seeds:
                yield from climb(arguments, scratch, shape, source, seed, learnt, windows, dense, loss_of(cut, windows))


def climb(
    arguments: argparse.Namespace,
    scratch: Path,
    shape: str,
    source: str,
    seed: int,
    learnt: Path,
    windows: torch.Tensor,
    dense: float,
    cut: float,
) -> Iterator[dict[str, Any]]:
    """The rungs, one by one."""
    M, K = shape.split("x")
    seconds: dict[str | None, float] = {None: 0.0}
    for rung in arguments.rungs:
        start, parts = RUNGS[rung]
        place = {
            "dense": str(arguments.checkpoint),
            "data": "self" if source == "self" else str(learnt),
            "out": str(scratch / f"{shape}-{source}-{seed}-{rung}".replace(" ", "-")),
            "before": str(scratch / f"{shape}-{source}-{seed}-{start}".replace(" ", "-")),
        }
        more = {
            "{convert}": ["--sublayers", M, "--experts", K, *shlex.split(arguments.convert)],
            "{heal}": shlex.split(arguments.heal),
            "{heal_longer}": shlex.split(arguments.heal_longer),
        }
        command = [
            word for part in parts for word in more.get(part, [part.format(**place)] if part not in more else [])
        ]
        command += ["--seed", str(seed)]
        begin = time.perf_counter()
        run(command)
        seconds[rung] = time.perf_counter() - begin + seconds[start]
        names = {value: name.upper() for name, value in place.items()}
        yield {
            "model": arguments.name,
            "shape": shape,
            "source": source,
            "seed": seed,
            "rung": rung,
            "seconds": round(seconds[rung], 1),
            "loss": loss_of(Path(place["out"]), windows),
            "dense": dense,
            "cut": cut,
            "tokens": windows.numel(),
            "command": " ".join(["finedeep", *(names.get(word, word) for word in command)]),
            "threads": torch.get_num_threads(),
            "processor": platform.machine(),
            "versions": {"finedeep": __version__, "torch": torch.__version__},
        }


def run(command: list[Any]) -> None:
    """A `finedeep` command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    words = [sys.executable, "-m", "finedeep_cli", *map(str, command), "--quiet"]
    subprocess.run(words, check=True, env=environment)


@torch.no_grad()
def loss_of(folder: Path, windows: torch.Tensor) -> float:
    """Mean next-token loss over windows (number, window), in nats."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = [model(input_ids=part, labels=part, use_cache=False).loss.item() * len(part) for part in windows.split(16)]
    return sum(losses) / len(windows)


def table_of(lines: list[dict[str, Any]]) -> str:
    """The table, means over seeds; in brackets the lowest and the highest share."""
    runs: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        runs[line["model"], line["shape"], line["source"], line["rung"]].append(line)
    rows = []
    for (model, shape, source, rung), found in sorted(
        runs.items(), key=lambda item: (*item[0][:3], item[1][0]["seconds"])
    ):
        shares = [(line["cut"] - line["loss"]) / (line["cut"] - line["dense"]) for line in found]
        loss, dense, cut = (statistics.mean(line[name] for line in found) for name in ("loss", "dense", "cut"))
        rows.append(
            [
                model,
                shape,
                {"self": "sampled", "text": "real"}[source],
                rung,
                f"{dense:.4f}",
                f"{cut:.4f}",
                f"{loss:.4f}",
                f"{loss - dense:+.4f}",
                f"{statistics.mean(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})",
                f"{statistics.mean(line['seconds'] for line in found):.0f}",
                str(len(found)),
            ]
        )
    head = [
        "model",
        "M x K",
        "text",
        "rung",
        "dense",
        "cut",
        "loss",
        "over dense",
        "of the gap closed",
        "seconds",
        "seeds",
    ]
    return markdown(head, rows, 4)


if __name__ == "__main__":
    main()
