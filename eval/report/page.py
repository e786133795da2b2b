"""A study as one HTML page that needs nothing else: no network, no script, figures inside."""

import base64
import datetime
import json
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finedeep_files.masking import masked
from finedeep_files.whole_file import write_whole
from jinja2 import Environment, StrictUndefined

from ..compare.comparison import BETTER, HEAD, IDENTICAL, SAME, WORSE, Row, cells_of, figures_of
from ..inspect import inspection, plots
from ..inspect.recorder import TAU
from ..output import PAGE
from . import cost

TEMPLATE = Path(__file__).with_name("report.html")
CAPTIONS = {
    "differences": "Finedeep's score less the dense model's, in tasks whose score is a share of samples.",
    "activations": "How often act(gate) has which value; the outermost bins hold all beyond.",
    "nsar": f"Non-sparse activation rate (NSAR) by layer: the share of activations further than {TAU} from zero.",
    "gates": "Mean gate of each expert, from 0 to c. A gate of 1 leaves the expert as it is.",
    "token_gates": "Gates along the text's beginning, in the layer where they move most.",
}
MADE = ("models", "weights", "dtypes", "options", "n-shot", "versions")  # of the comparison: to make it again
# The columns of a narrow screen first: what one looks for, then where it comes from.
COLUMNS = (
    "Task",
    "finedeep",
    "difference",
    "verdict",
    "dense",
    "95 % interval",
    "p",
    "win/tie/loss",
    "Metric",
    "Better",
)
COMMANDS = ("finedeep", "__main__.py")


def write_report(folder: Path, comparison: Mapping[str, Any], rows: Sequence[Row]) -> Path:
    """Write `report.html` and its figures, as PNG and SVG, into a folder.

    Args:
        folder: an existing folder.
        comparison: what `comparison.json` holds.
        rows: the comparison's rows.
    """
    found, costs = comparison.get("inspection"), comparison.get("cost")
    drawn = {"differences": plots.differences(rows), **(plots.figures_of(found) if found else {})}
    drawn = {name: figure for name, figure in drawn.items() if figure}
    plots.save(drawn, folder)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        models=comparison["models"],
        cards=list(cards_of(comparison, rows)),
        verdicts=[(row.verdict, row.place.task, figures_of(row)) for row in rows if row.main],
        head=COLUMNS,
        scores=[(columns_of(row), row.main) for row in rows],
        tasks=", ".join(row.place.task for row in rows if row.main),
        limit=comparison["options"].get("limit"),
        date=datetime.date.today().isoformat(),
        command=command(),
        notes=comparison["notes"],
        sparsity=[(cells, False) for cells in inspection.rows_of(found)] if found else [],
        cost=[([label, ratio, *each], False) for label, *each, ratio in cost.rows_of(costs)] if costs else [],
        weights=comparison["weights"],
        dtypes=comparison["dtypes"],
        costs=costs,
        captions=CAPTIONS,
        figures={name: base64.b64encode((folder / f"{name}.svg").read_bytes()).decode() for name in drawn},
        made=json.dumps({key: comparison[key] for key in MADE}, indent=1),
    )
    return write_whole(folder / PAGE, page)


def columns_of(row: Row) -> list[str]:
    """A row's cells in the order of `COLUMNS`."""
    cells = dict(zip(HEAD, cells_of(row), strict=True)) | {"verdict": (row.verdict or "") if row.main else ""}
    return [cells[name] for name in COLUMNS]


def command() -> str | None:
    """What was typed, with secrets masked; None where no command runs."""
    if Path(sys.argv[0]).name not in COMMANDS:
        return None
    return masked(shlex.join(["finedeep", *sys.argv[1:]]))


def cards_of(comparison: Mapping[str, Any], rows: Sequence[Row]) -> Any:
    """The figures that a reader looks for first: (figure, label, tone)."""
    verdicts = Counter(row.verdict for row in rows if row.main)
    yield f"{verdicts[BETTER]}", "tasks better", BETTER if verdicts[BETTER] else ""
    yield f"{verdicts[WORSE]}", "tasks worse", WORSE if verdicts[WORSE] else ""
    yield f"{verdicts[SAME]}", "undecided at this size", ""
    if verdicts[IDENTICAL]:
        yield f"{verdicts[IDENTICAL]}", "tasks identical", ""
    if found := comparison.get("inspection"):
        dense, model = (found[name] for name in ("dense", "finedeep"))
        yield f"{model['loss'] - dense['loss']:+.4f}", "loss over dense, nats per token", ""
        if dense["nsar"][TAU]:
            yield f"{model['nsar'][TAU] / dense['nsar'][TAU]:.2f}x", f"NSAR at {TAU} over dense", ""
    if costs := comparison.get("cost"):
        dense, model = (costs["models"][name] for name in ("dense", "finedeep"))
        yield f"{model['parameters'] / dense['parameters']:.3f}x", "parameters over dense", ""
        yield f"{model['flops_per_token'] / dense['flops_per_token']:.3f}x", "FLOPs over dense", ""
