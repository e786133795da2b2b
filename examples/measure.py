"""What the measuring examples share: a command line, a text in windows, and a model's loss on it."""

import argparse
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer

WINDOW = 512


def arguments_of(description: str) -> argparse.Namespace:
    """The command line of a script that measures a checkpoint on a text and can write its table into the documents."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("text", type=Path)
    parser.add_argument("--update", action="store_true", help="write the table into the document that shows it")
    return parser.parse_args()


def text_windows(checkpoint: str | Path, text: Path) -> torch.Tensor:
    """Token ids of the text in windows (number, WINDOW); what does not fill the last window is left out."""
    ids = AutoTokenizer.from_pretrained(checkpoint)(text.read_text(encoding="utf-8"))["input_ids"]
    return torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)


@torch.no_grad()
def mean_loss(model: nn.Module, windows: torch.Tensor) -> float:
    """Mean next-token loss in nats over windows (number, WINDOW), in the mode that the model is in."""
    return model(windows, labels=windows).loss.item()
