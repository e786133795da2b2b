"""What the measuring examples share: a text in windows, a model's loss on it, and a table's place in the README."""

import re
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer

WINDOW = 512
README = Path(__file__).parents[1] / "README.md"


def text_windows(checkpoint: str | Path, text: Path) -> torch.Tensor:
    """Token ids of the text in windows (number, WINDOW); what does not fill the last window is left out."""
    ids = AutoTokenizer.from_pretrained(checkpoint)(text.read_text(encoding="utf-8"))["input_ids"]
    return torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)


@torch.no_grad()
def mean_loss(model: nn.Module, windows: torch.Tensor) -> float:
    """Mean next-token loss in nats over windows (number, WINDOW), in the mode that the model is in."""
    return model(windows, labels=windows).loss.item()


def put_into_readme(mark: str, table: str) -> None:
    """Replace what stands between <!-- MARK:begin --> and <!-- MARK:end -->. Raises ValueError where they are not."""
    text = README.read_text(encoding="utf-8")
    begin, end = f"<!-- {mark}:begin -->\n", f"\n<!-- {mark}:end -->"
    pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end.strip()), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{README} has no {begin.strip()} ... {end.strip()} to put the table into.")
    README.write_text(pattern.sub(lambda _: f"{begin}{table}{end}", text), encoding="utf-8")
