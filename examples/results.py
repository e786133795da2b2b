"""Make the tables and figures of examples/RESULTS.md, and what the README says of them, of the logs in examples/logs.

    python examples/results.py

A log is SIZE/MODEL/RATE-SEED.jsonl, as examples/grid.py names it (of larger models see larger.py, of continued training
continued.py). Of each model that learning rate counts with which it has the lowest loss on held-out text; two rates are
compared over the seeds that both have.
"""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import from_checkout  # noqa: F401
import yaml
from continued import read_continued, tables_of_continued
from finedeep.benchmarks.documents import put_table
from finedeep.eval.compare.scores import Score
from finedeep.eval.compare.table import aligned_markdown
from finedeep.eval.inspect.plots import STYLE, activations
from finedeep.eval.inspect.recorder import EDGES, TAU
from larger import read_larger, tables_of_larger
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from recipe import slug

HERE = Path(__file__).parent
LOGS, PAGE, GRID = HERE / "logs", HERE / "RESULTS.md", HERE / "grid.yaml"
CURVES, HISTOGRAMS = HERE / "curves.svg", HERE / "activations.svg"
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
    histogram: list[int]  # of act(gate), between EDGES

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
    """The runs of a model of one size, by learning rate and seed. What counts is the rate at which it is best."""

    size: str
    model: str
    by_rate: dict[float, dict[int, Run]]

    @cached_property
    def common(self) -> dict[float, list[Run]]:
        """By learning rate the runs of the seeds that all rates have."""
        seeds = set.intersection(*(set(runs) for runs in self.by_rate.values()))
        return {rate: [runs[seed] for seed in sorted(seeds)] for rate, runs in sorted(self.by_rate.items())}

    @property
    def tried(self) -> dict[float, float]:
        """By learning rate the mean loss over all its seeds."""
        return {rate: self.mean_of(rate, runs) for rate, runs in sorted(self.by_rate.items())}

    @cached_property
    def runs(self) -> dict[int, Run]:
        """All seeds, at the best learning rate: of two the one with the lower mean loss over the seeds of both."""

        def better(one: float, other: float) -> float:
            both = self.by_rate[one].keys() & self.by_rate[other].keys()
            return min(one, other, key=lambda rate: self.mean_of(rate, both))

        return dict(sorted(self.by_rate[reduce(better, sorted(self.by_rate))].items()))

    def mean_of(self, rate: float, seeds: Iterable[int]) -> float:
        """Of the losses that count, of some seeds at a learning rate."""
        return statistics.mean(self.by_rate[rate][seed].loss() for seed in seeds)

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
        return self.mean_of(self.first_run.rate, self.runs)


def main() -> None:
    """Read all logs, write all tables and figures."""
    groups = groups_of(read(path) for path in sorted(LOGS.glob("*/*/*.jsonl")))
    grid = yaml.safe_load(GRID.read_text(encoding="utf-8"))
    for mark, table in tables_of(groups, grid["tables"]).items():
        put_table(mark, table, PAGE)
    others = tables_of_larger(read_larger(LOGS)) | tables_of_continued(read_continued(LOGS))
    for mark, table in others.items():
        put_table(mark, table, PAGE)
    put_table("rates", rates_of_models(groups, grid["rates"]), PAGE)
    put_table("tasks", tasks_of(json.loads(TASKS.read_text(encoding="utf-8"))), PAGE)
    put_table("small", "\n".join(claim_of(groups, claim) for claim in grid["claims"]), PAGE)
    with rc_context(STYLE):
        curves(groups, grid["curves"]).savefig(CURVES, metadata={"Date": None})
        histograms(groups, grid["histograms"]).savefig(HISTOGRAMS, metadata={"Date": None})


def read(path: Path) -> Run:
    """A log's run."""
    first, *rest = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    losses: dict[str, dict[int, float]] = defaultdict(dict)
    for line in rest:
        for text, name in LOSSES.items():
            if name in line:
                losses[text][line["tokens"]] = line[name]
    return Run(*path.parts[-3:-1], first, dict(losses), rest[-1]["nsar"][TAU], rest[-1]["histogram"])


