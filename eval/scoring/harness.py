"""Run lm-evaluation-harness in this process, on one model."""

import contextlib
import difflib
import io
import logging
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from finedeep_files.errors import one_line
from finedeep_files.evaluation_options import EvaluationOptions
from finedeep_files.loading_bars import without_loading_bars
from finedeep_files.masking import masked
from finedeep_files.options import takes_options

from ..compare.scores import Results, scores_of
from ..errors import EvaluationError, cannot_load
from ..output import name_of
from .answer_cache import Answers, KeptAnswers, answering, answers_of
from .chat_template import chat_template_of
from .model_identity import identity_of

# What --set cannot set, and how it is set instead.
OWN_OPTIONS = {
    "pretrained": "it is the model itself",
    **{
        name: f"use --{name.replace('_', '-')} ({name}=)"
        for name in (
            *("tasks", "include_path", "num_fewshot", "limit", "batch_size", "device", "dtype", "max_length", "seed"),
            *("apply_chat_template", "fewshot_as_multiturn", "system_instruction"),
        )
    },
    **dict.fromkeys(
        ("tokenizer", "add_bos_token", "prefix_token_id"), "a model is scored with its own tokenizer, as that is set up"
    ),
}
# Tokens that the harness puts in by itself: for which requests, what for, and which; None: none.
OWN_TOKENS: Mapping[str, tuple[str, Callable[[Any], int | None]]] = {
    "loglikelihood_rolling": ("begins texts with", lambda lm: lm.prefix_token_id),
    "generate_until": (
        "fills batches (--batch-size 1 has nothing to fill) up with",
        lambda lm: None if lm.batch_size == 1 else lm.tokenizer.pad_token_id,
    ),
}
SUITE = Path(__file__).parent / "tasks"
MOST_ON_A_CPU = 32  # sequences in a batch: more of them are no faster there
SHARE_OF_MEMORY = 4  # one part of what is free may go into a batch's logits
ROUGH_BOOTSTRAP = 1000  # resamples for a perplexity's standard error, where the harness's 100,000 are still to come
COPIES = 3  # of the logits: in the model's dtype, in float32, and their log-softmax


def require_harness() -> None:
    """Import lm-eval, its log lines silenced. Raises `EvaluationError` where it, or what goes with it, is missing."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import jinja2  # noqa: F401
        import lm_eval  # noqa: F401
        import matplotlib  # noqa: F401
        import psutil  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        raise EvaluationError(
            f"{error.name} is not installed. Install it with: pip install 'finedeep[eval]'"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


@takes_options(EvaluationOptions)
def evaluate(
    model: str | Path,
    tasks: Sequence[str],
    *,
    output: str | Path | None = None,
    work: str | Path | None = None,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> Results:
    """Score one model with lm-evaluation-harness, one task after the other.

    The calls are the harness's own `simple_evaluate` with its `hf` model, so that the scores are the ones that
    `lm_eval run --model hf --model_args pretrained=MODEL,trust_remote_code=True` reports, groups' averages included.
    Under `accelerate launch` each process calls this, and the harness shares out the samples over the GPUs.

    Args:
        model: a local folder or a Hub id, dense or Finedeep. No code out of it is run.
        tasks: names of the harness's tasks or groups, or of those in `include_path`.
        output: a folder for the harness's results and samples.
        work: a folder in which every answer is kept as soon as it is there, so that a stopped run continues with
            the next question, and each task's scores as soon as it is done.
        say: is given a line as each task is done.
        options: the fields of `EvaluationOptions`. A batch that turns out too large is halved. `answers` is a folder
            where answers stay: this model, with the same options and versions, is not asked again what it has answered
            there.

    Returns:
        The harness's results, with the samples. In the processes of `accelerate launch` but the first: {}.

    Raises:
        EvaluationError: lm-eval is missing, a task is unknown or has no data, the model does not load or is broken.
    """
    require_harness()
    o, say = EvaluationOptions(**options), say or (lambda line: None)
    _check_options(o)
    wanted = _load_tasks(tasks, o.include_path)
    _tell_of_examples(wanted, o.num_fewshot, say)
    own = {"dtype": o.dtype, "max_length": o.max_length, **(o.model_args or {})}
    lm = _load_model({"pretrained": str(model), **own}, o.batch_size, o.device)
    _check_logits(lm, model)
    _check_tokens(lm, model, wanted)
    if o.apply_chat_template:
        # Of several, the harness would record the one that was asked for and apply the default.
        lm.tokenizer.chat_template = chat_template_of(model, o.apply_chat_template, lm.tokenizer)
    with contextlib.ExitStack() as stack:
        folder = Path(work or stack.enter_context(tempfile.TemporaryDirectory(prefix="finedeep-eval-")))
        cache = Path(o.answers) / identity_of(model, {"seed": o.seed, **own}) if o.answers else None
        kept = KeptAnswers(folder, list(wanted.tasks), lm, cache)
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # where the harness shows its progress
        stack.enter_context(_quick_side_jobs())
        results = _ask(lm, model, wanted, kept, _how(o, wanted), say)
    if not results:
        return {}
    results["config"] |= _prompts(o)
    arguments = {"pretrained": str(model), **own}
    results["config"] |= {"model": "hf", "model_args": arguments, "batch_size": o.batch_size, "use_cache": None}
    if output:
        save_results(results, Path(output))
    return results


def _check_options(o: EvaluationOptions) -> None:
    """Raise `EvaluationError` for an option that cannot be met."""
    for name in sorted(OWN_OPTIONS.keys() & (o.model_args or {}).keys()):
        raise EvaluationError(f"{name} is no argument of the harness's hf model that can be set: {OWN_OPTIONS[name]}.")
    if isinstance(o.seed, bool) or not isinstance(o.seed, int) or not 0 <= o.seed < 2**32:
        raise EvaluationError(f"seed={o.seed!r} is not a whole number from 0 to {2**32 - 1}.")
    if o.fewshot_as_multiturn and not o.apply_chat_template:
        raise EvaluationError(
            "--fewshot-as-multiturn makes turns of a conversation of the examples, for which --apply-chat-template is "
            "needed."
        )


def _prompts(o: EvaluationOptions) -> dict[str, Any]:
    """How questions become prompts, in the harness's words."""
    turns = bool(o.apply_chat_template) if o.fewshot_as_multiturn is None else o.fewshot_as_multiturn
    return {
        "apply_chat_template": o.apply_chat_template,
        "fewshot_as_multiturn": turns,
        "system_instruction": o.system_instruction,
    }


