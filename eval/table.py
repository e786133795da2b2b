"""Scores of several models as one table, a row for each task and metric."""

from collections.abc import Mapping
from typing import Any


def score_rows(results: Mapping[str, Any]) -> dict[tuple[str, str], tuple[float, float | None, bool]]:
    """The harness's results as {(task, metric): (score, standard error or None, higher is better)}."""
    rows = {}
    for task, scores in results["results"].items():
        for key, score in scores.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(score, (int, float)):
                continue
            error = scores.get(f"{metric}_stderr,{filtered}")
            higher = results.get("higher_is_better", {}).get(task, {}).get(metric, True)
            rows[task, metric] = (score, error if isinstance(error, (int, float)) else None, bool(higher))
    return rows


def side_by_side(models: Mapping[str, Mapping[str, Any]]) -> str:
    """One Markdown table. `models` maps a column's heading to the harness's results, all of the same tasks."""
    columns = {heading: score_rows(results) for heading, results in models.items()}
    keys = list(next(iter(columns.values())))
    table = [["Task", "Metric", "Better", *columns]]
    for task, metric in keys:
        cells = []
        for rows in columns.values():
            score, error, higher = rows[task, metric]
            cells.append(f"{score:.4f}" + (f" ± {error:.4f}" if error is not None else ""))
        table.append([task, metric, "higher" if higher else "lower", *cells])
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]

    def line(row: list[str]) -> str:
        cells = [cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * w if i < 3 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(table[0]), line(rule), *map(line, table[1:])])
