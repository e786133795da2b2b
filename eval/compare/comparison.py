"""The harness's results of two models, compared sample by sample."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..errors import EvaluationError
from .paired_statistics import AGGREGATES, LEVEL, Difference, difference_of, difference_of_means, holm
from .scores import Place, Results, Score, scores_of
from .table import aligned_markdown, direction

SIGNIFICANT = 0.05
BETTER, WORSE, SAME, IDENTICAL = "better", "worse", "not distinguishable at this size", "identical"
FEW = 30  # samples: of fewer a percentile bootstrap covers clearly less than it is named for, 76 % with 6
# metric -> its aggregate in `paired_statistics.AGGREGATES`; others are means
AGGREGATE_OF = {
    "perplexity": "perplexity",
    "word_perplexity": "weighted_perplexity",
    "byte_perplexity": "weighted_perplexity",
    "bits_per_byte": "bits_per_byte",
}
SIZED = {"weighted_perplexity", "bits_per_byte"}  # whose samples are pairs of log-likelihood and words or bytes
# A task is judged by the first of these that it has, otherwise by its own first metric.
MAIN_METRICS = ("acc_norm", "acc", "exact_match", "contains", "bits_per_byte", "word_perplexity")
Pairs = Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]


@dataclass(frozen=True)
class Row:
    """A task or group and one of its metrics. `difference` is None where single samples say nothing of the metric.

    `verdict` is for a task's main metric only, and so is `p_holm`, which holds for all main metrics together.
    """

    place: Place
    is_group: bool
    baseline: Score
    model: Score
    difference: Difference | None
    main: bool = False
    p_holm: float | None = None
    verdict: str | None = None

    @property
    def is_mean(self) -> bool:
        """Whether the metric is a mean over samples."""
        return self.place.metric not in AGGREGATE_OF

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        difference = asdict(self.difference) if self.difference else None
        return {
            **self.place._asdict(),
            "is_group": self.is_group,
            "baseline": self.baseline._asdict(),
            "model": self.model._asdict(),
            "difference": difference,
            "main": self.main,
            "p_holm": self.p_holm,
            "verdict": self.verdict,
        }


def compare(baseline: Results, model: Results, seed: int = 0) -> list[Row]:
    """Compare two results of the same tasks.

    Args:
        baseline: what `evaluate` has returned, with its `samples`.
        model: of the other model.
        seed: of bootstrap and permutations.

    Raises:
        EvaluationError: the two have not been scored on the same samples.
    """
    before, after = scores_of(baseline), scores_of(model)
    pairs = {task: _pairs(task, baseline["samples"][task], samples) for task, samples in model["samples"].items()}
    mains = {task: _main_metric([place for place in after if place.task == task]) for task in pairs}
    rows = []
    for place, score in after.items():
        if place.task in pairs:
            difference = _task_difference(place, pairs[place.task], score, seed)
        else:
            difference = _group_difference(place, after, _tasks_below(model, place.task), pairs, seed)
        is_group, main = place.task not in pairs, mains.get(place.task) == place
        rows.append(Row(place, is_group, before[place], score, difference, main))
    return list(_judged(rows))


def _pairs(task: str, baseline: Sequence[dict], model: Sequence[dict]) -> dict[str, Pairs]:
    """The samples of both models side by side, in the order of documents, by filter."""
    before, after = ({(s["filter"], s["doc_id"]): s for s in samples} for samples in (baseline, model))
    if before.keys() != after.keys() or any(before[at]["doc_hash"] != after[at]["doc_hash"] for at in before):
        raise EvaluationError(
            f"{task}: the two models were scored on different samples ({len(before)} and {len(after)}, or other "
            "texts). Score both in one run, on the same ones."
        )
    pairs: dict[str, list] = {}
    for filtered, doc in sorted(after):
        pairs.setdefault(filtered, []).append((before[filtered, doc], after[filtered, doc]))
    return pairs


def _main_metric(places: Sequence[Place]) -> Place | None:
    wanted = [place for metric in MAIN_METRICS for place in places if place.metric == metric]
    return next(iter([*wanted, *places]), None)


def _columns(pairs: Pairs, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None] | None:
    """Both models' values of a metric (samples,), and the samples' sizes if it has such. None if it has no numbers."""
    values = [[sample.get(metric) for sample in pair] for pair in pairs]
    try:
        table = np.asarray(values, dtype=float)  # (samples, 2), or (samples, 2, 2) with sizes
    except (TypeError, ValueError):
        return None
    if (table.ndim == 3) != (AGGREGATE_OF.get(metric) in SIZED) or np.isnan(table).any():
        return None
    return (table[:, 0, 0], table[:, 1, 0], table[:, 1, 1]) if table.ndim == 3 else (table[:, 0], table[:, 1], None)


def _task_difference(place: Place, pairs: Mapping[str, Pairs], score: Score, seed: int) -> Difference | None:
    columns = _columns(pairs[place.filter], place.metric)
    if columns is None or score.higher_is_better is None:
        return None
    before, after, sizes = columns
    aggregate = AGGREGATE_OF.get(place.metric, "mean")
    weights = np.ones_like(after) if sizes is None else sizes
    with np.errstate(over="ignore"):
        total = AGGREGATES[aggregate](after, weights, -1)
    # Some metrics (F1 over a corpus, say) are no aggregate of samples: nothing is said of those.
    if not math.isclose(total, score.value, rel_tol=1e-6, abs_tol=1e-9):
        return None
    # What a sample has of a perplexity is a log-likelihood, of which the higher one is the better.
    higher = score.higher_is_better or aggregate != "mean"
    return difference_of(before, after, sizes, aggregate=aggregate, higher_is_better=higher, seed=seed)


def _tasks_below(results: Results, name: str) -> list[str]:
    """The tasks below a group."""
    if name not in results["group_subtasks"]:
        return [name]
    return [task for child in results["group_subtasks"][name] for task in _tasks_below(results, child)]


def _group_difference(
    place: Place,
    scores: Mapping[Place, Score],
    below: Sequence[str],
    pairs: Mapping[str, Mapping[str, Pairs]],
    seed: int,
) -> Difference | None:
    """Of a group's average, where that is a mean of its tasks' means, weighted by their sizes or not."""
    tasks = [task for task in below if place._replace(task=task) in scores]
    columns = [_columns(pairs[task][place.filter], place.metric) for task in tasks]
    if not tasks or place.metric in AGGREGATE_OF or None in columns or scores[place].higher_is_better is None:
        return None
    values = [(before, after) for before, after, _ in columns]
    means = np.array([after.mean() for _, after in values])
    sizes = np.array([len(after) for _, after in values])
    for weights in (np.full(len(tasks), 1 / len(tasks)), sizes / sizes.sum()):
        if math.isclose(weights @ means, scores[place].value, rel_tol=1e-9):
            return difference_of_means(values, weights, higher_is_better=scores[place].higher_is_better, seed=seed)
    return None


def _judged(rows: Sequence[Row]) -> Iterator[Row]:
    """The rows, with a verdict for each main one."""
    tested = [row for row in rows if row.main and row.difference]
    adjusted = dict(zip([row.place for row in tested], holm([row.difference.p for row in tested]), strict=True))
    for row in rows:
        p = adjusted.get(row.place)
        yield replace(row, p_holm=p, verdict=_verdict(row, p)) if row.main else row


def _verdict(row: Row, p: float | None) -> str:
    d = row.difference
    if d is None:
        return "not compared"
    if d.ties == d.samples:
        return IDENTICAL
    if p >= SIGNIFICANT or d.difference == 0:
        return SAME
    return BETTER if (d.difference > 0) == row.model.higher_is_better else WORSE


def sentence_of(row: Row) -> str:
    """A verdict with its figures, in one line."""
    return f"{row.place.task}: {row.verdict} ({figures_of(row)})"


def figures_of(row: Row) -> str:
    """What a verdict is from, in words."""
    d = row.difference
    infinite = [name for name in ("baseline", "model") if not math.isfinite(getattr(row, name).value)]
    if d is None and row.model.higher_is_better is None:
        return f"the task does not say whether a higher {row.place.metric} is better"
    if d is None and infinite:
        return f"{row.place.metric} of the {' and the '.join(infinite)} is infinite: an answer has no chance there"
    if d is None:
        return f"{row.place.metric} is no average over samples"
    if row.verdict == IDENTICAL:
        return f"{row.place.metric} {row.model.value:.4f}, identical on all {d.samples:,} questions"
    bounds = f", {LEVEL:.0%} interval {interval_of(d)}" if d.low is not None else ""
    if bounds and (d.low > 0 or d.high < 0) != (row.p_holm < SIGNIFICANT):
        bounds += " (of this task by itself; the verdict goes by p)"
    return (
        f"{row.place.metric} {row.baseline.value:.4f} -> {row.model.value:.4f}, difference {d.difference:+.4f}{bounds}"
        f"; {d.test} p = {row.p_holm:.2g} after Holm; {d.samples:,} samples"
    )


def interval_of(d: Difference) -> str:
    """The interval's two ends, or nothing where there is none."""
    return "" if d.low is None else f"{d.low:+.4f} to {d.high:+.4f}"


