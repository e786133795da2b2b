"""What a model's FFNs do on a text, summed up as it goes by, in memory that does not grow with it.

A "place" is an FFN: one for each layer of a dense model, one for each sub-layer of a Finedeep model.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...modeling_finedeep import FinedeepSublayer
from ...operators_finedeep import expert_outputs
from ..errors import EvaluationError

THRESHOLDS = (0.01, 0.03, 0.1, 0.3, 1.0)
TAU = "0.1"  # the threshold of the non-sparse activation rate (NSAR) unless said otherwise
# Of the histogram: SiLU has no value below -0.28; what is beyond is counted at the ends.
BINS, LOWEST, HIGHEST = 250, -0.5, 2.0
EDGES = [LOWEST + i * (HIGHEST - LOWEST) / BINS for i in range(BINS + 1)]
NEAR = 0.05  # of 0 or 1: a sigmoid there hardly moves any more (a softmax is near 0 below that part of 1 / K)
NEVER = 0.01  # an expert whose share stays below that for every token never matters
WIDEST = 2048  # of an output whose second moments are held; wider ones are projected down to it
GATES = ("gate_proj", "gate_up_proj")  # of which an FFN has one, if it is gated
TOKENS_AT_ONCE = 256  # whose expert outputs are held


@dataclass
class Place:
    """One FFN or sub-layer. K is 0 for a dense FFN, which has no gates.

    `sums` over tokens, in float64: `above` (thresholds,) and `histogram` (bins,) of act(gate); `moments` (d, d) of the
    output; by expert, (K,), `gates` g, whether g / c is `near_0` or `near_1`, and `shares`
    ||g_k E_k|| / sum_j ||g_j E_j||, of which `largest` is the maximum; `products` (K, K) of the gates; `entropy` of
    g / sum(g), over log K.
    """

    layer: int
    sublayer: int
    K: int = 0
    c: float = 1.0
    function: str = "sigmoid"
    tokens: int = 0
    values: int = 0
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    largest: torch.Tensor | None = None

    def add(self, name: str, value: torch.Tensor) -> None:
        """Add to a sum, which begins with zeros."""
        value = value.double()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def add_activations(self, a: torch.Tensor) -> None:
        """Args: act(gate) (tokens, width)."""
        a = a.float().flatten()
        self.values += a.numel()
        for name, sum_of in OF_ACTIVATIONS.items():
            self.add(name, sum_of(a))

    def add_gates(self, g: torch.Tensor) -> None:
        """Args: g (tokens, K)."""
        g = g.double()
        self.add("gates", g.sum(0))
        self.add("products", g.T @ g)
        self.add("near_0", (g / self.c < NEAR / (self.K if self.function == "softmax" else 1)).sum(0))
        self.add("near_1", (g / self.c > 1 - NEAR).sum(0))
        if self.K > 1:
            self.add("entropy", torch.special.entr(g / g.sum(-1, keepdim=True)).sum() / math.log(self.K))

    def add_shares(self, norms: torch.Tensor) -> None:
        """Args: ||g_k E_k|| (tokens, K)."""
        shares = norms.double() / norms.double().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        self.add("shares", shares.sum(0))
        most = shares.amax(0)
        self.largest = most if self.largest is None else torch.maximum(self.largest, most)

    def add_output(self, y: torch.Tensor) -> None:
        """Args: y (tokens, d), what is added to the residual stream."""
        self.tokens += len(y)
        if y.shape[-1] > WIDEST:
            y = y.float() @ projection(y.shape[-1], y.device)
        y = y.double()  # squares would drown the smaller directions
        self.add("moments", y.T @ y)

    def summary(self) -> dict[str, Any]:
        """Everything as plain numbers."""
        found = {"layer": self.layer, "sublayer": self.sublayer, "values": self.values}
        found |= {name: figure(self) for name, figure in FIGURES.items()}
        if self.K:
            found["gates"] = self._gates()
        return found

    def _gates(self) -> dict[str, Any]:
        mean = self.sums["gates"] / self.tokens
        covariance = self.sums["products"] / self.tokens - mean[:, None] * mean
        std = covariance.diagonal().clamp_min(0).sqrt()
        moving = std > 1e-6 * self.c  # a constant gate has no correlation with anything
        correlation = covariance / (std[:, None] * std)
        pairs = moving[:, None] & moving & ~torch.eye(self.K, dtype=torch.bool, device=mean.device)
        return {
            "c": self.c,
            "mean": mean.tolist(),
            "std": std.tolist(),
            "near_0": (self.sums["near_0"] / self.tokens).tolist(),
            "near_1": (self.sums["near_1"] / self.tokens).tolist(),
            "entropy": float(self.sums["entropy"] / self.tokens) if self.K > 1 else None,
            "correlation": [
                [float(r) if ok else None for r, ok in zip(row, oks, strict=True)]
                for row, oks in zip(correlation, moving[:, None] & moving, strict=True)
            ],
            "mean_absolute_correlation": float(correlation[pairs].abs().mean()) if pairs.any() else None,
            "mean_share": (self.sums["shares"] / self.tokens).tolist(),
            "largest_share": self.largest.tolist(),
            "never_matters": int((self.largest < NEVER).sum()),
        }


def rates(above: torch.Tensor, values: int) -> dict[str, float]:
    """NSAR by threshold: the share of |act(gate)| above it (arXiv:2502.12928)."""
    return {str(t): float(n) / values for t, n in zip(THRESHOLDS, above, strict=True)}


def effective_rank(moments: torch.Tensor) -> float:
    """exp of the entropy of the singular values over their sum (Roy & Vetterli, 2007). Args: Y'Y (d, d)."""
    singular = torch.linalg.eigvalsh(moments.cpu()).clamp_min(0).sqrt()
    if not singular.sum():
        return 0.0
    return float(torch.special.entr(singular / singular.sum()).sum().exp())


