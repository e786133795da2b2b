"""Which parameters decay, at which rates: the same for transformers' Trainer and for a plain loop."""

from typing import Any

import torch
from starting_model import named
from torch import nn


def groups_of(
    model: nn.Module, weight_decay: float, learning_rate: float, rates: dict[str, float]
) -> list[dict[str, Any]]:
    """Groups for AdamW of what is trained: matrices with weight decay, vectors without.

    Args: rates: for parameters by their last names, factors on the learning rate.
    """
    factors = {id(parameter): factor for name, factor in rates.items() for parameter in named(model, name)}
    groups: dict[tuple[bool, float], list[torch.Tensor]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault((parameter.ndim > 1, factors.get(id(parameter), 1.0)), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0, "lr": factor * learning_rate}
        for (decays, factor), parameters in groups.items()
    ]
