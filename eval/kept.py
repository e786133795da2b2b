"""Answers that are kept as they come, so that a run that was stopped need not ask again."""

import json
from pathlib import Path

from .scores import Results

WHOLE = "answers"  # of all tasks together


class KeptAnswers:
    """A folder with the harness's caches, one for each task and process, and the scores of each task that is done.

    Processes must ask a model together or not at all: where there are several, the answers of a task that was not
    finished are asked for again, since some process may have had all of its own and another not.
    """

    def __init__(self, folder: Path, tasks: list[str], rank: int, world_size: int):
        self.folder, self.tasks, self.rank = folder, tasks, rank
        folder.mkdir(parents=True, exist_ok=True)
        if world_size > 1:
            for task in tasks:
                if not self.scores(task).exists():
                    self._file(self.cache(task)).unlink(missing_ok=True)

    def scores(self, task: str) -> Path:
        """The file with a task's scores, which is there when the task is done."""
        return self.folder / f"{task.replace('/', '_')}.json"

    def cache(self, task: str) -> str:
        """What the harness's `use_cache` is to be for a task."""
        return str(self.folder / f"{WHOLE}-{self.tasks.index(task)}")

    def write_scores(self, task: str, results: Results) -> None:
        """Without the samples, for whoever looks while other tasks are at work."""
        from lm_eval.utils import handle_non_serializable

        kept = {key: value for key, value in results.items() if key != "samples"}
        self.scores(task).write_text(json.dumps(kept, indent=2, default=handle_non_serializable), encoding="utf-8")

    def merged(self) -> str:
        """What `use_cache` is to be for all tasks together."""
        from sqlitedict import SqliteDict

        whole = str(self.folder / WHOLE)
        with SqliteDict(self._file(whole)) as answers:
            for task in self.tasks:
                with SqliteDict(self._file(self.cache(task)), flag="r") as some:
                    answers.update(some)
            answers.commit()
        return whole

    def _file(self, cache: str) -> Path:
        return Path(f"{cache}_rank{self.rank}.db")  # as the harness names it
