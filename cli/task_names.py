"""Whether tasks are known, before torch and the harness are imported, which takes seconds."""

import difflib
import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from finedeep_files.inputs import InputError

SUFFIXES = (".yaml", ".yml", ".py", "")  # some of the harness's own have none
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
    folders += [place / "eval/scoring/tasks" for place in _places_of("finedeep")]
    folders += [place / "tasks" for place in _places_of("lm_eval")]
    for folder in folders:
        for path in folder.rglob("*"):
            if path.suffix in SUFFIXES and path.is_file():
                try:
                    yield path.read_text(encoding="utf-8", errors="replace")
                except OSError:  # which is for the harness to tell of
                    continue


def _places_of(package: str) -> list[Path]:
    """Where a package lies, which is not imported for it."""
    found = importlib.util.find_spec(package)
    return [Path(place) for place in (found and found.submodule_search_locations) or ()]
