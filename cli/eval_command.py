"""Score a model with lm-evaluation-harness, and compare it with its dense baseline sample by sample.

The scores are those of the plain command
  lm_eval run --model hf --model_args pretrained=MODEL,trust_remote_code=True --tasks ...

With --baseline each task has a verdict: better, worse, or not distinguishable at this size, from the same samples
(paired bootstrap, McNemar's exact or a permutation test, Holm's correction over tasks). --output makes a folder with
the harness's own results and samples and, with --baseline, comparison.json, comparison.md, figures and a page,
report.html, with speed and memory of both models.

--resume continues a stopped run with --output: tasks that are done are not asked again, and of the one that was
stopped only what is left. That one begins again where it samples, or where there are several processes. With --answers
that holds for other runs too: one dense baseline answers once for all models that are compared with it.

For several GPUs, whose number may be another one with --resume (tasks with examples are then asked again):
  accelerate launch -m finedeep_cli eval ...

examples:
  finedeep eval ./llama-finedeep --baseline ./llama --tasks finedeep_suite --text text.txt --output ./results
  finedeep eval ./llama-finedeep --baseline ./llama --tasks arc_easy,piqa --answers ./answers
  finedeep eval ./llama-finedeep --baseline ./llama --local ./questions            *.jsonl and *.txt, no network
  finedeep eval ./llama-finedeep --tasks my_task --include-path ./my_tasks
  finedeep eval ./llama-finedeep --tasks hellaswag --set parallelize=true          one model over all GPUs

In --local each line of a *.jsonl file is an object with question, choices and answer (the right one's place, from 0);
or question and answer (a line to be generated, word for word); or context and word; or text. A *.txt file is scored in
passages of 1,000 characters.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from finedeep_files.evaluation_options import StudyOptions
from finedeep_files.inputs import InputError, check_folder, check_model, check_text
from finedeep_files.working_folder import WorkingFolder

from .argument_types import batch, device, names, non_negative_int
from .option_arguments import add_options, add_restart
from .task_names import check_tasks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `finedeep eval`."""
    option = parser.add_argument
    option("model", metavar="MODEL", help="a folder or a Hub id, Finedeep or dense")
    option("--tasks", type=names, default=[], metavar="A,B", help="the harness's tasks or groups, or finedeep_suite")
    option("--baseline", metavar="DENSE", help="the dense model, to be compared with on the same samples")
    option("--text", metavar="FILE", help="with --baseline: a text on which to compare sparsity and gates")
    add_options(parser, StudyOptions, batch_size=batch, device=device, seed=non_negative_int)
    add_restart(parser, "evaluation", where="--output")
    option("--quiet", action="store_true", help="no progress, only the result")


def _check(arguments: argparse.Namespace) -> None:
    """Raise `InputError` or `DestinationError` for what can be seen before anything is imported or loaded."""
    if arguments.output:
        WorkingFolder(Path(arguments.output), resume=arguments.resume, overwrite=arguments.overwrite).check()
    elif arguments.resume or arguments.overwrite:
        raise InputError("--resume and --overwrite are about what is in an --output folder; name it.")
    models = [model for model in (arguments.model, arguments.baseline) if model]
    for model in models:
        check_model(model)
    if "revision" in dict(arguments.model_args) and all(Path(model).is_dir() for model in models):
        raise InputError(f"{' and '.join(models)}: a folder has no revisions; leave out --set revision.")
    if not arguments.tasks and not arguments.local:
        raise InputError("there is nothing to score; name tasks of the harness (--tasks) or a folder (--local).")
    if arguments.text and not arguments.baseline:
        raise InputError("--text compares a model with its --baseline; `finedeep inspect` looks at one model alone.")
    if arguments.fewshot_as_multiturn and not arguments.apply_chat_template:
        raise InputError(
            "--fewshot-as-multiturn makes turns of a conversation of the examples, for which --apply-chat-template is "
            "needed."
        )
    if arguments.local:
        check_folder(arguments.local, "questions (*.jsonl) or texts (*.txt)", ("*.jsonl", "*.txt"))
    if arguments.text:
        check_text(arguments.text)
    if arguments.include_path:
        check_folder(arguments.include_path, "definitions of tasks")
    check_tasks(arguments.tasks, arguments.include_path)


def run(arguments: argparse.Namespace) -> Any:
    """Score, compare and print."""
    _check(arguments)
    given = vars(arguments).copy()
    quiet, model, baseline = given.pop("quiet"), given.pop("model"), given.pop("baseline")
    given["model_args"] = dict(given["model_args"])
    if not quiet:
        given["say"] = lambda line: print(line, file=sys.stderr, flush=True)
    from finedeep.eval.scoring.harness import require_harness

    require_harness()
    from finedeep.convert.code_files import advice
    from finedeep.eval.evaluation import score, study
    from finedeep_files.loading_bars import without_bars
    from finedeep_files.processes import is_first_process

    if is_first_process() and (line := advice(model, given["model_args"].get("revision"))):
        print(line, file=sys.stderr, flush=True)
    given["progress"] = not quiet
    with without_bars(quiet):
        done = study(model, baseline, **given) if baseline else score(model, **given)
    if done is None:
        return None
    print(done.markdown)
    if arguments.output:
        print(f"\nresults, samples{' and report.html' if baseline else ''}: {arguments.output}")
    return done.comparison or done.results["model"]["results"]