def _how(o: EvaluationOptions, wanted: "_Wanted") -> dict[str, Any]:
    """The harness's arguments beside model and tasks."""
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    return {
        **_prompts(o),
        "task_manager": wanted.manager,
        "num_fewshot": o.num_fewshot,
        "limit": o.limit,
        "log_samples": True,
        **dict.fromkeys(seeds, o.seed),
    }


def _ask(
    lm: Any,
    model: str | Path,
    wanted: "_Wanted",
    kept: KeptAnswers,
    how: Mapping[str, Any],
    say: Callable[[str], None],
) -> Results:
    """The harness's results: task by task, then all at once from the answers that are there."""
    results: Results = {}
    given: Answers = {}
    for i, (name, task) in enumerate(wanted.tasks.items(), start=1):
        rough = {} if wanted.at_once else {"bootstrap_iters": ROUGH_BOOTSTRAP}
        with _errors_of(model, [name]), answering(lm, kept.answers(name)):
            results = _simple_evaluate(lm, [task], {**how, **rough, "use_cache": kept.cache(name)}, say)
        given |= (mine := answers_of(task))
        everyones = lm.gather_object(mine)
        if results:
            _check_answers(results, name, model)
            kept.finish(name, results, everyones)
            say(f"[{i}/{len(wanted.tasks)}] {_summary(results)}")
    if wanted.at_once:
        return results
    # Groups' averages as the harness makes them; its bars would be full at once.
    with contextlib.redirect_stderr(io.StringIO()), answering(lm, given):
        return _simple_evaluate(lm, wanted.whole, how, say)


class _Wanted:
    """The tasks, loaded: one by one, and as they were asked for, in groups."""

    def __init__(self, manager: Any, tasks: Sequence[str]):
        self.manager = manager
        loaded = manager.load(list(tasks))
        self.tasks = loaded["tasks"]
        below = {child for children in loaded["group_map"].values() for child in children}
        groups = [group for name, group in loaded["groups"].items() if name not in below]
        self.whole = [*groups, *(task for name, task in self.tasks.items() if name not in below)]
        self.at_once = len(self.whole) == 1 and not groups


def _load_tasks(tasks: Sequence[str], include_path: str | Path | Sequence[str | Path] | None) -> _Wanted:
    """The tasks by the harness's index. Reading its own definitions, thousands, takes seconds: only where wanted."""
    from lm_eval.tasks import TaskManager

    paths = [include_path] if isinstance(include_path, (str, Path)) else list(include_path or [])
    manager = TaskManager(include_path=list(map(str, paths)), include_defaults=False)
    if not all(_is_whole(manager.task_index, task) for task in tasks):
        manager = TaskManager(include_path=[str(SUITE), *map(str, paths)])
    for task in tasks:
        if task not in manager.all_tasks:
            nearest = ", ".join(difflib.get_close_matches(task, manager.all_tasks, n=3)) or "none is near"
            raise EvaluationError(
                f"the harness has no task {task!r} (nearest: {nearest}). `lm-eval ls tasks` lists all; for tasks of "
                "your own name their folder with --include-path."
            )
    try:
        return _Wanted(manager, tasks)
    except Exception as error:  # what keeps a dataset from loading has many classes
        if "Duplicate task" in str(error):
            raise EvaluationError(f"{one_line(error)}; name one of them only.") from error
        raise EvaluationError(
            f"the data of {', '.join(tasks)} cannot be loaded ({type(error).__name__}: {one_line(error)}). A task's "
            "data come from the Hub, or out of its cache; --local takes questions and texts from a folder."
        ) from error


