"""What a training recipe says: a YAML file (examples/recipes), some fields of it changed, some set for a GPU."""

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

Recipe = dict[str, Any]
Changes = dict[str, Any]


def read_recipe(path: Path, changes: Iterable[str] = ()) -> Recipe:
    """A recipe's file, with some fields set: `A.B=VALUE`."""
    return changed(yaml.safe_load(path.read_text(encoding="utf-8")), changes)


def changed(recipe: Recipe, changes: Iterable[str]) -> Recipe:
    """The recipe with some fields set: `A.B=VALUE`. Exits where it has no A."""
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise SystemExit(f"--set {change}: it must be A.B=VALUE, A one of {', '.join(recipe)}.")
        set_field(recipe, name, yaml.safe_load(value))
    return recipe


def set_field(recipe: Recipe, name: str, value: Any) -> None:
    """Set the field that is called A.B. Exits where the recipe has no A."""
    *groups, last = name.split(".")
    place = recipe
    for group in groups:
        place = place.get(group) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        raise SystemExit(f"--set {name}: it must be A.B=VALUE, A one of {', '.join(recipe)}.")
    place[last] = value


def training_of(recipe: Recipe, gpu: bool) -> dict[str, Any]:
    """The fields of the training, with those that are for a GPU where there is one."""
    return recipe["training"] | (recipe.get("gpu") or {} if gpu else {})


def without_folders(recipe: Recipe) -> Recipe:
    """The recipe with the names of its files alone: where they lie says nothing to whoever reads the log."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: without(inner) for name, inner in value.items()}
        return Path(value).name if isinstance(value, str) else value

    return recipe | {name: without(recipe[name]) for name in ("data", "tokenizer", "start") if name in recipe}


def runs_of(grid: dict[str, Any]) -> Iterator[tuple[str, Changes]]:
    """Each run's name, SIZE/MODEL/RATE-SEED, and the fields of the recipe that it sets, in the grid's order."""
    seen = set()
    for group in grid["runs"]:
        for model, rate, seed in itertools.product(group["models"], group["learning_rates"], group.get("seeds", [0])):
            changes = dict(grid["models"][model])
            kind = changes.setdefault("model", "finedeep")
            # what a model sets itself comes last
            changes = grid["sizes"][group["size"]][kind] | changes
            # what is left to a seed where the weights are a checkpoint's: the order of the text
            changes |= {"training.learning_rate": rate, "data.seed" if "start" in changes else "training.seed": seed}
            name = f"{group['size']}/{slug(model)}/{rate:g}-{seed}"
            if name not in seen:
                yield name, changes
            seen.add(name)


def slug(name: str) -> str:
    """A model's name as that of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
