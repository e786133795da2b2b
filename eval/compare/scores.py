"""The harness's results as scores, one for each task or group, metric and filter."""

from collections.abc import Mapping
from typing import Any, NamedTuple

Results = Mapping[str, Any]


class Place(NamedTuple):
    """What a score is of. `filter` says how the harness has cut answers out of what was generated."""

    task: str
    metric: str
    filter: str


class Score(NamedTuple):
    """One number of the harness's. `stderr` is None where it has none."""

    value: float
    stderr: float | None
    higher_is_better: bool | None  # None where the task does not say

    def __str__(self) -> str:
        return f"{self.value:.4f}" + (f" ± {self.stderr:.4f}" if self.stderr is not None else "")


def scores_of(results: Results) -> dict[Place, Score]:
    """All scores of the harness's results, in their order."""
    scores = {}
    for task, found in results["results"].items():
        for key, value in found.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = found.get(f"{metric}_stderr,{filtered}")
            higher = results.get("higher_is_better", {}).get(task, {}).get(metric, True)
            scores[Place(task, metric, filtered)] = Score(
                float(value), float(stderr) if isinstance(stderr, (int, float)) else None, higher
            )
    return scores
