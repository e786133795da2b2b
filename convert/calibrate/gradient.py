"""The gradient part of calibration: one layer's sub-layers are trained to do what the dense FFN did.

They see the stream as the converted model has it and are to bring it to where the dense model has it, so that what
earlier layers have got wrong is put right as far as it can be.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from finedeep_files.processes import are_several
from torch import nn

from ...configuration_finedeep import FinedeepConfig
from .residual_stream import CHUNK, through
from .sharing import Share, median, total

BATCH = 4096  # tokens of a step
RATE, WIDTH = 0.02, 64  # the largest step of a weight, as a share of its tensor's root mean square, up to this width
EVALUATIONS, PATIENCE = 10, 4  # on held-out tokens; so many without a new best are the end
LOGITS = 2**24  # values of logits in memory at a time


@dataclass(frozen=True)
class Objective:
    """What is to be small: the mean over tokens of `error(h, wanted)`, both (tokens, hidden), `rows` at a time."""

    error: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    rows: int


def stream_error(longest: float) -> Objective:
    """Mean over tokens of |h - h*|^2 / max(|h*|, longest)^2, h* the dense model's stream.

    Many models have one token, the first, whose stream is a hundred times as long as any other's; a plain square would
    see nothing else.

    Args:
        longest: what `longest_usual` says.
    """
    return Objective(lambda h, wanted: squared_errors(h, wanted, longest).mean(), CHUNK)


def squared_errors(h: torch.Tensor, wanted: torch.Tensor, least: float = 0.0) -> torch.Tensor:
    """|h - h*|^2 / max(|h*|, least)^2 of each token, (tokens,). Args: h and wanted (tokens, hidden)."""
    length = wanted.pow(2).sum(-1)
    return (h - wanted).pow(2).sum(-1) / length.clamp(min=max(least**2, torch.finfo(length.dtype).tiny))


@torch.no_grad()
def median_error(sublayers: nn.ModuleList, u: torch.Tensor, wanted: torch.Tensor, r: float) -> float:
    """The median over tokens of |h - h*| / |h*|. Args: as `error_of`."""
    device = sublayers[0].norm.weight.device
    found = [
        squared_errors(through(sublayers, x.to(device), r), y.to(device)).cpu()
        for x, y in zip(u.split(CHUNK), wanted.split(CHUNK), strict=True)
    ]
    return median(torch.cat(found)) ** 0.5


def logit_divergence(norm: torch.Tensor, head: torch.Tensor, config: FinedeepConfig) -> Objective:
    """KL(dense || converted) of the next token in nats, for the last layer: all that follows it is norm and head.

    Args:
        norm: (hidden,), the final norm's weight.
        head: (vocabulary, hidden).
        config: its `rms_norm_eps` and `logits_scaling` are used.
    """

    def log_p(h: torch.Tensor) -> torch.Tensor:
        n = nn.functional.rms_norm(h, norm.shape, norm, config.rms_norm_eps)
        return (n @ head.T / config.logits_scaling).log_softmax(-1)

    def error(h: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return nn.functional.kl_div(log_p(h), log_p(wanted), log_target=True, reduction="none").sum(-1).mean()

    return Objective(error, max(1, min(CHUNK, LOGITS // len(head))))


@torch.no_grad()
def error_of(sublayers: nn.ModuleList, u: torch.Tensor, wanted: torch.Tensor, r: float, objective: Objective) -> float:
    """The objective for a layer's sub-layers. Args: u and wanted (tokens, hidden), the streams before and after."""
    device = sublayers[0].norm.weight.device
    summed = torch.zeros(2, dtype=torch.double, device=device)
    for x, y in zip(u.split(objective.rows), wanted.split(objective.rows), strict=True):
        if len(x):  # all that are held out may be another process's
            error = objective.error(through(sublayers, x.to(device), r), y.to(device))
            summed += torch.stack([len(x) * error.double(), torch.full_like(error, len(x), dtype=torch.double)])
    summed = total(summed)
    return (summed[0] / summed[1]).item()