def notes_of(rows: Sequence[Row]) -> list[str]:
    """What a reader of the table should know of its intervals."""
    tested = [row for row in rows if row.main and row.difference]
    notes = []
    if tested:
        notes.append(
            f"Intervals and p in the table are each row's own. Verdicts go by p after Holm's correction over "
            f"{len(tested)} task{'s' * (len(tested) > 1)}: a difference can be undecided although its interval leaves "
            "out 0."
        )
    if few := [f"{row.place.task}: {row.difference.samples}" for row in tested if row.difference.samples < FEW]:
        notes.append(
            f"Fewer than {FEW} samples ({', '.join(few)}): a bootstrap interval of so few covers less than the "
            f"{LEVEL:.0%} that it is named for, of 6 samples 76 %."
        )
    return notes


HEAD = ("Task", "Metric", "Better", "dense", "finedeep", "difference", "95 % interval", "p", "win/tie/loss")


def cells_of(row: Row) -> list[str]:
    """A row of the table with the columns of `HEAD`."""
    d = row.difference
    found = ["", "", "", ""]
    if d is not None:
        found = [f"{d.difference:+.4f}", interval_of(d), f"{d.p:.2g}", f"{d.wins}/{d.ties}/{d.losses}"]
    metric = row.place.metric if row.place.filter == "none" else f"{row.place.metric} ({row.place.filter})"
    return [row.place.task, metric, direction(row.model.higher_is_better), str(row.baseline), str(row.model), *found]


def table_of(rows: Sequence[Row]) -> str:
    """The comparison as a Markdown table: p-values are each test's own, before Holm."""
    return aligned_markdown(HEAD, [cells_of(row) for row in rows], 3)
