"""Whether tasks are known, before torch and the harness are imported, which takes seconds."""

import difflib
import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from finedeep_files.inputs import InputError

OWN_TASKS = Path(__file__).parents[1] / "eval/scoring/tasks"
# Of a task's definition, a YAML file that may be JSON too.
NAMED = re.compile(r"""^\s*["']?(?:task|group|tag)["']?\s*:\s*["']?([\w.+-]+)""", re.MULTILINE)


def check_tasks(names: Iterable[str], include_path: str | None) -> None:
    """Raise `InputError` for a name that no task's definition has.

    The harness's own index says it surely, and takes many times as long: what is named anywhere is let pass here.
    """
    missing = set(names)
    known: set[str] = set()
    for text in _definitions(include_path):
        if not missing:
            return
        missing = {name for name in missing if name not in text}
        known.update(NAMED.findall(text))
    if missing:
        name = min(missing)
        nearest = ", ".join(difflib.get_close_matches(name, known, n=3)) or "none is near"
        raise InputError(
            f"the harness has no task {name!r} (nearest: {nearest}). `lm-eval ls tasks` lists all; for tasks of your "
            "own name their folder with --include-path."
        )


def _definitions(include_path: str | None) -> Iterator[str]:
    """The texts of all definitions, the likeliest first."""
    folders = [Path(include_path)] if include_path else []
    harness = importlib.util.find_spec("lm_eval")
    folders += [OWN_TASKS, *(Path(place) / "tasks" for place in (harness and harness.submodule_search_locations) or ())]
    for folder in folders:
        for path in folder.rglob("*"):
            if path.suffix in (".yaml", ".yml", ".py"):
                try:
                    yield path.read_text(encoding="utf-8", errors="replace")
                except OSError:  # which is for the harness to tell of
                    continue
