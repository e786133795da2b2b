"""Answers that are kept as they come, so that a run that was stopped need not ask again."""

import contextlib
import itertools
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from finedeep_files.lock import locked
from finedeep_files.masking import masked
from finedeep_files.processes import are_several, process_number, share
from finedeep_files.whole_file import write_whole

from ..compare.scores import Results
from ..errors import EvaluationError

METHODS = ("loglikelihood", "loglikelihood_rolling", "generate_until")  # by which the harness asks a model
ANSWERS = "answers"
Question = tuple[str, int, int, str]  # task, document, place among the document's questions, hash of all that is asked
Answers = dict[Question, list[Any]]  # as many to a question as the task repeats it


def question_of(request: Any) -> Question:
    """What one of the harness's requests is known by, in every pass and every process."""
    from lm_eval.api.model import hash_args

    return request.task_name, request.doc_id, request.idx, hash_args(request.request_type, request.args)


def answers_of(task: Any) -> Answers:
    """What this process has been answered in the harness's last pass over a task."""
    answers: Answers = {}
    for request in task.instances:
        # Beyond the repeats are those by which the harness fills up the last batch of several processes.
        answers.setdefault(question_of(request), []).extend(request.resps[: request.repeats])
    return answers


@contextlib.contextmanager
def answering(lm: Any, answers: Answers) -> Iterator[None]:
    """Have a model answer as it did before, unasked, wherever there is an answer.

    Several processes must ask a model together or not at all: where one lacks an answer, all of them ask for all.
    """
    again = {question: itertools.cycle(given) for question, given in answers.items()}

    def is_new(request: Any) -> bool:
        return len(answers.get(question_of(request), ())) < request.repeats

    def answer(ask: Callable[[list[Any]], list[Any]], requests: list[Any]) -> list[Any]:
        new = [request for request in requests if is_new(request)]
        if lm.world_size > 1 and _anywhere(lm, bool(new)):
            return ask(requests)
        asked = iter(ask(new) if new else [])
        return [next(asked if is_new(request) else again[question_of(request)]) for request in requests]

    for method in METHODS:
        setattr(lm, method, partial(answer, getattr(lm, method)))
    try:
        yield
    finally:
        for method in METHODS:
            delattr(lm, method)


def _anywhere(lm: Any, here: bool) -> bool:
    """Whether it is so in any process: each calls this."""
    everywhere = lm.gather_object(here)  # None but in the first
    return share(None if everywhere is None else any(everywhere))


class KeptAnswers:
    """A folder with what the tasks of a run have been answered so far.

    While a task is asked, that is the harness's cache of each process; of a task that is done, also a file with all
    answers, from which any number of processes continues. A cache is for a run of one process: of several, one may have
    had all of its own answers and another not. Of what samples the harness makes no use of a cache at all.

    An `answer_cache` is a folder where the answers of tasks that are done stay, for other runs of the same model.
    """

    def __init__(self, folder: Path, tasks: list[str], lm: Any, answer_cache: Path | None = None):
        self.folder, self.tasks, self.lm, self.answer_cache = folder, tasks, lm, answer_cache
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if answer_cache:
                answer_cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvaluationError(f"{answer_cache} cannot be made ({error.strerror}); name another folder.") from error
        if are_several():
            for mine in folder.glob(f"{ANSWERS}-*_rank{lm.rank or process_number()}.db*"):  # as the harness names them
                mine.unlink()

    def cache(self, task: str) -> str:
        """What the harness's `use_cache` is to be for a task."""
        return str(self.folder / f"{ANSWERS}-{self.tasks.index(task)}")

    def answers(self, task: str) -> Answers:
        """Those of a task that was done, by this run or one before; none of another.

        Each process draws the examples before its questions by itself. Where there are examples, another number of
        processes asks other questions, and none of the answers is for those.
        """
        paths = filter(None, (self._done(task), self._in_cache(task)))
        return next(filter(None, (_read(path, task) for path in paths)), {})

    def finish(self, task: str, results: Results, answers: Sequence[Answers]) -> None:
        """Keep a task's answers, those of each process, and its scores for whoever looks while others are at work."""
        from lm_eval.utils import handle_non_serializable

        found = {question: given for some in answers for question, given in some.items()}
        _write(self._done(task), found)
        if self.answer_cache:
            self._put_into_cache(task, found)
        scores = masked({key: value for key, value in results.items() if key != "samples"})
        path = self.folder / f"{task.replace('/', '_')}.json"
        path.write_text(json.dumps(scores, indent=2, default=handle_non_serializable), encoding="utf-8")

    def _put_into_cache(self, task: str, found: Answers) -> None:
        """Beside what is there. Runs of one baseline may do so at the same moment, and none of them ends with it."""
        try:
            with locked(self.answer_cache / ".lock", wait=True):
                path = self._in_cache(task)
                _write(path, {**_read(path, task), **found})
        except OSError as error:
            warnings.warn(f"answers to {task} are not kept for other runs ({error}).", stacklevel=2)

    def _done(self, task: str) -> Path:
        return Path(f"{self.cache(task)}_all.json")

    def _in_cache(self, task: str) -> Path | None:
        return self.answer_cache / f"{task.replace('/', '_')}.json" if self.answer_cache else None


def _read(path: Path, task: str) -> Answers:
    """Nothing where there is no such file, or one that was written by something else."""
    # JSON has made lists of the pairs of likelihood and whether the model would have said so.
    try:
        return {
            (task, *question): [tuple(answer) if isinstance(answer, list) else answer for answer in answers]
            for *question, answers in json.loads(path.read_text(encoding="utf-8"))
        }
    except (OSError, ValueError, TypeError):
        return {}


def _write(path: Path, answers: Answers) -> None:
    write_whole(path, json.dumps([[*question, given] for (_, *question), given in answers.items()]))
