"""Answers that are kept as they come, so that a run that was stopped need not ask again."""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..convert.whole_file import write_whole
from .processes import are_several, process_number
from .scores import Results

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
    """Have a model answer as it did before, unasked, wherever there is an answer."""
    again = {question: itertools.cycle(given) for question, given in answers.items()}

    def answer(ask: Callable[[list[Any]], list[Any]], requests: list[Any]) -> list[Any]:
        new = [request for request in requests if question_of(request) not in again]
        asked = iter(ask(new) if new else [])
        return [next(again.get(question_of(request), asked)) for request in requests]

    for method in METHODS:
        setattr(lm, method, partial(answer, getattr(lm, method)))
    try:
        yield
    finally:
        for method in METHODS:
            delattr(lm, method)


class KeptAnswers:
    """A folder with what the tasks of a run have been answered so far.

    While a task is asked, that is the harness's cache of each process; of a task that is done, also a file with all
    answers, from which any number of processes goes on. A cache is for a run of one process: several must ask a model
    together or not at all, and one may have had all of its own answers and another not. Of what samples the harness
    makes no use of a cache at all.
    """

    def __init__(self, folder: Path, tasks: list[str], lm: Any, say: Callable[[str], None]):
        self.folder, self.tasks, self.lm, self.say = folder, tasks, lm, say
        folder.mkdir(parents=True, exist_ok=True)
        if are_several():
            for mine in folder.glob(f"{ANSWERS}-*_rank{lm.rank or process_number()}.db*"):  # as the harness names them
                mine.unlink()

    def cache(self, task: str) -> str:
        """What the harness's `use_cache` is to be for a task."""
        return str(self.folder / f"{ANSWERS}-{self.tasks.index(task)}")

    def answers(self, task: str) -> Answers:
        """Those of a task that is done, none of another.

        Each process draws the examples before its questions by itself. Where there are examples, another number of
        processes asks other questions, and none of the answers is for those.
        """
        path = self._done(task)
        if not path.exists():
            return {}
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["processes"] not in (None, self.lm.world_size):
            self.say(f"{task} is asked again: with another number of processes its questions have other examples")
            return {}
        # JSON has made lists of the pairs of likelihood and whether the model would have said so.
        return {
            (task, *question): [tuple(answer) if isinstance(answer, list) else answer for answer in answers]
            for *question, answers in kept["answers"]
        }

    def finish(self, task: str, results: Results, answers: Sequence[Answers]) -> None:
        """Keep a task's answers, those of each process, and its scores for whoever looks while others are at work."""
        from lm_eval.utils import handle_non_serializable

        kept = {
            "processes": self.lm.world_size if results["n-shot"][task] else None,
            "answers": [[*question, given] for some in answers for (_, *question), given in some.items()],
        }
        write_whole(self._done(task), json.dumps(kept))
        scores = {key: value for key, value in results.items() if key != "samples"}
        path = self.folder / f"{task.replace('/', '_')}.json"
        path.write_text(json.dumps(scores, indent=2, default=handle_non_serializable), encoding="utf-8")

    def _done(self, task: str) -> Path:
        return Path(f"{self.cache(task)}_all.json")