def fit(
    sublayers: nn.ModuleList,
    u: torch.Tensor,
    wanted: torch.Tensor,
    r: float,
    objective: Objective,
    *,
    held: int,
    steps: int,
    generator: torch.Generator,
    share: Share | None = None,
) -> Iterator[float]:
    """Train the sub-layers in place, and leave them as they were best on the held-out tokens.

    Args:
        sublayers: where to start from.
        u: (tokens, hidden), the converted model's stream before them.
        wanted: (tokens, hidden), the dense model's stream after its FFN.
        r: the model's residual multiplier.
        objective: what to lower.
        held: so many tokens, the first ones, are held out.
        steps: of 4,096 tokens each, drawn at random.
        generator: draws them.
        share: which of the text's tokens `u` and `wanted` have, where there are several processes. Each takes its own
            out of the same batches.

    Yields:
        After each step, the lowest error so far on the held-out tokens.
    """
    device = sublayers[0].norm.weight.device
    groups = _groups(sublayers, (wanted - u) / r)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    cycle, rates = steps + 1, [group["lr"] for group in groups]
    rising = max(0.1, 2 / cycle)  # two steps at least: torch divides by the number less one
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, cycle, pct_start=rising, final_div_factor=100)
    best, best_state, worse = error_of(sublayers, u[:held], wanted[:held], r, objective), _state(sublayers), 0
    order, first, end = torch.empty(0, dtype=torch.long), held, len(u)
    if share is not None:
        first, end = share.all_held, share.all_tokens
    for step in range(1, steps + 1):
        if len(order) < min(BATCH, end - first):
            order = first + torch.randperm(end - first, generator=generator)
        batch, order = order[:BATCH], order[BATCH:]
        for part in (batch if share is None else share.of_batch(batch)).split(objective.rows):
            x, y = u[part].to(device), wanted[part].to(device)
            with torch.enable_grad():
                (objective.error(through(sublayers, x, r), y) * (len(part) / len(batch))).backward()
        _sum_gradients(groups)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % max(1, steps // EVALUATIONS) == 0 or step == steps:
            error = error_of(sublayers, u[:held], wanted[:held], r, objective)
            if step > steps / 2:  # before that the rate is still high
                worse = 0 if error < best else worse + 1
            if error < best:
                best, best_state = error, _state(sublayers)
        yield best
        if worse == PATIENCE:
            break
    sublayers.load_state_dict(best_state)
    sublayers.requires_grad_(False)


def _sum_gradients(groups: list[dict[str, Any]]) -> None:
    """Give every parameter the sum of all processes' gradients."""
    if are_several():
        for parameter in (parameter for group in groups for parameter in group["params"]):
            parameter.grad = total(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)


def _state(sublayers: nn.ModuleList) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in sublayers.state_dict().items()}


def _groups(sublayers: nn.ModuleList, change: torch.Tensor) -> list[dict[str, Any]]:
    """The parameters, each with a learning rate that does not depend on the model's scales.

    AdamW moves every weight by up to the rate. A router starts at zero and has no scale of its own: it is to change a
    score <w, E> by a like share, with E as large as the median token's `change`, the sum of experts to be learnt, or
    <w, n>, with n as large as the norm's weight.
    """
    E = median(change.float().pow(2).mean(-1)) ** 0.5
    n = sublayers[0].norm.weight.detach().float().pow(2).mean().sqrt().item()
    scored = n if sublayers[0].routing_input == "hidden_state" else E
    rates = {"router": RATE / (scored * change.shape[1] ** 0.5), "expert_bias": RATE * E}
    groups = []
    for name, parameter in sublayers.requires_grad_(True).named_parameters():
        own = RATE * parameter.detach().pow(2).mean().sqrt().item()
        rate = rates.get(name.rpartition(".")[2]) or own or RATE  # a bias that is all zeros has no scale either
        groups.append({"params": [parameter], "lr": rate})
    return groups
