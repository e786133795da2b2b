"""What examples/RESULTS.md says of models of 1 million parameters and more: files of a line a run.

Those of examples/gpu_grid.py are in examples/logs/gpu, of as many machines as there were; examples/logs/trial_*.jsonl
are of a trial by another plain loop, before this recipe. Runs are compared only with those of the same size, the same
number of tokens and the same loop, and each model at the learning rate with which it has the lowest held-out loss.
"""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from finedeep.eval.compare.table import aligned_markdown
from finedeep.eval.inspect.recorder import TAU
from recipe import slug

BASELINES = {"dense": "dense", "dense-sandwich-norm": "dense, sandwich norm"}
SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)  # of a training, after which curves are shown
NEAR = 0.02  # of a training, that a measurement may be away from such a share


@dataclass
class LargerRun:
    """A line: losses in nats per token, by text; gates as mean, spread, share below 0.5."""

    size: str  # with the number of tokens, and whose loop it was
    model: str
    rate: float
    seed: int
    steps: int
    losses: dict[str, float]
    curve: dict[int, float]  # held-out losses by step
    nsar: float | None
    gates: tuple[float, float, float] | None
    parameters: int

    @property
    def finished(self) -> bool:
        return bool(self.losses)


Groups = dict[str, dict[str, dict[float, dict[int, LargerRun]]]]  # size, model, learning rate, seed


def read_larger(logs: Path) -> Groups:
    """All runs in a folder of logs. Exits where two files have the same one."""
    groups: Groups = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    readers = {"trial_*.jsonl": of_trial, "gpu/*.jsonl": of_grid}
    for path, of in ((path, of) for pattern, of in readers.items() for path in sorted(logs.glob(pattern))):
        for line in path.read_text(encoding="utf-8").splitlines():
            run = of(path, json.loads(line))
            seeds = groups[run.size][run.model][run.rate]
            if run.seed in seeds and seeds[run.seed].finished and run.finished:
                raise SystemExit(f"{path} has {run.size} {run.model} {run.rate:g}-{run.seed}, as another file has.")
            if run.seed not in seeds or run.finished or len(run.curve) > len(seeds[run.seed].curve):
                seeds[run.seed] = run
    return groups


def of_trial(path: Path, line: dict[str, Any]) -> LargerRun:
    """A line of the trial; trial_SIZE.jsonl."""
    spec = line["spec"]
    name = "dense" if spec["kind"] == "llama" else f"M={spec['M']} K={spec['K']}"
    if spec["sandwich"] or spec["variant"] == "densesw":
        name += ", sandwich norm"
    size = f"{path.stem.removeprefix('trial_')}, {spec['tokens'] / 1e6:g}M tokens, trial"
    losses = {"held_out": line["val"]["in"], "author": line["val"]["author"]}
    gates = tuple(line[f"gate_{what}"] for what in ("mean", "std", "lo")) if "gate_mean" in line else None
    return LargerRun(size, slug(name), spec["lr"], spec["seed"], 0, losses, {}, line["nsar"], gates, line["params"])


def of_grid(path: Path, line: dict[str, Any]) -> LargerRun:
    """A line of examples/gpu_grid.py."""
    size, model, _ = line["name"].split("/")
    training, context = line["recipe"]["training"], line["recipe"]["data"]["context"]
    tokens = training["max_steps"] * training["per_device_train_batch_size"] * context
    last = line["log"][-1] if line["finished"] else {}
    return LargerRun(
        f"{size}, {tokens / 1e6:.3g}M tokens",
        model,
        training["learning_rate"],
        training["seed"],
        training["max_steps"],
        {name: last[f"eval_{name}_loss"] for name in ("held_out", "author") if last},
        {point["step"]: point["eval_held_out_loss"] for point in line["log"]},
        line.get("nsar", {}).get(TAU),
        tuple(line[f"gate_{what}"] for what in ("mean", "std", "low")) if "gate_mean" in line else None,
        line["parameters"],
    )


def tables_of_larger(groups: Groups) -> dict[str, str]:
    """By mark, the largest models first."""
    groups = dict(sorted(groups.items(), key=lambda group: -most_parameters(group[1])))
    cut = [row for size in groups for row in curves(size, groups[size])]
    head = ["size", "model", "rate, seed", *(f"{share:.0%}" for share in SHARES)]
    return {
        "verdicts": aligned_markdown(VERDICT, [row for size in groups for row in verdicts(size, groups[size])], 5),
        "larger": aligned_markdown(RUN, [row for size in groups for row in runs(size, groups[size])], 2),
        "larger-curves": aligned_markdown(head, cut, 3) if cut else "No run of `gpu_grid.py` is in the logs yet.",
    }


def most_parameters(models: dict[str, dict[float, dict[int, LargerRun]]]) -> int:
    """Of all runs of a size."""
    return max(run.parameters for rates in models.values() for by_seed in rates.values() for run in by_seed.values())


VERDICT = ["size", "baseline", "loss (other author)", "best Finedeep", "its loss (other author)"]
VERDICT += ["perplexity", "perplexity, other author", "seeds"]
RUN = ["size", "model", "parameters", "learning rate", "seeds", "held out", "other author", "NSAR"]
RUN += ["gates: mean, spread, below 0.5"]