def _is_whole(index: Mapping[str, Any], name: str) -> bool:
    """Whether an index has a task, or a group and all that is in it."""
    if name not in index:
        return False
    members = (index[name].cfg or {}).get("task", [])
    return isinstance(members, str) or all(isinstance(m, str) and _is_whole(index, m) for m in members)


def _tell_of_examples(wanted: "_Wanted", num_fewshot: int | None, say: Callable[[str], None]) -> None:
    """The harness keeps a task's own 0, which is then not what was asked for."""
    kept = [name for name, task in wanted.tasks.items() if task.get_config("num_fewshot") == 0]
    if num_fewshot and kept:
        say(f"{num_fewshot} examples were asked for; these tasks have none by their own definition: {', '.join(kept)}")


def _load_model(arguments: Mapping[str, Any], batch_size: int | str, device: str | None) -> Any:
    """The harness's `hf` model. Raises `EvaluationError` whatever keeps it from being loaded."""
    import torch
    from lm_eval.api.registry import get_model

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = arguments["pretrained"]
    try:
        with without_loading_bars():
            # Importing this package has registered Finedeep: no code out of a model's folder need be trusted.
            lm = get_model("hf").create_from_arg_obj(dict(arguments), {"batch_size": batch_size, "device": device})
    except Exception as error:
        raise cannot_load(model, error) from error
    if batch_size == "auto" and lm.device.type == "cpu":
        lm.batch_size_per_gpu = _batch_for_memory(lm)
    return lm


def _batch_for_memory(lm: Any) -> int:
    """Sequences for which a CPU's memory is certain to do: where it runs out, the system kills the process."""
    import psutil

    bytes_each = COPIES * 4 * lm.max_length * lm.model.config.vocab_size
    fitting = psutil.virtual_memory().available // SHARE_OF_MEMORY // bytes_each
    return max(1, min(MOST_ON_A_CPU, fitting))


def _check_logits(lm: Any, model: str | Path) -> None:
    """Raise `EvaluationError` where the model's logits are not numbers: it would be scored, as if by chance."""
    import torch

    ids = torch.arange(16, device=lm.device)[None] % lm.model.config.vocab_size
    try:
        with torch.no_grad():
            broken = lm.model(ids).logits.isnan().any()
    except Exception as error:
        raise cannot_load(model, error) from error
    if broken:
        raise EvaluationError(
            f"{model} has NaN for logits in {lm.model.dtype}: its weights are damaged, or too large for "
            "this dtype (--dtype float32 shows which)."
        )


def _check_tokens(lm: Any, model: str | Path, wanted: "_Wanted") -> None:
    """Raise `EvaluationError` where the harness would give the model a token that it does not have."""
    types = {task.OUTPUT_TYPE for task in wanted.tasks.values()}
    has = lm.model.config.vocab_size
    for output_type, (use, token) in OWN_TOKENS.items():
        number = token(lm)
        if output_type in types and number is not None and number >= has:
            raise EvaluationError(
                f"the tokenizer of {model} {use} {lm.tokenizer.convert_ids_to_tokens(number)!r}, token {number}, and "
                f"the model has {has} tokens, from 0. Name one of those in its tokenizer_config.json instead."
            )


@contextlib.contextmanager
def _quick_side_jobs() -> Iterator[None]:
    """Keep the harness from asking git, which complains without a repository, and from listing packages again."""
    from lm_eval import evaluator

    quick = {"get_git_commit_hash": lambda: None, "add_env_info": lambda results: results.update(_environment())}
    usual = {name: getattr(evaluator, name) for name in quick}
    vars(evaluator).update(quick)
    try:
        yield
    finally:
        vars(evaluator).update(usual)


@cache
def _environment() -> dict[str, Any]:
    """What the harness tells of the machine; finding it out takes seconds."""
    from lm_eval.loggers.utils import add_env_info

    found: dict[str, Any] = {}
    add_env_info(found)
    return found


# What of the harness's complaints the user can do something about.
ASSERTIONS = {
    "len(continuation_enc) <= self.max_length": "an answer in {tasks} has more tokens than {model} can take at once. "
    "--max-length raises the limit beyond the length that the model was trained for.",
    "len(continuation_enc) > 0": "an answer in {tasks} is empty, and has no likelihood; give it a text.",
    "max_ctx_len > 0": "{tasks} may generate as many tokens as {model} can take at once, so that none are left for the "
    "question. --max-length raises the limit beyond the length that the model was trained for.",
}


