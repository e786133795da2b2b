"""The whole path on one machine: generate, train dense, convert, calibrate, reload, evaluate, one table, two plots."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finedeep_files.errors import ConversionError, check_seed
from finedeep_files.working_folder import WorkingFolder
from transformers.utils import logging

from ..convert import convert_checkpoint
from ..eval import evaluate, side_by_side
from ..eval.scoring.harness import require_harness
from .dense import train_dense
from .questions import write_tasks
from .world import World

CALIBRATION = {"calibrate": "self", "calibration_tokens": 32_768, "calibration_steps": 40}
# heading in the table -> options of the conversion, and what the row shows
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "M=1 K=8": ({"num_expert_sublayers": 1}, "the same function as dense: every score is identical"),
    "M=2 K=8 cut": (
        {"num_expert_sublayers": 2},
        "two sub-layers from the same neurons, nothing else done: it loses much",
    ),
    "M=2 K=8 calibrated": (
        {"num_expert_sublayers": 2, **CALIBRATION},
        "the same cut, each layer fitted to the dense one on text that the dense model made up",
    ),
}
PLOTS = ("activations", "gates")  # of the inspection's figures


def run_demo(output: str | Path, *, seed: int = 0, steps: int = 300) -> str:
    """Make everything in the folder `output` and print the table, which is returned too.

    Args:
        output: the folder to make; it must not exist, or be empty.
        seed: of the world, the text, the questions and the initial weights.
        steps: training steps of the dense model.

    Raises:
        ConversionError: `output` is in use, or the seed is no whole number of 31 bits.
        EvaluationError: lm-eval is not installed.
    """
    require_harness()
    check_seed(seed, 31)  # 32 bits are what NumPy takes, and the questions have the next one
    output = Path(output)
    WorkingFolder(output, ConversionError).check()
    logging.disable_progress_bar()  # loading takes no time here

    world = World.from_seed(seed)
    print(f"1. A world of {len(world.facts)} facts from seed {seed}: a dense Llama learns it from generated text.")
    loss = train_dense(output / "dense", world.texts(seed), steps, seed)
    print(f"   Loss {loss:.3f} nats per token.")
    models = {"dense": output / "dense", **converted(output)}

    print("3. lm-evaluation-harness asks each model the same questions.", flush=True)
    tasks = write_tasks(output / "tasks", world, seed + 1)
    options = {"include_path": output / "tasks", "output": output / "results", "batch_size": 32, "seed": seed}
    results = {heading: evaluate(model, tasks, **options) for heading, model in models.items()}
    table = side_by_side(results)
    scores = f"{table}\n\n{explained(results, seed)}\n"
    print(f"\n{scores}")
    (output / "table.md").write_text(scores, encoding="utf-8")

    print(f"4. Activations and gates on a text of the same kind, as plots in {output / 'plots'}:")
    print(looked_at({name: models[name] for name in ("dense", "M=2 K=8 calibrated")}, world, seed, output))
    print(f"\nEverything is in {output.resolve()}. Next, with a checkpoint of yours:")
    print("  .venv/bin/finedeep convert CHECKPOINT ./finedeep")
    return table


def converted(output: Path) -> dict[str, Path]:
    """Folders of the converted models, by heading."""
    print("2. It is converted; how the FFN is cut, and what is done about it:")
    folders = {}
    for heading, (options, shows) in MODELS.items():
        folders[heading] = output / f"finedeep {heading}".replace(" ", "-").replace("=", "")
        convert_checkpoint(output / "dense", folders[heading], progress=False, **options)
        print(f"   {heading}: {shows}.", flush=True)
    return folders


def explained(results: Mapping[str, Any], seed: int) -> str:
    """What each model's scores say beside the dense model's, sample by sample."""
    from ..eval.compare.comparison import compare, sentence_of  # which need what has been looked for before

    lines = ["demo_choice has four choices, so that chance is 0.25. Beside dense, sample by sample:"]
    for heading, (_, shows) in MODELS.items():
        lines.append(f"{heading} ({shows}):")
        rows = compare(results["dense"], results[heading], seed)
        lines += [f"  {sentence_of(row)}" for row in rows if row.main]
    return "\n".join(lines)


def looked_at(models: Mapping[str, Path], world: World, seed: int, output: Path) -> str:
    """Save two plots of what FFNs and gates do on a text, and say the share of activations that are far from zero."""
    from ..eval.inspect.inspection import inspect
    from ..eval.inspect.plots import figures_of, save
    from ..eval.inspect.recorder import TAU

    text, texts = output / "text.txt", world.texts(seed + 2)
    text.write_text("\n".join(next(texts) for _ in range(100)), encoding="utf-8")
    inspections = {name: inspect(model, text, progress=False) for name, model in models.items()}
    figures = {name: figure for name, figure in figures_of(inspections).items() if name in PLOTS}
    (output / "plots").mkdir()
    paths = [path for path in save(figures, output / "plots") if path.suffix == ".png"]
    lines = [f"   {path.name}" for path in paths]
    for name, found in inspections.items():
        lines.append(
            f"   {name}: {found['nsar'][str(TAU)]:.1%} of activations are further than {TAU} from zero (NSAR)."
        )
    return "\n".join(lines)
