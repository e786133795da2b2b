"""What evaluations and inspections write, and where they work."""

from pathlib import Path

from finedeep_files.names import COMPARISON
from finedeep_files.working_folder import Contents

LIST = "finedeep_results.json"  # of all files that were written
INSPECTION, PAGE, MARKDOWN = "inspection.json", "report.html", "comparison.md"
DRAWN = ("differences", "activations", "nsar", "gates", "token_gates")
FIGURES = tuple(f"{name}.{kind}" for name in DRAWN for kind in ("svg", "png"))
MODELS = ("model", "dense", "finedeep")  # each with a folder of its answers
# The first two are the harness's names.
EVALUATED = Contents(
    command="eval",
    result=("*/results_*.json", "*/samples_*.jsonl", COMPARISON, MARKDOWN, PAGE, *FIGURES, LIST),
    private=("tasks-*/*", *(f"{model}/{name}" for model in MODELS for name in ("answers-*", "*.json"))),
    kept=tuple(f"{model}/answers-*" for model in MODELS),
    receipt=LIST,
)
INSPECTED = Contents(command="inspect", result=(INSPECTION, *FIGURES, LIST), receipt=LIST)


def name_of(model: str | Path) -> str:
    """A model's name in the harness's folders and results: never that of a hidden folder, as of ./model."""
    parts = [part.lstrip(".") for part in Path(model).parts if part.strip("./")]
    return "/".join(filter(None, parts)) or Path(model).resolve().name
