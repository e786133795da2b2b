r"""A real model, dense beside Finedeep: fetch SmolLM2-135M-Instruct, convert it, measure, write the tables.

    make real TEXTS="wikitext=wiki.txt books=books.txt" QUESTIONS=questions/
    python examples/real/run.py CACHE --text wikitext=wiki.txt --text books=books.txt --questions questions/

What is done already in CACHE is not done again; a calibration that was stopped continues. The texts should be ones that
no model here has learnt from: calibration samples its own from the dense model. `--questions` is a folder of *.jsonl as
`finedeep eval --local` reads them. Results go to examples/results/real.json, receipts of the models made beside it, and
the tables from both into docs/real.md. Weights stay in CACHE.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import from_checkout  # noqa: F401
import torch
import transformers
from drawing import draw
from figures import (
    WINDOW,
    answers,
    beside,
    finedeep,
    hidden_states,
    load,
    losses_by_precision,
    read,
    text_windows,
    weights,
)
from finedeep import __version__
from finedeep.convert.heal.run import HEALING
from finedeep.convert.receipt import RECEIPT
from finedeep_files.hashing import sha256
from finedeep_files.whole_file import write_whole
from safetensors.torch import load_file, save_file
from smollm2 import WEIGHTS, dense_folder
from tables import write_page

EXAMPLES = Path(__file__).parents[1]
RESULTS = EXAMPLES / "results"
# A model's name, and how `finedeep convert` makes it.
MODELS = {
    "M=1 K=8": ["--sublayers", "1"],
    "grow M=2 K=8": ["--sublayers", "2", "--mode", "grow"],
    "M=2 K=8, cut": ["--sublayers", "2"],
    "M=2 K=8, calibrated": ["--sublayers", "2", "--calibrate", "self"],
    "M=4 K=4, cut": ["--sublayers", "4", "--experts", "4"],
}
# A model that `finedeep heal` makes: of which, and how. The teacher's text is sampled, and no text of the measurements.
HEALING_OPTIONS = "--tokens 163840 --batch-size 4 --steps 40 --learning-rate 2e-4"
HELD_OUT = "--set eval_strategy=steps --set eval_steps=20"  # for the curve
HEALED = {"M=2 K=8, healed": ("M=2 K=8, calibrated", f"{HEALING_OPTIONS} {HELD_OUT}".split())}
DEFAULT = tuple(MODELS)[:4]
FEW = 4  # windows, where a loss in half precision or less is measured


def main() -> None:
    """Do what is not done yet, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("cache", type=Path, help="a folder for the download, the models and what is done already")
    option("--text", type=named, action="append", default=[], metavar="NAME=FILE", help="to measure the loss on")
    option("--windows", type=int, default=16, metavar="N", help=f"of {WINDOW} tokens of each text (default: 16)")
    option("--models", nargs="+", default=DEFAULT, choices=[*MODELS, *HEALED], help="default: all but M=4 and healed")
    option("--questions", type=Path, metavar="DIR", help="benchmark questions, *.jsonl")
    option("--limit", type=int, metavar="N", help="only the first N questions of each benchmark")
    option("--convert", default="", metavar="ARGUMENTS", help="more arguments of the calibrating `finedeep convert`")
    option("--results", type=Path, default=RESULTS, help="where to write real.json and the receipts")
    option("--page", type=Path, default=EXAMPLES.parent / "docs/real.md", help="the page with the tables")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    run = Run(arguments)
    for name in arguments.models:
        for step in STEPS:
            run.do(name, step)
    write_page(read(run.path), arguments.page)
    draw(read(run.path), arguments.page.parent / "figures")


def named(argument: str) -> tuple[str, Path]:
    """NAME=FILE, as an option's value."""
    name, equals, file = argument.partition("=")
    if not equals or not Path(file).is_file():
        raise argparse.ArgumentTypeError(f"{argument!r}: expected NAME=FILE with a file that exists")
    return name, Path(file)


