"""Run lm-evaluation-harness in this process, on one model or on two side by side."""

import contextlib
import difflib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import EvaluationError

Results = dict[str, Any]


def require_harness() -> Any:
    """Import lm-eval, its log lines silenced. Raises `EvaluationError` where it is not installed."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import lm_eval
    except ImportError as error:
        raise EvaluationError(
            "lm-evaluation-harness is not installed. Install it with: pip install 'finedeep[eval]'"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


def evaluate(
    model: str | Path,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | str = 8,
    device: str | None = None,
    dtype: str = "auto",
    max_length: int | None = None,
    output: str | Path | None = None,
    seed: int = 1234,
) -> Results:
    """Score one model with lm-evaluation-harness.

    The call is the harness's own `simple_evaluate` with its `hf` model, so that the scores are the ones that
    `lm_eval run --model hf --model_args pretrained=MODEL,trust_remote_code=True` reports.

    Args:
        model: a local folder or a Hub id, dense or Finedeep. No code out of it is run.
        tasks: names of the harness's tasks or groups, or of those in `include_path`.
        include_path: a folder with task definitions of your own.
        num_fewshot: examples before each question; None leaves it to the task.
        limit: how many samples of each task; None for all.
        batch_size: a number, or "auto".
        device: such as "cpu" or "cuda:0"; None picks a GPU where there is one.
        dtype: "auto" for the checkpoint's own, or such as "float32".
        max_length: tokens of context and answer together; None for the model's own limit.
        output: a folder for the harness's results JSON.
        seed: for the choice of few-shot examples and bootstrap samples.

    Returns:
        The harness's results, without the samples.

    Raises:
        EvaluationError: lm-eval is missing, a task is unknown, or the model cannot be loaded.
    """
    lm_eval = require_harness()
    import torch
    from lm_eval.loggers import EvaluationTracker

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    manager = _task_manager(tasks, include_path)
    tracker = EvaluationTracker(output_path=str(output)) if output else None
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the harness prints its progress; stdout is for the scores
            results = lm_eval.simple_evaluate(
                model="hf",
                # Importing this package has registered Finedeep: no code out of a model's folder need be trusted.
                model_args={"pretrained": str(model), "dtype": dtype, "max_length": max_length},
                tasks=list(tasks),
                task_manager=manager,
                num_fewshot=num_fewshot,
                limit=limit,
                batch_size=batch_size,
                device=device,
                evaluation_tracker=tracker,
                log_samples=tracker is not None,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except OSError as error:
        raise EvaluationError(f"{model} on {', '.join(tasks)}: {' '.join(str(error).split())}") from error
    except AssertionError as error:
        if "continuation_enc" not in traceback.format_exc():
            raise
        raise EvaluationError(
            f"an answer in {', '.join(tasks)} has more tokens than {model} can take at once. --max-length raises the "
            "limit beyond the length that the model was trained for."
        ) from error
    samples = results.pop("samples", None)
    if tracker:
        tracker.save_results_aggregated(results=results, samples=samples)
        for task, task_samples in (samples or {}).items():
            tracker.save_results_samples(task_name=task, samples=task_samples)
    return results


def _task_manager(tasks: Sequence[str], include_path: str | Path | None) -> Any:
    """The harness's index of tasks. Reading its thousands of own definitions takes seconds, so only where wanted."""
    from lm_eval.tasks import TaskManager

    if include_path:
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=str(include_path) if include_path else None)
    for task in tasks:
        if task not in manager.all_tasks:
            nearest = ", ".join(difflib.get_close_matches(task, manager.all_tasks, n=3)) or "none is near"
            raise EvaluationError(
                f"the harness has no task {task!r} (nearest: {nearest}). `lm-eval ls tasks` lists all; for tasks of "
                "your own name their folder with --include-path."
            )
    return manager