def verdicts(size: str, models: dict[str, dict[float, dict[int, LargerRun]]]) -> Iterator[list[str]]:
    """The best Finedeep model beside dense, as the paper compares, and beside dense with the same norm."""
    best = {model: found for model, rates in models.items() if (found := best_of(rates))}
    ours = {model: found for model, found in best.items() if not model.startswith("dense") and not is_idea(model)}
    most = max((len(by_seed) for _, by_seed in ours.values()), default=0)  # or the luckiest single run would be best
    ours = {model: found for model, found in ours.items() if len(found[1]) == most}
    for base, name in BASELINES.items():
        if base not in best or not ours:
            yield [size, name, "", "", "not trained", "", "", ""]
            continue
        model, (rate, deep) = min(ours.items(), key=lambda found: mean(found[1][1].values(), "held_out"))
        base_rate, dense = best[base]
        seeds = deep.keys() & dense.keys()
        over = [perplexity([(deep[s], dense[s]) for s in sorted(seeds)], text) for text in ("held_out", "author")]
        yield [size, name, said(base_rate, dense), shown(model), said(rate, deep), *over, str(len(seeds))]


def best_of(rates: dict[float, dict[int, LargerRun]]) -> tuple[float, dict[int, LargerRun]] | None:
    """The learning rate with the lowest held-out loss over the seeds that all rates have, and its runs by seed."""
    whole = {rate: {seed: run for seed, run in by_seed.items() if run.finished} for rate, by_seed in rates.items()}
    whole = {rate: by_seed for rate, by_seed in whole.items() if by_seed}
    if not whole:
        return None
    shared = set.intersection(*(set(by_seed) for by_seed in whole.values()))
    rate = min(whole, key=lambda rate: mean((whole[rate][seed] for seed in shared or whole[rate]), "held_out"))
    return rate, whole[rate]


def runs(size: str, models: dict[str, dict[float, dict[int, LargerRun]]]) -> Iterator[list[str]]:
    """A row for each model and learning rate with a finished run."""
    for model, rates in sorted(models.items()):
        for rate, by_seed in sorted(rates.items()):
            if some := [run for run in by_seed.values() if run.finished]:
                nsars = [run.nsar for run in some if run.nsar is not None]
                gates = [run.gates for run in some if run.gates and not model.startswith("dense")]
                sums = [statistics.mean(values) for values in zip(*gates, strict=True)]
                yield [
                    size,
                    shown(model),
                    f"{some[0].parameters:,}",
                    f"{rate:g}",
                    str(len(some)),
                    *(spread([run.losses[text] for run in some]) for text in ("held_out", "author")),
                    f"{statistics.mean(nsars):.3f}" if nsars else "",
                    f"{sums[0]:.2f}, {sums[1]:.2f}, {sums[2]:.0%}" if sums else "",
                ]


def curves(size: str, models: dict[str, dict[float, dict[int, LargerRun]]]) -> Iterator[list[str]]:
    """A row for each run, those that a deadline has cut too."""
    for model, rates in sorted(models.items()):
        for run in (run for _, by_seed in sorted(rates.items()) for _, run in sorted(by_seed.items())):
            if run.curve:
                yield [size, shown(model), f"{run.rate:g}, {run.seed}", *(loss_after(share, run) for share in SHARES)]


def loss_after(share: float, run: LargerRun) -> str:
    """The loss that was measured nearest to a share of the training; nothing where that is not near."""
    step = min(run.curve, key=lambda step: abs(step - share * run.steps))
    return f"{run.curve[step]:.3f}" if abs(step - share * run.steps) <= NEAR * run.steps else ""


def mean(some: Iterable[LargerRun], text: str) -> float:
    """Of losses."""
    return statistics.mean(run.losses[text] for run in some)


def spread(losses: list[float]) -> str:
    """Their mean, with the lowest and the highest of several seeds."""
    several = f" ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ""
    return f"{statistics.mean(losses):.3f}{several}"


def perplexity(pairs: list[tuple[LargerRun, LargerRun]], text: str) -> str:
    """How far it is over the baseline's, over the seeds of both; of several with the lowest and the highest."""
    if not pairs:
        return ""
    over = [a.losses[text] - b.losses[text] for a, b in pairs]
    found, least, most = (100 * math.expm1(x) for x in (statistics.mean(over), min(over), max(over)))
    return f"{found:+.1f} %" + (f" ({least:+.1f} to {most:+.1f})" if len(over) > 1 else "")


def said(rate: float, by_seed: dict[int, LargerRun]) -> str:
    """Losses and the learning rate."""
    runs = by_seed.values()
    return f"{mean(runs, 'held_out'):.3f} ({mean(runs, 'author'):.3f}) at {rate:g}"


def shown(model: str) -> str:
    """A model's name as the grid has it: m-2-k-8-sandwich-norm is M=2 K=8, sandwich norm."""
    return {slug(name): name for name in (*grid_models(), "M=2 K=8")}.get(model, model)  # which only the trial has


def is_idea(model: str) -> bool:
    """Whether it has code of its own, which the package has not."""
    return any(slug(name) == model and "ideas" in changes for name, changes in grid_models().items())


@cache
def grid_models() -> dict[str, dict[str, Any]]:
    """The grid's, by name."""
    return yaml.safe_load((Path(__file__).parent / "gpu_grid.yaml").read_text(encoding="utf-8"))["models"]


if __name__ == "__main__":
    for table in tables_of_larger(read_larger(Path(__file__).parent / "logs")).values():
        print(table, end="\n\n")
