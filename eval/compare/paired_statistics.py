"""Is a difference between two models, scored on the same samples, more than chance?

Interval: the percentile bootstrap over samples (Efron & Tibshirani 1993, chapter 13). Test: for scores of 0 and 1 the
exact form of McNemar's (1947), for others the permutation test that swaps the two models' scores within samples, exact
where there are few samples. Several tests at once: Holm (1979).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 9999
ROUNDING = 1e-5  # of a value: below it two float32 log-likelihoods of the same text may differ by summation order alone
CELLS = 2**22  # of resampled scores in memory at once

Aggregate = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
# How samples' scores x, of sizes w, become one number along an axis; the names are the harness's, of its aggregations.
AGGREGATES: Mapping[str, Aggregate] = {
    "mean": lambda x, w, axis: x.mean(axis),
    "perplexity": lambda x, w, axis: np.exp(-x.mean(axis)),
    "weighted_perplexity": lambda x, w, axis: np.exp(-x.sum(axis) / w.sum(axis)),
    "bits_per_byte": lambda x, w, axis: -x.sum(axis) / w.sum(axis) / math.log(2),
}


@dataclass(frozen=True)
class Difference:
    """Finedeep's score less the baseline's, and what can be said of it. `low` and `high` are None for one sample."""

    difference: float
    low: float | None
    high: float | None
    p: float
    test: str
    wins: int
    ties: int
    losses: int
    samples: int


def difference_of(
    baseline: Sequence[float],
    model: Sequence[float],
    sizes: Sequence[float] | None = None,
    *,
    aggregate: str = "mean",
    higher_is_better: bool = True,
    seed: int = 0,
) -> Difference | None:
    """Compare two models' scores of the same samples, in the same order.

    Returns None where a score or an aggregate is infinite: with an answer that has no chance, there is no average.

    Args:
        baseline: a score for each sample; log-likelihoods, where the aggregate is not "mean".
        model: the other model's.
        sizes: the words or bytes of each sample, where the aggregate weighs by them.
        aggregate: a key of `AGGREGATES`: what is compared is that of all samples.
        higher_is_better: whether the model with the higher single score wins a sample.
        seed: of bootstrap and permutations.
    """
    a, b = np.asarray(baseline, float), np.asarray(model, float)
    with np.errstate(invalid="ignore"):  # of minus infinity less minus infinity
        b = np.where(np.abs(b - a) <= ROUNDING * np.abs(a), a, b)
    w = np.ones_like(a) if sizes is None else np.asarray(sizes, float)
    of = AGGREGATES[aggregate]
    with np.errstate(over="ignore"):
        totals = of(a, w, -1), of(b, w, -1)
    if not np.isfinite([*totals, *a, *b]).all():
        return None
    better = (b - a) * (1 if higher_is_better else -1)
    counts = _counts(better)
    low, high = _interval(a, b, w, of, seed)
    if set(np.unique([a, b])) <= {0.0, 1.0} and aggregate == "mean":
        differ = counts["wins"] + counts["losses"]
        test, p = "exact McNemar", stats.binomtest(counts["wins"], differ).pvalue if differ else 1.0
    else:
        test, p = "paired permutation", _permutation(a, b, w, of, seed)
    return Difference(
        difference=float(totals[1] - totals[0]),
        low=low,
        high=high,
        p=float(p),
        test=test,
        **counts,
    )


def _batch(samples: int) -> int:
    return max(1, CELLS // samples)


def _interval(a: np.ndarray, b: np.ndarray, w: np.ndarray, of: Aggregate, seed: int) -> tuple[float | None, ...]:
    if len(a) < 2:
        return None, None
    if (a == b).all():
        return 0.0, 0.0
    found = stats.bootstrap(
        (a, b, w),
        lambda a, b, w, axis: of(b, w, axis) - of(a, w, axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=_batch(len(a)),
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def _permutation(a: np.ndarray, b: np.ndarray, w: np.ndarray, of: Aggregate, seed: int) -> float:
    if len(a) < 2 or (a == b).all():
        return 1.0
    return stats.permutation_test(
        (a, b),
        lambda a, b, axis: of(b, w, axis) - of(a, w, axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=_batch(len(a)),
        rng=np.random.default_rng(seed),
    ).pvalue


def difference_of_means(
    tasks: Sequence[tuple[Sequence[float], Sequence[float]]],
    weights: Sequence[float],
    *,
    higher_is_better: bool = True,
    seed: int = 0,
) -> Difference:
    """Compare a weighted mean of several tasks' means: each task's samples are resampled by themselves.

    Args:
        tasks: the baseline's and the model's scores of each task's samples.
        weights: of the tasks; they sum to 1.
        higher_is_better: whether the model with the higher single score wins a sample.
        seed: of bootstrap and permutations.
    """
    a, b = (np.concatenate([np.asarray(task[i], float) for task in tasks]) for i in (0, 1))
    # Each sample's share, so that the sum over all samples is the weighted mean of means.
    share = np.concatenate([np.full(len(task[0]), w / len(task[0])) for task, w in zip(tasks, weights, strict=True)])
    total: Aggregate = lambda x, w, axis: (x * w).sum(axis)  # noqa: E731
    spread = [_resampled_mean(np.subtract(y, x, dtype=float), seed + i) for i, (x, y) in enumerate(tasks)]
    low, high = None, None
    if all(len(x) > 1 for x, _ in tasks):
        low, high = map(float, np.quantile(np.tensordot(weights, spread, 1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    return Difference(
        difference=float(total(b - a, share, -1)),
        low=low,
        high=high,
        p=float(_permutation(a, b, share, total, seed)),
        test="paired permutation",
        **_counts((b - a) * (1 if higher_is_better else -1)),
    )


def _counts(better: np.ndarray) -> dict[str, int]:
    """How many samples are better, the same, worse."""
    wins, losses = int((better > 0).sum()), int((better < 0).sum())
    return {"wins": wins, "ties": len(better) - wins - losses, "losses": losses, "samples": len(better)}


def _resampled_mean(x: np.ndarray, seed: int) -> np.ndarray:
    if len(x) < 2 or (x == x[0]).all():
        return np.full(RESAMPLES, x.mean())
    return stats.bootstrap(
        (x,), np.mean, n_resamples=RESAMPLES, batch=_batch(len(x)), method="percentile", rng=np.random.default_rng(seed)
    ).bootstrap_distribution


def holm(p: Sequence[float]) -> list[float]:
    """p-values that hold for all tests together: the i-th smallest of n times n - i + 1, never below the one before."""
    adjusted, worst = [0.0] * len(p), 0.0
    for rank, i in enumerate(np.argsort(p)):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = worst
    return adjusted
