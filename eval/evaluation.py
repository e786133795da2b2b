"""A model beside its dense baseline: benchmark scores compared sample by sample, sparsity, cost, one page of it all."""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finedeep_files.errors import one_line
from finedeep_files.evaluation_options import StudyOptions
from finedeep_files.masking import masked
from finedeep_files.names import COMPARISON
from finedeep_files.options import takes_options
from finedeep_files.processes import is_first_process, is_needed, process_number, share
from finedeep_files.versions import versions
from finedeep_files.whole_file import write_whole
from finedeep_files.working_folder import WorkingFolder

from .compare.comparison import compare, notes_of, sentence_of, table_of
from .compare.scores import Results
from .compare.table import side_by_side
from .errors import EvaluationError
from .inspect import inspection
from .inspect.inspection import check_text, inspect
from .output import EVALUATED, MARKDOWN, name_of
from .report import cost
from .report.page import write_report
from .scoring.chat_template import BEGINNING, chat_template_of, check_same_template
from .scoring.harness import evaluate, save_results
from .scoring.local_tasks import write_local_tasks
from .scoring.model_identity import PACKAGES, files_in, files_of, weights_of
from .scoring.tokenizer_check import beginning_of, check_same_tokenizer, load_tokenizer

PLACES = ("output", "resume", "overwrite")  # the options that say where to write
NOT_TOLD = ("say", "answers", *PLACES)  # of the options: they decide nothing


@dataclass(frozen=True)
class Study:
    """What came out: the harness's results of each model; all in Markdown; what `comparison.json` holds."""

    results: Mapping[str, Results]
    markdown: str
    comparison: Mapping[str, Any] | None = None


@takes_options(StudyOptions)
def score(model: str | Path, tasks: Sequence[str] = (), **options: Any) -> Study | None:
    """Score one model. The options are those of `study`, but for `text`."""
    if options.pop("text", None):
        raise EvaluationError("--text compares a model with its --baseline; `finedeep inspect` looks at one alone.")
    options.pop("progress", None)
    if not is_needed():
        return None
    check_output(**{name: options.get(name) for name in PLACES})
    beginning = beginning_of(model)
    if template := options.get("apply_chat_template"):
        chat_template_of(model, template)
        beginning = BEGINNING
    with _working({"model": model}, tasks, options) as (work, output):
        results = _score({"model": model}, tasks, work, options)
        if not is_first_process():
            return None
        if output:
            save_results(results["model"], output)
    return Study(results, f"{side_by_side(results)}\n\n{beginning}")


