"""The whole path on one machine: generate, train dense, convert, reload, evaluate, one table."""

from pathlib import Path

from finedeep_files.errors import ConversionError, check_seed
from finedeep_files.working_folder import WorkingFolder
from transformers.utils import logging

from ..convert import convert_checkpoint
from ..eval import evaluate, side_by_side
from ..eval.scoring.harness import require_harness
from .dense import train_dense
from .questions import write_tasks
from .world import World

# heading in the table -> (M, K)
SHAPES = {"finedeep M=1 K=8": (1, 8), "finedeep M=2 K=4": (2, 4)}


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
    from ..eval.compare.comparison import compare, sentence_of  # which need what has just been looked for

    check_seed(seed, 31)  # 32 bits are what NumPy takes, and the questions have the next one
    output = Path(output)
    WorkingFolder(output, ConversionError).check()
    logging.disable_progress_bar()  # loading takes no time here

    world = World.from_seed(seed)
    print(f"A world of {len(world.facts)} facts from seed {seed}: a dense Llama learns it from generated text.")
    loss = train_dense(output / "dense", world.texts(seed), steps, seed)
    print(f"Dense model trained: loss {loss:.3f} nats per token.")

    models = {"dense": output / "dense"}
    for heading, (M, K) in SHAPES.items():
        models[heading] = output / f"finedeep-M{M}-K{K}"
        convert_checkpoint(
            output / "dense", models[heading], num_expert_sublayers=M, num_experts_per_sublayer=K, progress=False
        )
        print(f"Converted: {models[heading]}")

    tasks = write_tasks(output / "tasks", world, seed + 1)
    results = {}
    for heading, model in models.items():
        print(f"Scoring {heading} with lm-evaluation-harness ...", flush=True)
        results[heading] = evaluate(
            model, tasks, include_path=output / "tasks", output=output / "results", batch_size=32, seed=seed
        )
    table = side_by_side(results)
    last = list(SHAPES)[-1]  # the one that is not exact
    verdicts = [sentence_of(row) for row in compare(results["dense"], results[last], seed) if row.main]
    (output / "table.md").write_text("\n".join([table, "", *verdicts, ""]), encoding="utf-8")
    print(f"\n{table}\n")
    print(f"{last} beside dense, sample by sample:")
    print("\n".join(verdicts), end="\n\n")
    print("M=1 is exact: its scores are the dense model's. M=2 is a plain cut without any training: its loss shows.")
    print("demo_choice has four choices, so that chance is 0.25.")
    print(f"Everything is in {output.resolve()}")
    return table
