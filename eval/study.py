"""A model beside its dense baseline: benchmark scores compared sample by sample, sparsity, cost, one page of it all."""

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..convert.card import COMPARISON
from ..convert.destination import differing, write_whole
from ..version import __version__
from . import cost, inspection
from .comparison import compare, sentence_of, table_of
from .errors import EvaluationError
from .harness import evaluate
from .inspection import check_text, inspect
from .local_tasks import write_local_tasks
from .report import write_report
from .scores import Results
from .table import side_by_side
from .tokenization import check_same_tokenizer

UNFINISHED, PLAN = ".unfinished", "plan.json"
PACKAGES = ("torch", "transformers", "lm_eval", "scipy")
NOT_TOLD = ("say", "output", "resume")  # of the options: they decide nothing
WEIGHTS = ("*.safetensors", "config.json", "tokenizer.json")


@dataclass(frozen=True)
class Study:
    """What came out: the harness's results of each model; all in Markdown; what `comparison.json` holds."""

    results: Mapping[str, Results]
    markdown: str
    comparison: Mapping[str, Any] | None = None


def is_first_process() -> bool:
    """Whether this is the process that writes and speaks, under `accelerate launch` too."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


def score(model: str | Path, tasks: Sequence[str] = (), **options: Any) -> Study | None:
    """Score one model. The options are those of `study`, but for `text`."""
    if options.pop("text", None):
        raise EvaluationError("--text compares a model with its --baseline; `finedeep inspect` looks at one alone.")
    options.pop("progress", None)
    results = _score({"model": model}, tasks, **options)
    return Study(results, side_by_side(results)) if is_first_process() else None


def study(
    model: str | Path,
    baseline: str | Path,
    tasks: Sequence[str] = (),
    *,
    text: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Study | None:
    """Score a model and its baseline on the same samples, and compare.

    Args:
        model: a local folder or a Hub id of a Finedeep model.
        baseline: of the dense one.
        tasks: names of the harness's tasks or groups.
        text: a text file on which to look at sparsity and gates; None leaves that out.
        progress: whether to show bars on stderr.
        options: those of `evaluate`, and
            local: a folder of questions and texts, which become tasks too;
            output: a folder for the harness's results and samples, `comparison.json`, `comparison.md`, figures and
            `report.html`. While the run is at work its answers are kept there, in `.unfinished`. None: nothing is
            written, and costs are not measured;
            resume: whether to go on with what a stopped run of the same study has left;
            say: is given lines about what is being done.

    Returns:
        What came out; None in the processes of `accelerate launch` but the first.

    Raises:
        EvaluationError: the models, tasks, data or options do not fit.
    """
    models = {"dense": baseline, "finedeep": model}
    beginning = check_same_tokenizer(baseline, model)
    if text:
        check_text(Path(text))
    results = _score(models, tasks, finish=False, **options)
    if not is_first_process():
        return None
    done = _conclude(models, results, beginning, text, progress, options)
    if options.get("output"):
        shutil.rmtree(Path(options["output"]) / UNFINISHED)
    return done


def _score(
    models: Mapping[str, str | Path],
    tasks: Sequence[str],
    *,
    local: str | Path | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    include_path: str | Path | None = None,
    say: Callable[[str], None] | None = None,
    finish: bool = True,
    **options: Any,
) -> dict[str, Results]:
    """The harness's results by model. What a stopped run needs is kept until it is finished."""
    results = {}
    with ExitStack() as stack:
        if output:
            work = Path(output) / UNFINISHED
            _begin(work, plan_of(models, tasks, local, {"include_path": include_path, **options}), resume)
        else:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="finedeep-eval-")))
        names, paths = tasks_of(tasks, local, include_path, work)
        for name, path in models.items():
            kept = work / name
            kept.mkdir(parents=True, exist_ok=True)
            if say:
                say(f"Scoring {path}")
            results[name] = evaluate(path, names, include_path=paths, output=output, work=kept, say=say, **options)
    if output and finish and is_first_process():
        shutil.rmtree(work)
    return results