@dataclass
class Run:
    """One run of the command: where things are, and what is known already."""

    arguments: argparse.Namespace

    @cached_property
    def dense(self) -> Path:
        """The dense model's folder."""
        return dense_folder(self.arguments.cache)

    @property
    def path(self) -> Path:
        """The results."""
        return self.arguments.results / "real.json"

    @cached_property
    def windows(self) -> dict[str, torch.Tensor]:
        """Token ids of each text."""
        return text_windows(self.dense, dict(self.arguments.text), self.arguments.windows)

    @cached_property
    def dense_states(self) -> dict[str, torch.Tensor]:
        """The dense model's hidden states on the texts: computed once, kept in the cache with the windows' own ids."""
        path = self.arguments.cache / "dense-states.safetensors"
        kept = load_file(path) if path.exists() else {}
        if not all(torch.equal(kept.get(f"{name}.ids", torch.empty(0)), ids) for name, ids in self.windows.items()):
            kept = hidden_states(load(self.dense), self.windows)
            save_file(kept | {f"{name}.ids": ids for name, ids in self.windows.items()}, path)
        return {name: kept[name] for name in self.windows}

    def folder(self, name: str) -> Path:
        """Where a model is made."""
        return self.arguments.cache / "".join(c for c in name.replace(" ", "-") if c not in "=,").lower()

    def do(self, name: str, step: str) -> None:
        """Do a step for a model, unless its result is known, and write that down."""
        if step in read(self.path).get("models", {}).get(name, {}):
            return
        print(f"{name}: {step} ...", flush=True)
        found = STEPS[step](self, name)
        if found is None:
            return
        results = read(self.path)  # to which another run may have added something meanwhile
        known = results.setdefault("models", {}).setdefault(name, {})
        known[step] = found
        results["weights"] = WEIGHTS
        results.setdefault("texts", {}).update({name: sha256(file) for name, file in self.arguments.text})
        known.setdefault("made_with", {})[step] = machine()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def machine() -> dict[str, Any]:
    """On what a figure was measured."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=EXAMPLES, capture_output=True, text=True).stdout.strip()
    return {
        "commit": commit or None,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),  # above the number of cores, seconds are not the program's own
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "versions": {"finedeep": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def convert(run: Run, name: str) -> dict[str, Any]:
    """Make the model. Keeps its receipts beside the results."""
    folder, taken = run.folder(name), {}
    if name in HEALED:
        origin, options = HEALED[name]
        command, receipts = ["heal", run.folder(origin), folder, "--teacher", run.dense], [RECEIPT, HEALING]
    else:
        options = MODELS[name] + run.arguments.convert.split() * ("--calibrate" in MODELS[name])
        command, receipts = ["convert", run.dense, folder], [RECEIPT]
    if not (folder / RECEIPT).exists():
        unfinished = folder.with_name(f".{folder.name}.unfinished").exists()
        again = ["--resume"] if unfinished else []
        taken = finedeep([*command, *options, *again], folder.with_suffix(".log"))
    run.arguments.results.mkdir(parents=True, exist_ok=True)
    for receipt in receipts:
        kind = "receipt" if receipt == RECEIPT else "healing"
        shutil.copy(folder / receipt, run.arguments.results / f"{kind}-{folder.name}.json")
    return {"options": options, **taken, **weights(folder)}


def losses(run: Run, name: str) -> dict[str, Any] | None:
    """Losses and logits beside dense."""
    if not run.windows:
        return None
    model = load(run.folder(name))
    heads = load(run.dense).lm_head, model.lm_head
    return beside(heads, run.windows, run.dense_states, hidden_states(model, run.windows))


def texts(run: Run, name: str) -> list[dict[str, str]]:
    """Greedy answers beside dense."""
    path = run.arguments.cache / "dense-answers.json"
    if not path.exists():
        path.write_text(json.dumps(answers(load(run.dense), run.dense)), encoding="utf-8")
    both = zip(read(path), answers(load(run.folder(name)), run.folder(name)), strict=True)
    return [{"dense": before, "finedeep": after} for before, after in both]


def benchmarks(run: Run, name: str) -> dict[str, Any] | None:
    """Scores beside dense, with the intervals of the differences."""
    if run.arguments.questions is None:
        return None
    folder = run.folder(name)
    out = folder.with_name(f"{folder.name}-eval")
    if not out.exists():
        again = ["--resume"] if out.with_name(f".{out.name}.unfinished").exists() else []
        limit = ["--limit", run.arguments.limit] if run.arguments.limit else []
        kept = ["--local", run.arguments.questions, "--answers", run.arguments.cache / "answers", "--output", out]
        finedeep(
            ["eval", folder, "--baseline", run.dense, *kept, *limit, *again, "--batch-size", 8, "--quiet"],
            out.with_suffix(".log"),
        )
    return {"limit": run.arguments.limit, "rows": read(out / "comparison.json")["tasks"]}


def activations(run: Run, name: str) -> dict[str, Any] | None:
    """The share of activations that are not near 0 (NSAR), beside dense, by layer and with the histogram."""
    if not run.arguments.text:
        return None
    text_name, text = run.arguments.text[0]
    folder = run.folder(name)
    out = folder.with_name(f"{folder.name}-inspect")
    if not out.exists():
        tokens = run.arguments.windows * WINDOW
        finedeep(
            ["inspect", folder, "--baseline", run.dense, "--text", text, "--tokens", tokens, "--output", out],
            out.with_suffix(".log"),
        )
    kept = ("loss", "nsar", "histogram", "edges", "layers", "predicted_tokens")
    return {"text": text_name} | {
        which: {key: found[key] for key in kept} for which, found in read(out / "inspection.json").items()
    }


def precisions(run: Run, name: str) -> dict[str, Any] | None:
    """Losses in bfloat16 and with int8 weights beside dense's, on the first windows of the first text."""
    if not run.windows:
        return None
    text, windows = next(iter(run.windows.items()))
    windows, path = windows[:FEW], run.arguments.cache / "dense-precisions.json"
    key = f"{sha256(dict(run.arguments.text)[text])} {windows.numel()}"
    kept = read(path)
    if key not in kept:
        write_whole(path, json.dumps(kept | {key: losses_by_precision(run.dense, windows)}))
    found = {"dense": read(path)[key], "finedeep": losses_by_precision(run.folder(name), windows)}
    return {"text": text, "tokens": windows.numel(), **found}


def healing(run: Run, name: str) -> list[dict[str, float]] | None:
    """What healing logged on its way."""
    path = run.folder(name) / HEALING
    return read(path)["log"] if path.exists() else None


STEPS: dict[str, Callable[[Run, str], Any]] = {
    "convert": convert,
    "healing": healing,
    "losses": losses,
    "texts": texts,
    "activations": activations,
    "precisions": precisions,
    "benchmarks": benchmarks,
}

if __name__ == "__main__":
    main()
