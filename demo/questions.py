"""Tasks about a world, one for each request type of the harness."""

import json
import random
from pathlib import Path

from ..eval.scoring.local_tasks import write_task
from .world import RELATIONS, World

CHOICES = 4
# task -> kind of `finedeep.eval.scoring.local_tasks`
TASKS = {
    "demo_choice": "multiple_choice",
    "demo_last_word": "last_word",
    "demo_text": "text",
    "demo_answer": "generation",
}


def write_tasks(directory: Path, world: World, seed: int, samples: int = 120) -> list[str]:
    """Write data and definitions of all tasks into `directory`. Returns the task names."""
    draw = random.Random(seed)
    directory.mkdir(parents=True)
    facts = draw.sample(list(world.facts.items()), k=samples)
    lines: dict[str, list[dict]] = {name: [] for name in TASKS}
    for (animal, relation), value in facts:
        question, values, _ = RELATIONS[relation]
        question = question.format(animal=animal)
        choices = draw.sample([other for other in values if other != value], k=CHOICES - 1) + [value]
        draw.shuffle(choices)
        context, _, last = world.tell(animal, relation, draw).rpartition(" ")
        lines["demo_choice"].append({"question": question, "choices": choices, "answer": choices.index(value)})
        lines["demo_last_word"].append({"context": context, "word": last.rstrip(".")})
        lines["demo_text"].append({"text": world.story(draw)})
        lines["demo_answer"].append({"question": question, "answer": value})
    for name, kind in TASKS.items():
        data = directory / f"{name}.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines[name]), encoding="utf-8")
        write_task(directory, name, kind, data)
    return list(TASKS)
