"""A model beside its dense baseline: benchmark scores compared sample by sample, sparsity, cost, one page of it all."""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..convert.card import COMPARISON
from ..convert.destination import differing
from ..convert.whole_file import write_whole
from . import cost, inspection
from .comparison import compare, notes_of, sentence_of, table_of
from .errors import EvaluationError
from .harness import evaluate, save_results
from .identity import files_in, files_of, versions
from .inspection import check_text, inspect
from .local_tasks import write_local_tasks
from .processes import is_first_process, is_needed, process_number, share
from .report import write_report
from .scores import Results
from .table import side_by_side
from .tokenization import beginning_of, check_same_tokenizer, load_tokenizer

UNFINISHED, PLAN = ".unfinished", "plan.json"
NOT_TOLD = ("say", "output", "resume", "answers")  # of the options: they decide nothing


@dataclass(frozen=True)
class Study:
    """What came out: the harness's results of each model; all in Markdown; what `comparison.json` holds."""

    results: Mapping[str, Results]
    markdown: str
    comparison: Mapping[str, Any] | None = None


def score(model: str | Path, tasks: Sequence[str] = (), **options: Any) -> Study | None:
    """Score one model. The options are those of `study`, but for `text`."""
    if options.pop("text", None):
        raise EvaluationError("--text compares a model with its --baseline; `finedeep inspect` looks at one alone.")
    options.pop("progress", None)
    if not is_needed():
        return None
    beginning = beginning_of(model)
    results = _score({"model": model}, tasks, **options)
    if not is_first_process():
        return None
    if output := options.get("output"):
        save_results(results["model"], Path(output))
        _remove_work(Path(output))
    return Study(results, f"{side_by_side(results)}\n\n{beginning}")


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
    if not is_needed():
        return None
    beginning = check_same_tokenizer(baseline, model)
    if text:
        check_text(Path(text))
    results = _score(models, tasks, **options)
    if not is_first_process():
        return None
    return _conclude(models, results, beginning, text, progress, options)


def _score(
    models: Mapping[str, str | Path],
    tasks: Sequence[str],
    *,
    local: str | Path | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    include_path: str | Path | None = None,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> dict[str, Results]:
    """The harness's results by model. What a stopped run needs is kept in the output until all is done."""
    say = say if say and is_first_process() else (lambda line: None)
    if resume and not output:
        raise EvaluationError("--resume goes on with what is in an --output folder; name it.")
    results = {}
    with ExitStack() as stack:
        if output:
            work = Path(output) / UNFINISHED
            _begin_together(work, plan_of(models, tasks, local, {"include_path": include_path, **options}), resume)
        else:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="finedeep-eval-")))
        names, paths = tasks_of(tasks, local, include_path, work, next(iter(models.values())))
        for name, path in models.items():
            say(f"Scoring {path}")
            results[name] = evaluate(path, names, include_path=paths, work=work / name, say=say, **options)
    return results


def _remove_work(output: Path) -> None:
    """In one step: half of it would be taken for a run to go on with."""
    gone = output / f"{UNFINISHED}.gone"
    (output / UNFINISHED).rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def tasks_of(
    tasks: Sequence[str], local: str | Path | None, include_path: str | Path | None, work: Path, model: str | Path
) -> tuple[list[str], list[Path]]:
    """Names of all tasks, and the folders that define them.

    Those of a local folder are written into `work`, for `model` and all others with its tokenizer.
    """
    names, paths = list(tasks), [Path(include_path)] if include_path else []
    if local:
        made = work / f"tasks-{process_number()}"  # each process has its own
        names += write_local_tasks(Path(local), made, load_tokenizer(model))
        paths.append(made)
    if not names:
        raise EvaluationError("there is nothing to score; name tasks of the harness (--tasks) or a folder (--local).")
    return names, paths


