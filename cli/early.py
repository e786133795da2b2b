"""What can be seen to fail at once fails before torch is imported, which takes seconds, and before any model loads."""

import difflib
import importlib.util
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
OWN_TASKS = Path(__file__).parents[1] / "eval/tasks"
# Of a task's definition, a YAML file that may be JSON too.
NAMED = re.compile(r"""^\s*["']?(?:task|group|tag)["']?\s*:\s*["']?([\w.+-]+)""", re.MULTILINE)


class CommandError(ValueError):
    """The command cannot do what it was asked. The message says what was found and what to do."""


def check_model(model: str) -> None:
    """Raise `CommandError` for what is neither a folder nor could be a Hub id."""
    path = Path(model).expanduser()
    if path.is_file():
        raise CommandError(f"{model} is a file; name the folder of a model, or a Hub id.")
    if not path.exists() and not HUB_ID.fullmatch(model):
        raise CommandError(f"{model} does not exist; name the folder of a model, or a Hub id.")


def check_file(path: str, what: str) -> None:
    """Raise `CommandError` unless there is such a file."""
    if not Path(path).is_file():
        raise CommandError(f"{path} is not there; name a file with {what}.")


def check_folder(path: str, what: str, patterns: Sequence[str] = ("*",)) -> None:
    """Raise `CommandError` unless there is such a folder, with a file of one of the patterns."""
    if not Path(path).is_dir():
        raise CommandError(f"{path} is no folder; name one with {what}.")
    if not any(next(Path(path).glob(pattern), None) for pattern in patterns):
        raise CommandError(f"{path} holds no {' and no '.join(patterns)}; name a folder with {what}.")


def check_tasks(names: Iterable[str], include_path: str | None) -> None:
    """Raise `CommandError` for a name that no task's definition has.

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
        raise CommandError(
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
