"""How much of what a cut loses calibration and healing bring back, on held-out text.

    python -m finedeep.benchmarks.gap CHECKPOINT TEXT --name stories260k

cuts TEXT in two, calibrates on the first half (or on text sampled from CHECKPOINT), measures on the second, and adds a
line for each stage to benchmarks/results/gap.jsonl; of what has learnt from sampled text, which has seen neither half,
with the losses on the first half beside them. --render makes the tables of docs/heal.md and docs/figures/gap.svg from
all lines.

Each stage is a command of its own, in a process of its own; its seconds are those of the whole command. The loss is the
mean next-token loss in nats; the share of the gap is (cut - stage) / (cut - dense).
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
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..configuration_finedeep import __version__
from ..convert.heal.run import HEALING
from .documents import put_table
from .gap_curve import draw, left_of
from .results import markdown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gap.jsonl"
CURVE, CURVE_OF = ROOT / "docs" / "figures" / "gap.svg", ("stories260k", "2x8")
MOST_TOKENS = 100_000  # to measure on
TEXTS = {"self": "sampled", "text": "real"}
MATTER_OF_COURSE = ("--standalone", "--sublayers", "--experts", "--calibrate", "--teacher", "--data", "--seed")


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
    option("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
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
        put_table("gap", table_of(lines))
        draw([line for line in lines if (line["model"], line["shape"]) == CURVE_OF], CURVE)
        put_table("gap-summary", summary_of(lines))


# What each stage is called in the table, from which stage's folder it starts, and its command.
STAGES: dict[str, tuple[str | None, list[str]]] = {
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
    """A line for each stage of each shape, source and seed."""
    content = arguments.text.read_text(encoding="utf-8")
    half = 0 if arguments.learn_from else len(content) // 2
    learnt = arguments.learn_from or scratch / "text.txt"
    if half:
        learnt.write_text(content[:half], encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    texts = [content[half:], *([content[:half]] if half else [])]
    windows = [windows_of(tokenizer(text, verbose=False)["input_ids"], arguments.window) for text in texts]
    dense = losses_of(arguments.checkpoint, windows)
    for shape in arguments.shapes:
        M, K = shape.split("x")
        cut = scratch / f"cut-{shape}"
        run(["convert", arguments.checkpoint, cut, "--sublayers", M, "--experts", K])
        losses = dense, losses_of(cut, windows)
        for source in arguments.sources:
            for seed in arguments.seeds:
                yield from climb(arguments, scratch, shape, source, seed, learnt, windows, losses)


def climb(
    arguments: argparse.Namespace,
    scratch: Path,
    shape: str,
    source: str,
    seed: int,
    learnt: Path,
    windows: list[torch.Tensor],
    losses: tuple[list[float], list[float]],
) -> Iterator[dict[str, Any]]:
    """The stages, one by one. `losses`: the dense model's and the cut's, on each text of `windows`."""
    M, K = shape.split("x")
    seconds: dict[str | None, float] = {None: 0.0}
    for stage in arguments.stages:
        start, parts = STAGES[stage]
        place = {
            "dense": str(arguments.checkpoint),
            "data": "self" if source == "self" else str(learnt),
            "out": str(scratch / f"{shape}-{source}-{seed}-{stage}".replace(" ", "-")),
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
        seconds[stage] = time.perf_counter() - begin + seconds[start]
        names = {value: name.upper() for name, value in place.items()}
        found = zip(losses_of(Path(place["out"]), windows), *losses, windows, strict=True)
        receipt = Path(place["out"]) / HEALING
        seen = json.loads(receipt.read_text(encoding="utf-8"))["tokens_seen"] if receipt.exists() else None
        told = [{"loss": x, "dense": dense, "cut": cut, "tokens": some.numel()} for x, dense, cut, some in found]
        yield {
            "model": arguments.name,
            "shape": shape,
            "source": source,
            "seed": seed,
            "stage": stage,
            "seconds": round(seconds[stage], 1),
            **told[0],
            **({"tokens_learnt": seen} if seen else {}),
            **({"other_text": told[1]} if source == "self" and told[1:] else {}),
            "command": " ".join(["finedeep", *(names.get(word, word) for word in command)]),
            "threads": torch.get_num_threads(),
            "processor": platform.machine(),
            "versions": {"finedeep": __version__, "torch": torch.__version__},
        }


def run(command: list[Any]) -> None:
    """A `finedeep` command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-m", "finedeep_cli", *map(str, command), "--quiet"], check=True, env=environment)