@takes_options(StudyOptions)
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
        options: the fields of `StudyOptions`. While a run with `output` is at work its answers are kept beside it, in
            `.NAME.unfinished`; `overwrite` replaces the files of a finished run, as its `finedeep_results.json` lists
            them.

    Returns:
        What came out; None in the processes of `accelerate launch` but the first.

    Raises:
        EvaluationError: the models, tasks, data or options do not fit, or `output` is not empty.
    """
    models = {"dense": baseline, "finedeep": model}
    if not is_needed():
        return None
    check_output(**{name: options.get(name) for name in PLACES})
    beginning = check_same_tokenizer(baseline, model)
    if template := options.get("apply_chat_template"):
        check_same_template(baseline, model, template)
        beginning = BEGINNING
    if text:
        check_text(Path(text))
    with _working(models, tasks, options) as (work, output):
        results = _score(models, tasks, work, options)
        if not is_first_process():
            return None
        return _conclude(models, results, beginning, text, progress, output, options)


def check_output(output: str | Path | None, resume: bool | None, overwrite: bool | None) -> None:
    """Raise `EvaluationError` where results cannot be written as asked."""
    if output is None and (resume or overwrite):
        raise EvaluationError("--resume and --overwrite are about what is in an --output folder; name it.")
    if output is not None:
        WorkingFolder(Path(output), EvaluationError, bool(resume), bool(overwrite)).check()


@contextmanager
def _working(
    models: Mapping[str, str | Path], tasks: Sequence[str], options: Mapping[str, Any]
) -> Iterator[tuple[Path, Path | None]]:
    """A folder to work in, and one in it for results, which become the output at the end.

    The first process begins, and all of them stop where it must not.
    """
    if not options.get("output"):
        with tempfile.TemporaryDirectory(prefix="finedeep-eval-") as place:
            yield Path(place), None
        return
    resume, overwrite = (bool(options.get(name)) for name in ("resume", "overwrite"))
    work = WorkingFolder(Path(options["output"]), EvaluationError, resume, overwrite)
    decisive = {key: value for key, value in options.items() if key not in (*PLACES, "say", "local")}
    with ExitStack() as stack:
        refusal = None
        if is_first_process():
            try:
                stack.enter_context(work.begun(EVALUATED, plan_of(models, tasks, options.get("local"), decisive)))
            except EvaluationError as error:
                refusal = str(error)
        if refusal := share(refusal):
            raise EvaluationError(refusal)
        yield work.path, work.result


def _score(
    models: Mapping[str, str | Path], tasks: Sequence[str], work: Path, options: Mapping[str, Any]
) -> dict[str, Results]:
    """The harness's results by model. What a stopped run needs is kept in `work`."""
    given = {key: value for key, value in options.items() if key not in PLACES}
    say, local, include_path = (given.pop(name, None) for name in ("say", "local", "include_path"))
    say = say if say and is_first_process() else (lambda line: None)
    names, paths = tasks_of(tasks, local, include_path, work, next(iter(models.values())))
    results = {}
    for name, path in models.items():
        say(f"Scoring {path}")
        results[name] = evaluate(path, names, include_path=paths, work=work / name, say=say, **given)
    return results


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
    revision = _revision(options)
    decisive = {key: value for key, value in options.items() if key not in ("batch_size", "device", "answers")}
    plan = {
        **{name: str(path) for name, path in models.items()},
        **{f"files of {name}": files_of(path, revision=revision) for name, path in models.items()},
        "tasks": list(tasks),
        "local": files_in(Path(local), ("*.jsonl", "*.txt")) if local else None,
        "versions": versions(*PACKAGES),
        **decisive,
    }
    return json.loads(json.dumps(masked(plan), default=str))


def _revision(options: Mapping[str, Any]) -> str | None:
    """Of Hub ids, as --set gives it."""
    return (options.get("model_args") or {}).get("revision")


def _note_on_dtypes(dtypes: Mapping[str, str]) -> list[str]:
    if len(set(dtypes.values())) == 1:
        return []
    scored = ", ".join(f"{name} in {dtype}" for name, dtype in dtypes.items())
    return [f"Two dtypes are compared: {scored}. --dtype float32 scores both in one."]


def _looks(
    models: Mapping[str, str | Path],
    text: str | Path | None,
    progress: bool,
    output: Path | None,
    options: Mapping[str, Any],
) -> dict[str, tuple[str, Callable[[], Any], Callable[[Any], str]]]:
    """What is measured beside scores: a line to say before, the measurement, and the table of what it finds."""
    how = {"device": options.get("device"), "dtype": options.get("dtype", "auto")}
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
    return looks


def _conclude(
    models: Mapping[str, str | Path],
    results: Mapping[str, Results],
    beginning: str,
    text: str | Path | None,
    progress: bool,
    output: Path | None,
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
        "weights": {name: weights_of(path, _revision(options)) for name, path in models.items()},
        "options": masked({key: value for key, value in options.items() if key not in NOT_TOLD}),
        "versions": versions(*PACKAGES),
    }
    if output:
        alike = len({name_of(path) for path in models.values()}) < len(models)
        for name, found in results.items():
            save_results(found, output, name if alike else None)
    for name, (line, look, table) in _looks(models, text, progress, output, options).items():
        if options.get("model_args"):  # which these do not know of
            parts.append(f"{name}: not measured with --set")
            continue
        say(line)
        try:
            comparison[name] = look()
        except Exception as error:  # scores that took hours are worth more than this
            parts.append(f"{name}: not measured ({type(error).__name__}: {one_line(error)})")
        else:
            parts.append(table(comparison[name]))
    markdown = "\n\n".join(parts)
    if output:
        write_whole(output / COMPARISON, json.dumps(comparison, indent=1, default=str))
        write_whole(output / MARKDOWN, f"{markdown}\n")
        write_report(output, comparison, rows)
    return Study(results, markdown, comparison)
