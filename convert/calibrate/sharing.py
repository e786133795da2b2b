"""Several processes of `accelerate launch` or torchrun: windows are dealt out, sums are of all processes.

Each function is the identity where there is one process, and is called by all of them where there are several.
"""

from typing import Any

import torch
from finedeep_files.processes import are_several, number_of_processes, process_number
from torch import distributed


def from_all(value: Any) -> list[Any]:
    """What each process has, in all of them."""
    if not are_several():
        return [value]
    values = [None] * number_of_processes()
    distributed.all_gather_object(values, value)
    return values


class Share:
    """This process's windows of a calibration text: every n-th one, in order, so that held-out ones come first."""

    def __init__(self, windows: torch.Tensor, held: int):
        """Args: windows (windows, seq) token ids, all of them, the first `held` of which are held out."""
        numbers = torch.arange(process_number(), len(windows), number_of_processes())
        seq = windows.shape[1]
        self.windows = windows[numbers]
        self.held = int((numbers < held).sum()) * seq  # tokens of this process's that are held out
        self.all_held, self.all_tokens = held * seq, windows.numel()
        # Where a token of the whole text is in this process's; -1 where another process has it.
        self.place = torch.full((len(windows), seq), -1)
        self.place[numbers] = torch.arange(len(numbers) * seq).view(-1, seq)
        self.place = self.place.flatten()

    def of_the_first(self, tokens: int) -> int:
        """How many of the whole text's first tokens this process has; they are its own first ones."""
        return int((self.place[:tokens] >= 0).sum())

    def of_batch(self, batch: torch.Tensor) -> torch.Tensor:
        """Which of this process's tokens are in a batch of the whole text's (tokens,)."""
        mine = self.place[batch]
        return mine[mine >= 0]


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over processes, put in the tensor's place."""
    if are_several():
        distributed.all_reduce(tensor)
    return tensor


def median(values: torch.Tensor) -> float:
    """The median over all processes' values (tokens,)."""
    return torch.cat(from_all(values.cpu())).median().item()


def everywhere(true: bool, device: torch.device) -> bool:
    """Whether something is true in every process."""
    return total(torch.tensor([0.0 if true else 1.0], device=device)).item() == 0
