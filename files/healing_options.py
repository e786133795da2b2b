"""The options of healing, for `finedeep.convert.heal` and for the command line, which must not import torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .options import SELF, option


@dataclass(frozen=True)
class HealingOptions:
    """What the user asked for; the fields of the receipt's `options`."""

    teacher: str | None = option(
        None, "a folder or a Hub id: the dense model that DIR was converted from", metavar="DENSE"
    )
    data: str = option(
        SELF,
        "a text file, or JSON Lines with a 'text' in each record; a dataset with a column 'text', as NAME, NAME:CONFIG "
        "or NAME:CONFIG:SPLIT; or self, to sample from the teacher (default)",
        metavar="D",
    )
    tokens: int | None = option(
        None,
        "of the data (default: 8,192 for each channel of the hidden size, at most 1,048,576)",
        metavar="N",
        least=1,
    )
    context: int | None = option(
        None, "tokens in a sequence, at most (default: the hidden size, from 64 to 512)", metavar="N", least=2
    )
    steps: int | None = option(
        None, "of the optimiser (default: 10 for each channel, from 500 to 1000)", metavar="N", least=1
    )
    batch_size: int | None = option(
        None,
        "sequences a device (default: such that a step has 32 tokens for each channel, from 2,048 to 8,192)",
        metavar="N",
        least=1,
    )
    learning_rate: float | None = option(
        None,
        "its peak (default: 0.064 / hidden size, which is 1e-3 for 64 and 1.6e-5 for 4096; ten times that for an "
        "adapter)",
        metavar="R",
    )
    adapter_rank: int = option(
        0,
        "train LoRA of this rank on every linear layer and router, and merge it at the end, instead of all weights: a "
        "fraction of the memory, and some of the gain (default: 0, all weights)",
        metavar="N",
        least=0,
    )
    divergence: float | None = option(
        None,
        "the teacher's share of the loss, from 0 to 1 (default: 1 with a teacher, 0 without)",
        metavar="W",
    )
    hidden_states: float | None = option(
        None,
        "the first weight of the distance of each layer's output from the teacher's (default: 10 where the two can be "
        "compared and W is above 0)",
        metavar="H",
    )
    seed: int = option(0, "for sampling and the order of the data (default: 0)")
    training: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "a field of transformers' TrainingArguments, the value as JSON or as text; may be given again",
            "flag": "set",
            "metavar": "NAME=VALUE",
        },
    )

    def __post_init__(self) -> None:
        if self.divergence is None:
            object.__setattr__(self, "divergence", 0.0 if self.teacher is None else 1.0)