def tasks_of(
    tasks: Sequence[str], local: str | Path | None, include_path: str | Path | None, work: Path
) -> tuple[list[str], list[Path]]:
    """Names of all tasks, and the folders that define them; those of a local folder are written into `work`."""
    names, paths = list(tasks), [Path(include_path)] if include_path else []
    if local:
        made = work / f"tasks-{os.environ.get('LOCAL_RANK', '0')}"  # each process has its own
        names += write_local_tasks(Path(local), made)
        paths.append(made)
    if not names:
        raise EvaluationError("there is nothing to score; name tasks of the harness (--tasks) or a folder (--local).")
    return names, paths


def plan_of(
    models: Mapping[str, str | Path], tasks: Sequence[str], local: str | Path | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """All that decides the answers, to know a stopped run by."""
    decisive = {key: value for key, value in options.items() if key not in ("batch_size", "device")}
    return json.loads(
        json.dumps(
            {
                **{name: str(path) for name, path in models.items()},
                **{f"files of {name}": _files(Path(path), WEIGHTS) for name, path in models.items()},
                "tasks": list(tasks),
                "local": _files(Path(local), ("*.jsonl", "*.txt")) if local else None,
                **decisive,
            },
            default=str,
        )
    )


def _files(folder: Path, patterns: Sequence[str]) -> list[tuple[str, int, int]]:
    """Name, size and time of change of a folder's files."""
    found = {path for pattern in patterns for path in folder.glob(pattern)} if folder.is_dir() else ()
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(found)]


def _begin(work: Path, plan: Mapping[str, Any], resume: bool) -> None:
    """Make the folder of a new run, or check that a stopped one is to be gone on with."""
    if not is_first_process():
        return
    path = work / PLAN
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if not resume:
            raise EvaluationError(
                f"{work} is what a stopped run has left: go on with --resume, or remove it to start again."
            )
        if before != plan:
            raise EvaluationError(
                f"the run that stopped was another one: {differing(plan, before)} differ. Give what it had, or "
                f"remove {work} to start again."
            )
        return
    try:
        work.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(plan), encoding="utf-8")
    except OSError as error:
        raise EvaluationError(f"{work} cannot be written ({error.strerror}); name another --output.") from error


def _conclude(
    models: Mapping[str, str | Path],
    results: Mapping[str, Results],
    beginning: str,
    text: str | Path | None,
    progress: bool,
    options: Mapping[str, Any],
) -> Study:
    """Compare, inspect, measure; write it all down where there is a place for it."""
    say = options.get("say") or (lambda line: None)
    rows = compare(results["dense"], results["finedeep"], options.get("seed", 0))
    verdicts = [sentence_of(row) for row in rows if row.main]
    parts = [table_of(rows), "\n".join(verdicts), beginning]
    comparison: dict[str, Any] = {
        "models": {name: str(path) for name, path in models.items()},
        "tasks": [row.as_dict() for row in rows],
        "verdicts": verdicts,
        "n-shot": results["finedeep"]["n-shot"],
        "contexts": beginning,
        "options": {key: value for key, value in options.items() if key not in NOT_TOLD},
        "versions": {"finedeep": __version__, **{package: version(package) for package in PACKAGES}},
        "machine": platform.machine(),
    }
    how = {"device": options.get("device"), "dtype": options.get("dtype", "auto")}
    if text:
        say(f"Looking at activations and gates on {text}")
        comparison["inspection"] = {
            name: inspect(path, text, progress=progress, **how) for name, path in models.items()
        }
        parts.append(inspection.table_of(comparison["inspection"]))
    if output := options.get("output"):
        say("Measuring speed and memory, both models in turn")
        comparison["cost"] = cost.costs_of(models, **how)
        parts.append(cost.table_of(comparison["cost"]))
        write_whole(Path(output) / COMPARISON, json.dumps(comparison, indent=1, default=str))
        write_whole(Path(output) / "comparison.md", "\n\n".join(parts) + "\n")
        write_report(Path(output), comparison, rows)
    return Study(results, "\n\n".join(parts), comparison)
