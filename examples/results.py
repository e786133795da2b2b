"""Make the tables and curves of examples/RESULTS.md, and what the README says of them, of the logs in examples/logs.

    python examples/results.py

A log is SIZE/MODEL/RATE-SEED.jsonl, as examples/grid.py names it. Of each model that learning rate counts with which it
has the lowest loss on held-out text, of the seeds that all its rates have.
"""

import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from finedeep.benchmarks.readme import README, put_into_readme
from finedeep.eval.inspection import TAU
from finedeep.eval.plots import STYLE
from finedeep.eval.table import aligned_markdown
from grid import slug
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

HERE = Path(__file__).parent
LOGS, PAGE, CURVES, GRID = HERE / "logs", HERE / "RESULTS.md", HERE / "curves.svg", HERE / "grid.yaml"
TASKS = LOGS / "local_tasks.json"  # the comparison.json of `finedeep eval`, without times
STYLES = ("-", "--", ":", "-.")
COUNTS = "held_out"  # the text on whose loss a learning rate is chosen
LOSSES = {"held_out": "eval_held_out_loss", "author": "eval_author_loss", "train": "loss"}


@dataclass
class Run:
    """What a log says."""

    size: str
    model: str
    first: dict[str, Any]
    losses: dict[str, dict[int, float]]  # by tokens, of each validation text and, as "train", of what came since
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
    def first_run(self) -> Run:
        """That of the first seed."""
        return next(iter(self.runs.values()))

    @property
    def nsar(self) -> float:
        """The mean over the seeds."""
        return statistics.mean(run.nsar for run in self.runs.values())

    def mean(self) -> float:
        """Of the losses that count, over the seeds."""
        return statistics.mean(run.loss() for run in self.runs.values())


def main() -> None:
    """Read all logs, write all tables and the curves."""
    groups = groups_of(read(path) for path in sorted(LOGS.glob("*/*/*.jsonl")))
    grid = yaml.safe_load(GRID.read_text(encoding="utf-8"))
    for mark, table in tables_of(groups, grid["tables"]).items():
        put_into_readme(mark, table, PAGE)
    put_into_readme("tasks", tasks_of(json.loads(TASKS.read_text(encoding="utf-8"))), PAGE)
    put_into_readme("claim", "\n".join(claim_of(groups, claim) for claim in grid["claims"]), README)
    with rc_context(STYLE):
        curves(groups, grid["curves"]).savefig(CURVES, metadata={"Date": None})


def read(path: Path) -> Run:
    """A log's run."""
    first, *rest = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    losses: dict[str, dict[int, float]] = defaultdict(dict)
    for line in rest:
        for text, name in LOSSES.items():
            if name in line:
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
    tables = {}
    for mark, table in wanted.items():
        first, *_ = names = {slug(model): model for model in table["models"]}
        rows = [
            [size, names[model], *(column(groups[size, model], groups[size, first]) for column in COLUMNS.values())]
            for size in table["sizes"]
            for model in names
            if (size, model) in groups
        ]
        tables[mark] = aligned_markdown(["size", "model", *COLUMNS], rows, 2)
    return tables


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
    best = group.first_run.rate
    others = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in group.tried.items() if rate != best)
    return f"{best:g}" + (f" ({others})" if others else "")


def curves(groups: dict[tuple[str, str], Group], wanted: dict[str, Any]) -> Figure:
    """How far the losses of the models are over the first one's, of the same seed, while they train.

    Of the text trained on: it goes by once, so that no model has seen what its loss is measured on.
    """
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axhline(0, color="#767676", linewidth=1)
    first, *others = wanted["models"]
    for (size, model), style in zip(itertools.product(wanted["sizes"], others), STYLES, strict=False):
        base, group = (groups[size, slug(name)] for name in (first, model))
        seeds = base.runs.keys() & group.runs.keys()
        tokens = sorted(group.first_run.losses["train"])
        over = [
            statistics.mean(group.runs[s].losses["train"][t] - base.runs[s].losses["train"][t] for s in seeds)
            for t in tokens
        ]
        axes.plot([t / 1e6 for t in tokens], over, style, label=f"{model}, {size}")
    axes.set(xlabel="million tokens", ylabel=f"nats over {first}", ylim=(-0.05, 0.15))
    axes.legend(frameon=False)
    return figure


def tasks_of(comparison: dict[str, Any]) -> str:
    """Each task's main metric, as `finedeep eval --baseline` has compared it, and its verdict."""
    rows = []
    for row in comparison["tasks"]:
        if row["main"] and not row["is_group"]:
            both = [f"{row[model]['value']:.3f} ± {row[model]['stderr']:.3f}" for model in ("baseline", "model")]
            d = row["difference"]
            interval = f"{d['difference']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})"
            rows.append([row["task"], row["metric"], str(d["samples"]), *both, interval, row["verdict"]])
    head = ["task", "metric", "questions", "dense", "Finedeep", "difference (95 % interval)", "verdict"]
    return aligned_markdown(head, rows, 2)


def claim_of(groups: dict[tuple[str, str], Group], wanted: dict[str, Any]) -> str:
    """Finedeep beside the best dense model of each size, in words: the items of a list."""
    items = []
    for size in wanted["sizes"]:
        dense = [groups[place] for name in wanted["dense"] if (place := (size, slug(name))) in groups]
        best, ours = min(dense, key=Group.mean), groups[size, slug(wanted["model"])]
        over, run = ours.mean() - best.mean(), ours.first_run
        items.append(
            f"- {run.first['parameters'] / 1e6:.1f} million parameters, {max(run.losses[COUNTS]) / 1e6:.1f} million "
            f"tokens: the perplexity of {wanted['model']} is {100 * abs(math.expm1(over)):.1f} % "
            f"{'below' if over < 0 else 'above'} the best dense model's (loss {ours.mean():.3f} against "
            f"{best.mean():.3f}, seeds: {len(ours.runs)} and {len(best.runs)}); NSAR {100 * ours.nsar:.0f} % against "
            f"{100 * best.nsar:.0f} %."
        )
    return "\n".join(items)


COLUMNS = {
    "parameters": lambda group, base: with_share(
        group.first_run.first["parameters"], base.first_run.first["parameters"]
    ),
    "FLOPs per token": lambda group, base: with_share(
        group.first_run.first["flops_per_token"], base.first_run.first["flops_per_token"]
    ),
    "learning rate (others: loss)": lambda group, base: rates_of(group),
    "seeds": lambda group, base: str(len(group.runs)),
    "loss": lambda group, base: with_spread([run.loss() for run in group.runs.values()]),
    "perplexity": lambda group, base: perplexity_over(group, base, "held_out"),
    "loss, other author": lambda group, base: with_spread([run.loss("author") for run in group.runs.values()]),
    "perplexity, other author": lambda group, base: perplexity_over(group, base, "author"),
    "NSAR": lambda group, base: f"{100 * group.nsar:.1f} %",
}


if __name__ == "__main__":
    main()