def windows_of(ids: list[int], window: int) -> torch.Tensor:
    """(number, window) of the first tokens."""
    return torch.tensor(ids[: min(MOST_TOKENS, len(ids)) // window * window]).view(-1, window)


@torch.no_grad()
def losses_of(folder: Path, texts: list[torch.Tensor]) -> list[float]:
    """Mean next-token loss over each text's windows (number, window), in nats."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for windows in texts:
        losses = [model(input_ids=x, labels=x, use_cache=False).loss.item() * len(x) for x in windows.split(16)]
        found.append(sum(losses) / len(windows))
    return found


def options_of(command: str) -> str:
    """What of a line's command is no matter of course: the options that decide how much is learnt."""
    words = command.split()
    kept = [(name, value) for name, value in pairwise(words) if name.startswith("--") and name not in MATTER_OF_COURSE]
    return " ".join(f"`{name} {value}`" for name, value in kept)


def groups_of(lines: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Lines that differ in their seeds only, and what they have in common; the quickest first."""
    names = ("model", "shape", "source", "stage", "threads")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        groups[(*(line[name] for name in names), options_of(line["command"]))].append(line)
    means = []
    for key, found in groups.items():
        mean = {value: statistics.mean(line[value] for line in found) for value in ("loss", "dense", "cut")}
        mean["seconds"] = statistics.median(line["seconds"] for line in found)
        common = dict(zip((*names, "options"), key, strict=True))
        means.append((common | mean, found))
    yield from sorted(means, key=lambda item: (*(item[0][name] for name in ("model", "shape")), item[0]["seconds"]))


def seeds_of(lines: list[dict[str, Any]]) -> int:
    """How many seeds there are: what was measured again, as a step to another stage, is counted once."""
    return len({line["seed"] for line in lines})


def table_of(lines: list[dict[str, Any]]) -> str:
    """Everything that was measured: means over seeds, with the lowest and the highest share, and median seconds."""
    head = ["model", "M x K", "text", "stage", "options", "loss", "over dense", "of the gap closed"]
    head += ["on another text", "seconds", "cores", "seeds"]
    rows, seen = [], set()
    for mean, found in groups_of(lines):
        place = (mean["model"], mean["shape"])
        if place not in seen:
            seen.add(place)
            for name, gap in (("dense", ""), ("cut", "0 %")):
                over = f"{mean[name] - mean['dense']:+.4f}"
                rows.append([*place, "", name, "", f"{mean[name]:.4f}", over, gap, "", "", "", ""])
        rows.append(
            [
                *place,
                TEXTS[mean["source"]],
                mean["stage"],
                mean["options"],
                f"{mean['loss']:.4f}",
                f"{mean['loss'] - mean['dense']:+.4f}",
                closed(found),
                closed([line["other_text"] for line in found if "other_text" in line]),
                f"{mean['seconds']:.0f}",
                str(mean["threads"]),
                str(seeds_of(found)),
            ]
        )
    return markdown(head, rows, 5)


def closed(measured: list[dict[str, Any]]) -> str:
    """The share of the gap that is closed: its mean, with the lowest and the highest; nothing of nothing."""
    shares = [1 - left_of(x) for x in measured]
    return f"{statistics.mean(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})" if shares else ""


def summary_of(lines: list[dict[str, Any]]) -> str:
    """For the README: of each model and shape the dense loss, the cut's, and each stage's on sampled text.

    Of a stage that was measured with several options, those with the most seeds, and of these with the lowest loss.
    """
    head = [
        "model",
        "M x K",
        "dense",
        "cut",
        *(stage for stage in STAGES if stage in {line["stage"] for line in lines}),
    ]
    rows: dict[tuple[str, str], dict[str, str]] = {}
    groups = groups_of([line for line in lines if line["source"] == "self"])
    for mean, found in sorted(groups, key=lambda group: (seeds_of(group[1]), -group[0]["loss"])):
        row = rows.setdefault((mean["model"], mean["shape"]), {})
        row |= {name: f"{mean[name]:.3f}" for name in ("dense", "cut")}
        share = statistics.mean(1 - left_of(line) for line in found)
        row[mean["stage"]] = f"{mean['loss']:.3f} ({share:.0%}, {mean['seconds'] / 60:.1f} min on {mean['threads']})"
    return markdown(head, [[*key, *(row.get(name, "") for name in head[2:])] for key, row in sorted(rows.items())], 2)


if __name__ == "__main__":
    main()
