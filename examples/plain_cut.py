"""What a plain cut into M sub-layers costs a real checkpoint, before any training.

    python examples/plain_cut.py CHECKPOINT TEXT

converts CHECKPOINT with several (M, K), measures each on TEXT in windows of 512 tokens, and prints the Markdown table
of docs/limits.md; --update writes it there.
"""

import tempfile
from pathlib import Path

import finedeep  # noqa: F401  (registers the model)
import transformers
from finedeep.benchmarks.documents import put_table
from finedeep.convert import convert_checkpoint
from measure import arguments_of, mean_loss, text_windows
from transformers import AutoModelForCausalLM

SHAPES = [(1, 8), (2, 8), (4, 4)]


def main() -> None:
    """Measure and print."""
    arguments = arguments_of(__doc__)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    windows = text_windows(arguments.checkpoint, arguments.text)
    dense = mean_loss(AutoModelForCausalLM.from_pretrained(arguments.checkpoint), windows)
    rows = [("dense", dense)]
    for M, K in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "finedeep"
            convert_checkpoint(
                arguments.checkpoint, out, num_expert_sublayers=M, num_experts_per_sublayer=K, progress=False
            )
            rows.append((f"M={M} K={K}", mean_loss(AutoModelForCausalLM.from_pretrained(out), windows)))
    table = "| model | loss | over dense |\n| --- | ---: | ---: |\n"
    table += "\n".join(f"| {name} | {loss:.4f} | {loss - dense:+.4f} |" for name, loss in rows)
    print(table)
    if arguments.update:
        put_table("plain-cut", table)


if __name__ == "__main__":
    main()
