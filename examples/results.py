"""Make the tables and curves of examples/RESULTS.md of the logs in examples/logs.

    python examples/results.py

A log is SIZE/MODEL/RATE-SEED.jsonl, as examples/grid.py names it. Of each model that learning rate counts with which it
has the lowest loss on held-out text, of the seeds that all its rates have.
"""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from finedeep.benchmarks.readme import put_into_readme
from finedeep.eval.inspection import TAU
from finedeep.eval.table import aligned_markdown

HERE = Path(__file__).parent
LOGS, PAGE, CURVES, GRID = HERE / "logs", HERE / "RESULTS.md", HERE / "curves.svg", HERE / "grid.yaml"
COUNTS = "held_out"  # the text on whose loss a learning rate is chosen
TEXTS = {"held_out": "held-out text", "author": "another author"}


@dataclass
class Run:
    """What a log says."""

    size: str
    model: str
    first: dict[str, Any]
    losses: dict[str, dict[int, float]]  # of each validation text, by tokens
    nsar: float

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.first["recipe"]["training"]["learning_rate"]

    @property
    def seed(self) -> int:
        """That of the weights."""
        return self.first["recipe"]["training"]["seed"]

    def loss(self, text: str = COUNTS) -> float:
        """At the end, in nats per token."""
        return list(self.losses[text].values())[-1]


@dataclass
class Group:
    """The runs of a model of one size, by seed, at the learning rate at which it is best."""

    size: str
    model: str
    tried: dict[float, float]  # the mean loss by learning rate, of the seeds that all of them have
    runs: dict[int, Run]

    @property
    def first(self) -> dict[str, Any]:
        """What is the same for all seeds."""
        return next(iter(self.runs.values())).first

    def mean(self, text: str = COUNTS) -> float:
        """Of the losses over the seeds."""
        return statistics.mean(run.loss(text) for run in self.runs.values())


def main() -> None:
    """Read all logs, write all tables."""
    groups = groups_of(read(path) for path in sorted(LOGS.glob("*/*/*.jsonl")))
    for mark, table in tables_of(groups, yaml.safe_load(GRID.read_text(encoding="utf-8"))["tables"]).items():
        put_into_readme(mark, table, PAGE)


def read(path: Path) -> Run:
    """A log's run."""
    first, *rest = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    losses: dict[str, dict[int, float]] = defaultdict(dict)
    for line in rest:
        for text in TEXTS:
            if (name := f"eval_{text}_loss") in line:
                losses[text][line["tokens"]] = line[name]
    return Run(*path.parts[-3:-1], first, dict(losses), rest[-1]["nsar"][TAU])


def groups_of(runs: Iterable[Run]) -> dict[tuple[str, str], Group]:
    """By size and model. Exits where learning rates cannot be compared."""
    found: dict[tuple[str, str], dict[float, dict[int, Run]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        found[run.size, run.model][run.rate][run.seed] = run
    groups = {}
    for place, rates in found.items():
        common = set.intersection(*(set(seeds) for seeds in rates.values()))
        if not common:
            raise SystemExit(f"{'/'.join(place)}: its learning rates have no seed in common; train what is missing.")
        tried = {rate: statistics.mean(seeds[seed].loss() for seed in common) for rate, seeds in sorted(rates.items())}
        groups[place] = Group(*place, tried, dict(sorted(rates[min(tried, key=tried.__getitem__)].items())))
    return groups


def tables_of(groups: dict[tuple[str, str], Group], wanted: dict[str, Any]) -> dict[str, str]:
    """By mark: of each size the models in the order wanted, the first of them what the others are compared with."""
    return {
        mark: aligned_markdown(
            list(COLUMNS),
            [
                [column(groups[size, model], groups[size, table["models"][0]]) for column in COLUMNS.values()]
                for size in table["sizes"]
                for model in table["models"]
                if (size, model) in groups
            ],
            2,
        )
        for mark, table in wanted.items()
    }


def with_share(value: float, base: float) -> str:
    """A count, and by how much it is over the base's."""
    return f"{value:,.0f}" + (f" ({percent(value / base - 1, 2)})" if value != base else "")


def percent(share: float, digits: int = 1) -> str:
    """With its sign."""
    return f"{100 * share:+.{digits}f} %"


def with_spread(values: Sequence[float]) -> str:
    """A mean, with the lowest and the highest where there are several."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def perplexity_over(group: Group, base: Group, text: str) -> str:
    """Of the means over seeds that both have; below 0 is better than the base."""
    seeds = group.runs.keys() & base.runs.keys()
    if group is base or not seeds:
        return ""
    difference = statistics.mean(group.runs[seed].loss(text) - base.runs[seed].loss(text) for seed in seeds)
    return percent(math.expm1(difference))


def rates_of(group: Group) -> str:
    """The learning rate that counts, and those that were tried."""
    best = min(group.tried, key=group.tried.__getitem__)
    others = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in group.tried.items() if rate != best)
    return f"{best:g}" + (f" ({others})" if others else "")


COLUMNS = {
    "size": lambda group, base: group.size,
    "model": lambda group, base: group.model,
    "parameters": lambda group, base: with_share(group.first["parameters"], base.first["parameters"]),
    "FLOPs per token": lambda group, base: with_share(group.first["flops_per_token"], base.first["flops_per_token"]),
    "learning rate (others: loss)": lambda group, base: rates_of(group),
    "seeds": lambda group, base: str(len(group.runs)),
    "loss": lambda group, base: with_spread([run.loss() for run in group.runs.values()]),
    "perplexity": lambda group, base: perplexity_over(group, base, "held_out"),
    "loss, other author": lambda group, base: with_spread([run.loss("author") for run in group.runs.values()]),
    "perplexity, other author": lambda group, base: perplexity_over(group, base, "author"),
    "NSAR": lambda group, base: f"{100 * statistics.mean(run.nsar for run in group.runs.values()):.1f} %",
}


if __name__ == "__main__":
    main()