def groups_of(runs: Iterable[Run]) -> dict[tuple[str, str], Group]:
    """By size and model. Exits where learning rates cannot be compared."""
    found: dict[tuple[str, str], dict[float, dict[int, Run]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        found[run.size, run.model][run.rate][run.seed] = run
    groups = {place: Group(*place, dict(rates)) for place, rates in found.items()}
    for place, group in groups.items():
        if not all(group.common.values()):
            raise SystemExit(f"{'/'.join(place)}: its learning rates have no seed in common; train what is missing.")
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


def rates_of_models(groups: dict[tuple[str, str], Group], wanted: dict[str, Any]) -> str:
    """Of each model, by learning rate, loss and NSAR over the seeds that all its rates have."""
    found = {name: groups[wanted["size"], slug(name)].common for name in wanted["models"]}
    rates = sorted({rate for common in found.values() for rate in common})
    rows = []
    for name, common in found.items():
        runs = [common.get(rate) for rate in rates]
        losses = [f"{statistics.mean(run.loss() for run in some):.3f}" if some else "" for some in runs]
        nsars = [f"{100 * statistics.mean(run.nsar for run in some):.1f} %" if some else "" for some in runs]
        rows.append([name, str(len(next(iter(common.values())))), *losses, *nsars])
    heads = [f"{what} at {rate:g}" for what in ("loss", "NSAR") for rate in rates]
    return aligned_markdown(["model", "seeds", *heads], rows, 1)


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
    first, *others = wanted["models"]
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(wanted["sizes"]), sharey=True)
    for size, axes in zip(wanted["sizes"], panels, strict=True):
        axes.axhline(0, color="#767676", linewidth=1)
        for model, style in zip(others, STYLES, strict=False):
            if (size, slug(model)) not in groups:
                continue
            base, group = (groups[size, slug(name)] for name in (first, model))
            seeds = base.runs.keys() & group.runs.keys()
            tokens = sorted(group.first_run.losses["train"])
            over = [
                statistics.mean(group.runs[s].losses["train"][t] - base.runs[s].losses["train"][t] for s in seeds)
                for t in tokens
            ]
            axes.plot([t / 1e6 for t in tokens], over, style, label=model)
        axes.set(title=size, xlabel="million tokens", ylim=(-0.05, 0.15))
    panels[0].set_ylabel(f"nats over {first}")
    named = {name: line for axes in panels for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named, loc="outside right upper", frameon=False)
    return figure


def histograms(groups: dict[tuple[str, str], Group], wanted: dict[str, Any]) -> Figure:
    """How often act(gate) has which value, over all seeds of two models of one size."""
    found = {}
    for name in wanted["models"]:
        runs = groups[wanted["size"], slug(name)].runs.values()
        summed = [sum(counts) for counts in zip(*(run.histogram for run in runs), strict=True)]
        found[name] = {"histogram": summed, "edges": EDGES}
    return activations(found)


def tasks_of(comparison: dict[str, Any]) -> str:
    """Each task's main metric, as `finedeep eval --baseline` has compared it, and its verdict."""
    rows = []
    for row in comparison["tasks"]:
        if row["main"] and not row["is_group"]:
            both = [str(Score(**row[model])) for model in ("baseline", "model")]
            d = row["difference"]
            interval = f"{d['difference']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})"
            rows.append([row["task"], row["metric"], str(d["samples"]), *both, interval, row["verdict"]])
    head = ["task", "metric", "samples", "dense", "Finedeep", "difference (95 % interval)", "verdict"]
    return aligned_markdown(head, rows, 2)


def claim_of(groups: dict[tuple[str, str], Group], wanted: dict[str, Any]) -> str:
    """Finedeep beside the best dense model of each size, in words: the items of a list."""
    items = []
    for size in wanted["sizes"]:
        dense = [groups[place] for name in wanted["dense"] if (place := (size, slug(name))) in groups]
        best, ours = min(dense, key=Group.mean), groups[size, slug(wanted["model"])]
        over, run = ours.mean() - best.mean(), ours.first_run
        both = ours.runs.keys() & best.runs.keys()
        lower = sum(ours.runs[seed].loss() < best.runs[seed].loss() for seed in both)
        items.append(
            f"- {run.first['parameters'] / 1e6:.1f} million parameters, {max(run.losses[COUNTS]) / 1e6:.1f} million "
            f"tokens: the perplexity of {wanted['model']} is {100 * abs(math.expm1(over)):.1f} % "
            f"{'below' if over < 0 else 'above'} the best dense model's (loss {ours.mean():.3f} against "
            f"{best.mean():.3f}, lower with {lower} of {len(both)} seeds); NSAR {100 * ours.nsar:.0f} % against "
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