# What is summed over values of act(gate), (values,), by name. To add a statistic, add its sum here, its figure below.
OF_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "above": lambda a: torch.stack([(a.abs() > t).sum() for t in THRESHOLDS]),
    "histogram": lambda a: torch.histc(a.clamp(LOWEST, HIGHEST), BINS, LOWEST, HIGHEST),
}
# What a place's sums say, as JSON, by name.
FIGURES: dict[str, Callable[[Place], Any]] = {
    "nsar": lambda place: rates(place.sums["above"], place.values),
    "histogram": lambda place: place.sums["histogram"].long().tolist(),
    "effective_rank": lambda place: effective_rank(place.sums["moments"]),
}


@cache
def projection(width: int, device: torch.device) -> torch.Tensor:
    """(width, WIDEST): a random one keeps lengths and angles (Johnson & Lindenstrauss, 1984), and its seed is fixed."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(width, WIDEST, generator=generator) / WIDEST**0.5).to(device)


def places_of(model: PreTrainedModel) -> list[tuple[Place, nn.Module]]:
    """The places of a Finedeep or a dense Llama-style model, with their modules.

    Raises:
        EvaluationError: the model has no gated FFN that is known here.
    """
    found: list[tuple[Place, nn.Module]] = []
    for i, layer in enumerate(getattr(model.base_model, "layers", [])):
        for m, ffn in enumerate(getattr(layer, "sublayers", None) or [getattr(layer, "mlp", None)]):
            if isinstance(ffn, FinedeepSublayer):
                gates = (ffn.num_experts, ffn.routed_scaling_factor, ffn.routing_function)
                found.append((Place(i, m, *gates), ffn))
            elif any(hasattr(ffn, name) for name in GATES) and activation_of(ffn) is not None:
                found.append((Place(i, m), ffn))
            else:
                raise not_known(model)
    if not found:
        raise not_known(model)
    return found


def not_known(model: PreTrainedModel) -> EvaluationError:
    """What to say of a model that cannot be looked into."""
    return EvaluationError(
        f"not every layer of {type(model).__name__} has a gated FFN that is known here; inspect a Finedeep model, or "
        "a dense one of a family that `finedeep convert` takes."
    )


def activation_of(ffn: nn.Module) -> nn.Module | None:
    """The module of act in act(gate) * up, whose output is what is counted. Phi-3 has another name for it."""
    return getattr(ffn, "act_fn", None) or getattr(ffn, "activation_fn", None)


def live_neurons(ffn: nn.Module) -> torch.Tensor | None:
    """Which neurons (width,) are there; the others put out nothing, as those that conversion fills experts up with do.

    None: all. So it is where W_down is zero altogether, as in a sub-layer that has grown and not yet learnt.
    """
    weight = getattr(getattr(ffn, "down_proj", None), "weight", None)
    if not isinstance(ffn, FinedeepSublayer) or weight is None or not weight.is_floating_point():
        return None
    live = weight.ne(0).any(0)
    return None if live.all() or not live.any() else live


def watch(place: Place, ffn: nn.Module) -> Iterator[Any]:
    """Hooks that add to a place whatever the FFN does; handles to remove them by."""
    live, seen = live_neurons(ffn), {}

    def see_activation(module: nn.Module, inputs: Any, a: torch.Tensor) -> None:
        a = a.flatten(0, -2)
        seen["act"] = a
        place.add_activations(a if live is None else a[:, live])

    def see_up(module: nn.Module, inputs: Any, up: torch.Tensor) -> None:
        seen["up"] = up.flatten(0, -2)

    def see_output(module: nn.Module, inputs: Any, output: Any) -> None:
        if not place.K:
            place.add_output(output.flatten(0, -2))
            return
        y, g = (value.flatten(0, -2) for value in output)
        place.add_output(y)
        place.add_gates(g)
        a = (seen.pop("act") * seen.pop("up")).unflatten(-1, (place.K, -1))
        for part, weights in zip(a.split(TOKENS_AT_ONCE), g.split(TOKENS_AT_ONCE), strict=True):
            E = expert_outputs(ffn.down_proj, part[None])[0].float()
            if ffn.expert_bias is not None:
                E = E + ffn.expert_bias
            place.add_shares(E.norm(dim=-1) * weights.float())

    yield activation_of(ffn).register_forward_hook(see_activation)
    if place.K:
        yield ffn.up_proj.register_forward_hook(see_up)
    yield ffn.register_forward_hook(see_output)