@contextlib.contextmanager
def _errors_of(model: str | Path, tasks: Sequence[str]) -> Iterator[None]:
    """What the harness raises, as `EvaluationError` where the user can do something about it."""
    try:
        yield
    except OSError as error:
        raise EvaluationError(f"{model} on {', '.join(tasks)}: {one_line(error)}") from error
    except OverflowError as error:  # exp() of what a word costs, where a model is all wrong or a script has no spaces
        raise EvaluationError(
            f"{model} has a perplexity on {', '.join(tasks)} that is too large for a number: its weights are damaged, "
            "or the text has no spaces to count words by. Texts in a --local folder are measured in bits per byte."
        ) from error
    except IndexError as error:
        if "index out of range in self" not in str(error):  # torch's, of an embedding on a CPU
            raise
        raise EvaluationError(
            f"{model} on {', '.join(tasks)}: the tokenizer gives a token that the model does not have. They do not "
            "belong together, or a text has a token in it that was added to the tokenizer only."
        ) from error
    except AssertionError as error:
        for assertion, said in ASSERTIONS.items():
            if assertion in traceback.format_exc():
                raise EvaluationError(said.format(tasks=", ".join(tasks), model=model)) from error
        raise


def _simple_evaluate(lm: Any, tasks: Sequence[Any], how: Mapping[str, Any], say: Callable[[str], None]) -> Results:
    """The harness's own, again with half the batch wherever memory has run out."""
    import lm_eval
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    lm.batch_sizes.clear()  # found for another task's requests
    while True:
        try:
            return lm_eval.simple_evaluate(model=lm, tasks=list(tasks), **how) or {}
        except Exception as error:
            if not should_reduce_batch_size(error):
                raise
            tried = (
                lm.batch_size if lm.batch_size != "auto" else max(lm.batch_sizes.values(), default=lm.max_batch_size)
            )
            if tried == 1 or lm.world_size > 1:  # the other processes would wait for this one
                raise EvaluationError(
                    f"memory has run out with {tried} sequences of up to {lm.max_length} tokens in a batch. A smaller "
                    "--batch-size or --max-length is needed, or a --dtype of fewer bytes."
                ) from error
        lm.batch_size_per_gpu = tried // 2
        clear_device_cache(garbage_collection=True)
        say(f"memory has run out with {tried} sequences in a batch; going on with {tried // 2}")


def _check_answers(results: Results, task: str, model: str | Path) -> None:
    for sample in results["samples"][task]:
        if any(map(math.isnan, _numbers(sample["resps"]))):
            raise EvaluationError(
                f"{model} gives NaN as the likelihood of an answer in {task} (document {sample['doc_id']}); a model "
                "whose logits are finite is needed. --dtype float32 may do."
            )


def _numbers(answers: Any) -> Iterator[float]:
    if isinstance(answers, (list, tuple)):
        for answer in answers:
            yield from _numbers(answer)
    elif isinstance(answers, float):
        yield answers


def _summary(results: Results) -> str:
    scores = scores_of(results)
    name = next(iter(scores)).task
    return f"{name}: " + ", ".join(f"{place.metric} {score}" for place, score in scores.items())


def save_results(results: Results, output: Path, name: str | None = None) -> None:
    """Write results and samples as the harness's own command does, in a folder of the model's name, or another.

    Secrets are masked in all but the samples.

    Raises:
        EvaluationError: something could not be written, of which the harness itself would only warn.
    """
    from lm_eval.loggers import EvaluationTracker

    before = set(output.rglob("*.json*"))
    config = results["config"]
    model, template = config["model_args"]["pretrained"], config.get("apply_chat_template")
    tracker = EvaluationTracker(output_path=str(output))
    tracker.general_config_tracker.log_experiment_args(
        model_source="hf",
        model_args=f"pretrained={name or name_of(model)}",
        system_instruction=config.get("system_instruction"),
        chat_template=chat_template_of(model, template) if template else None,
        fewshot_as_multiturn=config.get("fewshot_as_multiturn"),
    )
    samples = results["samples"]
    told = masked({key: value for key, value in results.items() if key != "samples"})
    tracker.save_results_aggregated(results=told, samples=samples)
    for task, task_samples in samples.items():
        tracker.save_results_samples(task_name=task, samples=task_samples)
    written = set(output.rglob("*.json*")) - before
    if len(written) != 1 + len(samples):
        raise EvaluationError(
            f"results and samples could not be written to {output}: {len(written)} of {1 + len(samples)} files are "
            "there. Make room, or name a folder with a shorter path."
        )
