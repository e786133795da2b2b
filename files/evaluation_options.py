"""The options of an evaluation, for `finedeep.eval` and for the command line, which must not import torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .options import option

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EvaluationOptions:
    """How one model is scored. Paths may be several, and of any kind that `pathlib.Path` takes.

    `model_args` are further arguments of the harness's `hf` model, such as {"parallelize": True}.
    """

    answers: str | Path | None = option(
        None, "where answers stay, for other runs of the same model not to ask again", metavar="DIR"
    )
    include_path: str | Path | Sequence[str | Path] | None = option(
        None, "a folder with task definitions of your own", metavar="DIR"
    )
    num_fewshot: int | None = option(
        None, "examples before a question (default: the task's; a task's own 0 stays)", metavar="N", least=0
    )
    limit: int | None = option(None, "score only the first N samples of each task", metavar="N", least=1)
    batch_size: int | str = option("auto", "sequences (default: auto, what memory takes)", metavar="N")
    device: str | None = option(None, "such as cpu or cuda:0 (default: a GPU where there is one)")
    dtype: str = option("auto", "default: auto, the checkpoint's own", choices=DTYPES)
    max_length: int | None = option(None, "tokens (default: the model's own limit)", metavar="N", least=1)
    model_args: Mapping[str, Any] | None = field(
        default_factory=dict,
        metadata={
            "help": "an argument of the harness's hf model, the value as JSON or as text; may be given again",
            "flag": "set",
            "metavar": "NAME=VALUE",
        },
    )
    apply_chat_template: bool | str = option(
        False,
        "make messages of questions by the model's chat template, or by one of its templates by name",
        metavar="NAME",
    )
    fewshot_as_multiturn: bool | None = option(
        None,
        "examples are turns of the conversation (default: with a chat template; false: part of the question)",
        metavar="BOOL",
    )
    system_instruction: str | None = option(None, "comes before each question, as the system's message", metavar="TEXT")
    seed: int = option(1234, "for few-shot examples, bootstrap and permutations (default: 1234)")


@dataclass(frozen=True)
class StudyOptions(EvaluationOptions):
    """How models are scored and compared, and where that is written.

    Without `output` nothing is written, and costs are not measured. `say` is given lines about what is being done.
    """

    local: str | Path | None = option(
        None, "a folder of questions (*.jsonl) and texts (*.txt), which are tasks too", metavar="DIR"
    )
    output: str | Path | None = option(
        None, "where to write results, samples, the comparison and its page", metavar="DIR"
    )
    resume: bool = False
    overwrite: bool = False
    say: Callable[[str], None] | None = None
