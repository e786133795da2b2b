"""Scores of several models as one Markdown table, a row for each task and metric."""

from collections.abc import Mapping, Sequence
from typing import Any

from .scores import scores_of


def side_by_side(models: Mapping[str, Mapping[str, Any]]) -> str:
    """One Markdown table. `models` maps a column's heading to the harness's results, all of the same tasks."""
    columns = {heading: scores_of(results) for heading, results in models.items()}
    rows = [
        [
            place.task,
            place.metric,
            direction(score.higher_is_better),
            *(str(found[place]) for found in columns.values()),
        ]
        for place, score in next(iter(columns.values())).items()
    ]
    return aligned_markdown(["Task", "Metric", "Better", *columns], rows, 3)


def direction(higher_is_better: bool | None) -> str:
    """Which scores of a metric are the better ones."""
    return {True: "higher", False: "lower", None: "not said"}[higher_is_better]


def aligned_markdown(head: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    """A table whose source is aligned as well: the first `words` columns to the left, numbers to the right."""
    table = [list(head), *map(list, rows)]
    widths = [max(3, *(len(row[i]) for row in table)) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(w) if i < words else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * w if i < words else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(table[0]), line(rule), *map(line, table[1:])])