def plan_of(
    models: Mapping[str, str | Path], tasks: Sequence[str], local: str | Path | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """All that decides the answers, to know a stopped run by."""
    revision = (options.get("model_args") or {}).get("revision")
    decisive = {key: value for key, value in options.items() if key not in ("batch_size", "device", "answers")}
    plan = {
        **{name: str(path) for name, path in models.items()},
        **{f"files of {name}": files_of(path, revision=revision) for name, path in models.items()},
        "tasks": list(tasks),
        "local": files_in(Path(local), ("*.jsonl", "*.txt")) if local else None,
        "versions": versions(),
        **decisive,
    }
    return json.loads(json.dumps(plan, default=str))


def _begin_together(work: Path, plan: Mapping[str, Any], resume: bool) -> None:
    """The first process begins, and all of them stop where it must not."""
    refusal = None
    if is_first_process():
        try:
            _begin(work, plan, resume)
        except EvaluationError as error:
            refusal = str(error)
    if refusal := share(refusal):
        raise EvaluationError(refusal)


def _begin(work: Path, plan: Mapping[str, Any], resume: bool) -> None:
    """Make the folder of a new run, or check that a stopped one is to be gone on with."""
    path = work / PLAN
    if path.exists():
        if not resume:
            raise EvaluationError(
                f"{work} is what a stopped run has left: go on with --resume, or remove it to start again."
            )
        before = json.loads(path.read_text(encoding="utf-8"))
        if before != plan:
            raise EvaluationError(
                f"the run that stopped was another one: {differing(plan, before)} differ. Give what it had, or remove "
                f"{work} to start again."
            )
        return
    try:
        shutil.rmtree(work, ignore_errors=True)  # answers of nobody knows what
        work.mkdir(parents=True)
        write_whole(path, json.dumps(plan))
    except OSError as error:
        raise EvaluationError(f"{work} cannot be written ({error.strerror}); name another --output.") from error


def _note_on_dtypes(dtypes: Mapping[str, str]) -> list[str]:
    if len(set(dtypes.values())) == 1:
        return []
    scored = ", ".join(f"{name} in {dtype}" for name, dtype in dtypes.items())
    return [f"Two dtypes are compared: {scored}. --dtype float32 scores both in one."]


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
    dtypes = {name: str(found["config"]["model_dtype"]).removeprefix("torch.") for name, found in results.items()}
    notes = [*notes_of(rows), *_note_on_dtypes(dtypes), beginning]
    parts = [table_of(rows), "\n".join(verdicts), *notes]
    comparison: dict[str, Any] = {
        "models": {name: str(path) for name, path in models.items()},
        "tasks": [row.as_dict() for row in rows],
        "verdicts": verdicts,
        "n-shot": results["finedeep"]["n-shot"],
        "notes": notes,
        "dtypes": dtypes,
        "options": {key: value for key, value in options.items() if key not in NOT_TOLD},
        "versions": versions(),
    }
    how = {"device": options.get("device"), "dtype": options.get("dtype", "auto")}
    output = Path(options["output"]) if options.get("output") else None
    looks: dict[str, tuple[str, Callable[[], Any], Callable[[Any], str]]] = {}
    if text:
        looks["inspection"] = (
            f"Looking at activations and gates on {text}",
            lambda: {name: inspect(path, text, progress=progress, **how) for name, path in models.items()},
            inspection.table_of,
        )
    if output:
        looks["cost"] = (
            "Measuring speed and memory, both models in turn",
            lambda: cost.costs_of(models, **how),
            cost.table_of,
        )
        for found in results.values():
            save_results(found, output)
    for name, (line, look, table) in looks.items():
        if options.get("model_args"):  # which these do not know of
            parts.append(f"{name}: not measured with --set")
            continue
        say(line)
        try:
            comparison[name] = look()
        except Exception as error:  # scores that took hours are worth more than this
            parts.append(f"{name}: not measured ({type(error).__name__}: {' '.join(str(error).split())[:300]})")
        else:
            parts.append(table(comparison[name]))
    markdown = "\n\n".join(parts)
    if output:
        write_whole(output / COMPARISON, json.dumps(comparison, indent=1, default=str))
        write_whole(output / "comparison.md", f"{markdown}\n")
        write_report(output, comparison, rows)
        _remove_work(output)
    return Study(results, markdown, comparison)
