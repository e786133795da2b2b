"""What a plain cut into M sub-layers costs a real checkpoint, before any training.

    python examples/plain_cut.py CHECKPOINT TEXT

converts CHECKPOINT with several (M, K), measures each on TEXT in windows of 512 tokens, and prints the Markdown table
that the README shows; --update writes it there.
"""

import argparse
import re
import tempfile
from pathlib import Path

import finedeep  # noqa: F401  (registers the model)
import torch
import transformers
from finedeep.convert import convert_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

SHAPES = [(1, 8), (2, 8), (4, 4)]
WINDOW = 512
README = Path(__file__).parents[1] / "README.md"


@torch.no_grad()
def mean_loss(folder: str | Path, windows: torch.Tensor) -> float:
    """Mean next-token loss in nats over windows (number, WINDOW)."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model(windows, labels=windows).loss.item()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("text", type=Path)
    parser.add_argument("--update", action="store_true", help="write the table into README.md")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    ids = tokenizer(arguments.text.read_text(encoding="utf-8"))["input_ids"]
    windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
    dense = mean_loss(arguments.checkpoint, windows)
    rows = [("dense", dense)]
    for M, K in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "finedeep"
            convert_checkpoint(
                arguments.checkpoint, out, num_expert_sublayers=M, num_experts_per_sublayer=K, progress=False
            )
            rows.append((f"M={M} K={K}", mean_loss(out, windows)))
    table = "| model | loss | over dense |\n| --- | ---: | ---: |\n"
    table += "\n".join(f"| {name} | {loss:.4f} | {loss - dense:+.4f} |" for name, loss in rows)
    print(table)
    if arguments.update:
        text = README.read_text(encoding="utf-8")
        begin, end = "<!-- plain-cut:begin -->\n", "\n<!-- plain-cut:end -->"
        pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end.strip()), re.DOTALL)
        README.write_text(pattern.sub(lambda _: f"{begin}{table}{end}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
