"""What examples/RESULTS.md says of continued training: of a dense checkpoint, and of what can be made of it.

Files of examples/gpu_grid.py with examples/continue_grid.yaml are in examples/logs/continued, of several machines too.
Models of one size that are trained on as many tokens are compared, each at the learning rate with which its mean
held-out loss is lowest; seeds are orders of the text, and differences are taken within a seed.
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from finedeep.eval.compare.table import aligned_markdown
from finedeep.eval.inspect.recorder import TAU
from recipe import slug

GRID = Path(__file__).with_name("continue_grid.yaml")
BASE = "dense"
SHARES = (0, 0.2, 0.4, 0.6, 1.0)  # of a training, after which its losses are shown
TEXTS = {"held_out": "held out", "author": "other author", "own": "its own kind"}
HEAD = ["size", "model", "parameters", "rate", "seeds", "held out: before"]
HEAD += [head for text in TEXTS.values() for head in (text, "over dense")]
HEAD += ["NSAR: before, after", "gates after: mean, spread"]


@dataclass(frozen=True)
class Continued:
    """A training, from its start (step 0)."""

    rate: float
    parameters: int
    points: list[dict[str, Any]]
    end: dict[str, Any]

    def loss(self, text: str, point: int = -1) -> float:
        """In nats per token, at the end or at another point."""
        return self.points[point][f"eval_{text}_loss"]


Models = dict[str, dict[float, dict[int, Continued]]]  # by slug, learning rate, seed


def read_continued(logs: Path) -> dict[str, Models]:
    """The finished runs in a folder of logs, by size. Exits where two files have the same one."""
    sizes: dict[str, Models] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for path in sorted(logs.glob("continued/*.jsonl")):
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if not line["finished"]:
                continue
            size, model, _ = line["name"].split("/")
            recipe, points = line["recipe"], line["log"]
            size = f"{size}, {points[-1]['tokens'] / 1e6:.3g}M tokens"
            rate, seed = recipe["training"]["learning_rate"], recipe["data"]["seed"]
            if seed in sizes[size][model][rate]:
                raise SystemExit(f"{path} has {line['name']}, as another file has.")
            end = {name: line.get(name) for name in ("nsar", "gate_mean", "gate_std")}
            sizes[size][model][rate][seed] = Continued(rate, line["parameters"], points, end)
    return sizes


def tables_of_continued(sizes: dict[str, Models]) -> dict[str, str]:
    """By mark."""
    if not sizes:
        return dict.fromkeys(("continued", "continued-curves"), "No run of `continue_grid.yaml` is in the logs yet.")
    names = {slug(name): name for name in yaml.safe_load(GRID.read_text(encoding="utf-8"))["models"]}
    best = {
        size: {model: best_of(models[model]) for model in names if model in models} for size, models in sizes.items()
    }
    return {
        "continued": aligned_markdown(HEAD, list(each(best, names, row_of)), 2),
        "continued-curves": aligned_markdown(
            ["size", "model", *(f"{share:.0%}" for share in SHARES)], list(each(best, names, curve_of)), 2
        ),
    }


def each(
    best: dict[str, dict[str, dict[int, Continued]]], names: dict[str, str], cells: Callable[..., list[str]]
) -> Iterator[list[str]]:
    """A row for each size and model, whose cells are made of its runs and the dense model's, by seed."""
    for size, models in best.items():
        for model, runs in models.items():
            yield [size, names[model], *cells(runs, models.get(BASE, {}))]


def best_of(rates: dict[float, dict[int, Continued]]) -> dict[int, Continued]:
    """By seed the runs at the learning rate with the lowest mean held-out loss, over the seeds that all rates have."""
    common = set.intersection(*(set(runs) for runs in rates.values())) or set(max(rates.values(), key=len))
    whole = {rate: runs for rate, runs in rates.items() if common <= runs.keys()}
    rate = min(whole, key=lambda rate: statistics.mean(whole[rate][seed].loss("held_out") for seed in common))
    return dict(sorted(rates[rate].items()))


def row_of(runs: dict[int, Continued], dense: dict[int, Continued]) -> list[str]:
    """Parameters, rate, seeds; of each text the losses; NSAR and gates: means over seeds."""
    some = list(runs.values())
    cells = [f"{some[0].parameters:,}", f"{some[0].rate:g}", str(len(some))]
    cells.append(f"{statistics.mean(run.loss('held_out', 0) for run in some):.3f}")
    for text in TEXTS:
        cells += [f"{statistics.mean(run.loss(text) for run in some):.3f}", over(runs, dense, text)]
    before, after = (
        statistics.mean(found["nsar"][TAU] for found in when)
        for when in ([run.points[0] for run in some], [run.end for run in some])
    )
    gates = [[run.end[f"gate_{what}"] for run in some] for what in ("mean", "std")]
    alive = ", ".join(f"{statistics.mean(found):.2f}" for found in gates if None not in found)
    return [*cells, f"{before:.3f}, {after:.3f}", alive]


def over(runs: dict[int, Continued], dense: dict[int, Continued], text: str) -> str:
    """The difference from the dense model in the same order of the text: its mean, and from which to which."""
    found = [runs[seed].loss(text) - dense[seed].loss(text) for seed in runs.keys() & dense.keys()]
    if not found or runs == dense:
        return ""
    spread = f" ({min(found):+.3f} to {max(found):+.3f})" if len(found) > 1 else ""
    return f"{statistics.mean(found):+.3f}{spread}"


def curve_of(runs: dict[int, Continued], dense: dict[int, Continued]) -> list[str]:
    """Held-out losses after shares of the training: means over seeds."""
    cells = []
    for share in SHARES:
        found = []
        for run in runs.values():
            wanted = share * run.points[-1]["tokens"]
            point = min(range(len(run.points)), key=lambda i: abs(run.points[i]["tokens"] - wanted))
            found.append(run.loss("held_out", point))
        cells.append(f"{statistics.mean(found):.3f}")
    return cells
