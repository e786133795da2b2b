"""Imports go one way: what each part of the project may stand on, and that no two files import each other."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMES = {"finedeep_files": "files", "finedeep_cli": "cli", "finedeep_serving": "serving"}
MODEL = ("configuration_finedeep", "modeling_finedeep", "operators_finedeep", "kernels_finedeep")
# What a conversion is.
PLAN = tuple(
    f"convert.{name}"
    for name in "families source validation tensor_mapping assignment plan cut code_files receipt tokenization".split()
)
# The first entry that a module's name begins with says what it may import, beside its own room.
MAY_IMPORT = {
    "files": (),
    **dict.fromkeys(PLAN, ("files", *MODEL, *PLAN)),
    "convert.calibrate": ("files", *MODEL, *PLAN),
    "convert.heal": ("files", *MODEL, *PLAN, "convert.calibrate.text"),
    "convert.hub": ("files", *MODEL, *PLAN),
    "convert": ("files", *MODEL, "convert"),
    "eval.compare": ("files", "eval.errors"),
    "eval.scoring": ("files", *MODEL, "eval.errors", "eval.output", "eval.compare"),
    "eval.inspect": ("files", *MODEL, "eval.errors", "eval.output", "eval.compare"),
    "eval.report": ("files", *MODEL, "eval.errors", "eval.output", "eval.compare", "eval.inspect"),
    "eval": ("files", *MODEL, "eval"),
    "demo": ("files", "convert", "eval"),
    "cli": ("files", "convert", "eval", "demo"),
    "serving": (),  # it is imported by engines, whatever they serve
}


def modules():
    """Name -> file of each module: `convert.plan`, `files.lock`; a room is its __init__."""
    for top in ("convert", "eval", "files", "demo", "cli", "serving", "benchmarks"):
        for file in (ROOT / top).rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


MODULES = dict(modules())
KNOWN = {*MODULES, *MODEL}


def imported(name, file):
    """Names of this project's modules that a module imports, wherever in it."""
    package = name.split(".") if file.stem == "__init__" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found = [f"{stem}.{alias.name}".lstrip(".") for alias in node.names]
            found = [full if full in KNOWN or full in NAMES else stem for full in map(within, found)]
        else:
            continue
        yield from (one for one in map(within, found) if one in KNOWN and one != name)


def within(name):
    """A module's name as it is here: without `finedeep.`, and by its folder."""
    first, dot, rest = name.partition(".")
    return rest if first == "finedeep" else NAMES.get(first, first) + dot + rest


def is_in(name, room):
    return name == room or name.startswith(f"{room}.")


def room_of(name):
    return next((room for room in MAY_IMPORT if is_in(name, room)), None)


def test_imports_go_one_way():
    wrong = []
    for name, file in MODULES.items():
        room = room_of(name)
        if room is None:  # benchmarks, which nothing imports
            continue
        allowed = MAY_IMPORT[room]
        wrong += [
            f"{name} imports {other}"
            for other in imported(name, file)
            if room_of(other) != room and not any(is_in(other, one) for one in allowed)
        ]
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_no_two_files_import_each_other():
    graph = {name: {*imported(name, file)} for name, file in MODULES.items()}
    pairs = sorted(f"{a} and {b}" for a, others in graph.items() for b in others if a in graph.get(b, ()) and a < b)
    assert not pairs
