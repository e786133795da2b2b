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

from ..version import __version__
from .errors import EvaluationError
from .scores import Results

COMPARISON = "comparison.json"
UNFINISHED, PLAN = ".unfinished", "plan.json"
PACKAGES = ("torch", "transformers", "lm_eval", "scipy")
WEIGHTS = ("*.safetensors", "config.json", "tokenizer.json")


@dataclass(frozen=True)
class Study:
    """What came out. `comparison` is what `comparison.json` holds; `markdown` says it in tables and lines."""

    results: Mapping[str, Results]
    comparison: Mapping[str, Any]
    markdown: str


def is_first_process() -> bool:
    """Whether this is the process that writes and speaks, under `accelerate launch` too."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


def study(
    model: str | Path,
    baseline: str | Path,
    tasks: Sequence[str] = (),
    *,
    local: str | Path | None = None,
    text: str | Path | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    say: Callable[[str], None] | None = None,
    progress: bool = True,
    **options: Any,
) -> Study | None:
    """Score a model and its baseline on the same samples, and compare.

    Args:
        model: a local folder or a Hub id of a Finedeep model.
        baseline: of the dense one.
        tasks: names of the harness's tasks or groups.
        local: a folder of questions and texts, which become tasks too.
        text: a text file on which to look at sparsity and gates; None leaves that out.
        output: a folder for the harness's results and samples, `comparison.json`, `comparison.md`, figures and
            `report.html`. While the run is at work its answers are kept there, in `.unfinished`. None: nothing is
            written, and costs are not measured.
        resume: whether to go on with what a stopped run of the same study has left.
        say: is given lines about what is being done.
        progress: whether to show bars on stderr.
        options: those of `evaluate`.

    Returns:
        What came out; None in the processes of `accelerate launch` but the first.

    Raises:
        EvaluationError: the models, tasks, data or options do not fit.
    """
    from .comparison import compare
    from .harness import evaluate
    from .tokenization import check_same_tokenizer

    say = say or (lambda line: None)
    models = {"dense": baseline, "finedeep": model}
    beginning = check_same_tokenizer(baseline, model)
    with ExitStack() as stack:
        if output:
            work = Path(output) / UNFINISHED
            _begin(work, plan_of(models, tasks, local, options), resume)
        else:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="finedeep-eval-")))
        wanted, paths = tasks_of(tasks, local, options.pop("include_path", None), work)
        results = {}
        for name, path in models.items():
            say(f"Scoring {name}: {path}")
            kept = work / name
            kept.mkdir(parents=True, exist_ok=True)
            results[name] = evaluate(path, wanted, include_path=paths, output=output, work=kept, say=say, **options)
        if not is_first_process():
            return None
        rows = compare(results["dense"], results["finedeep"], options.get("seed", 0))
        return _conclude(models, rows, results, beginning, text, output, options, say, progress)


def tasks_of(
    tasks: Sequence[str], local: str | Path | None, include_path: str | Path | None, work: Path
) -> tuple[list[str], list[Path]]:
    """Names of all tasks, and the folders that define them; those of a local folder are written into `work`."""
    from .local_tasks import write_local_tasks

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
            different = ", ".join(sorted(key for key in {*plan, *before} if plan.get(key) != before.get(key)))
            raise EvaluationError(
                f"the run that stopped was another one: {different} differ. Give what it was started with, or remove "
                f"{work} to start again."
            )
        return
    try:
        work.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(plan), encoding="utf-8")
    except OSError as error:
        raise EvaluationError(f"{work} cannot be written ({error.strerror}); name another --output.") from error


def _conclude(
    models: Mapping[str, str | Path],
    rows: Sequence[Any],
    results: Mapping[str, Results],
    beginning: str,
    text: str | Path | None,
    output: str | Path | None,
    options: Mapping[str, Any],
    say: Callable[[str], None],
    progress: bool,
) -> Study:
    from .comparison import sentence_of, table_of
    from .inspection import inspect
    from .inspection import table_of as inspection_table

    verdicts = [sentence_of(row) for row in rows if row.main]
    parts = [table_of(rows), "\n".join(verdicts), beginning]
    comparison: dict[str, Any] = {
        "models": {name: str(path) for name, path in models.items()},
        "tasks": [row.as_dict() for row in rows],
        "verdicts": verdicts,
        "n-shot": results["finedeep"]["n-shot"],
        "contexts": beginning,
        "options": json.loads(json.dumps(options, default=str)),
        "versions": {"finedeep": __version__, **{package: version(package) for package in PACKAGES}},
        "machine": platform.machine(),
    }
    how = {"device": options.get("device"), "dtype": options.get("dtype", "auto")}
    if text:
        say(f"Inspecting activations and gates on {text}")
        comparison["inspection"] = {
            name: inspect(path, text, progress=progress, **how) for name, path in models.items()
        }
        parts.append(inspection_table(comparison["inspection"]))
    if output:
        from .cost import costs_of
        from .cost import table_of as cost_table
        from .report import write_report

        say("Measuring speed and memory, both models in turn")
        comparison["cost"] = costs_of(models, **how)
        parts.append(cost_table(comparison["cost"]))
        folder = Path(output)
        markdown = "\n\n".join(parts) + "\n"
        _write(folder / COMPARISON, json.dumps(comparison, indent=1))
        _write(folder / "comparison.md", markdown)
        write_report(folder, comparison, rows)
        shutil.rmtree(folder / UNFINISHED)
    return Study(results, comparison, "\n\n".join(parts))


def _write(path: Path, content: str) -> None:
    """Whole or not at all."""
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_text(content, encoding="utf-8")
    scratch.replace(path)
