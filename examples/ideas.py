"""Ideas beyond the paper: what experts and gates might add that a dense FFN with a second norm cannot have.

A recipe names them, `ideas: [expert_norms]`, and examples/plain.py trains a Finedeep model that was changed so before
its first step. No checkpoint can carry such code, so nothing else takes such a recipe. Fields of `FinedeepConfig`,
`initialise` and `rates` reach other ideas without any code: examples/gpu_grid.yaml.
"""

import sys
from collections.abc import Callable

import from_checkout  # noqa: F401
import torch
from finedeep import FinedeepForCausalLM
from finedeep.modeling_finedeep import FinedeepSublayer
from finedeep.operators_finedeep import dot, expert_outputs
from torch import nn


class NormedScores(FinedeepSublayer):
    """Scores are read from normalised outputs: s_k = <w_k, E_k / rms(E_k)>."""

    definition_max_tokens = sys.maxsize

    def definition(self, G: torch.Tensor, U: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Args as of the overridden one. Returns the weighted sum (batch, seq, hidden) and g (batch, seq, K)."""
        a = (self.act_fn(G) * U).unflatten(-1, (self.num_experts, self.expert_width))
        E = expert_outputs(self.down_proj, a)
        normed = nn.functional.rms_norm(E, E.shape[-1:], eps=self.norm.variance_epsilon)
        gates, c = self.routing
        g = c * gates(dot(normed, self.router))
        return (g.unsqueeze(-1) * self.scaled(E, normed)).sum(-2), g

    def scaled(self, E: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """What is added up, (batch, seq, K, hidden)."""
        return E


class ExpertNorms(NormedScores):
    """Each expert has an RMSNorm on its output, before score and sum: E_k <- u_k * E_k / rms(E_k)."""

    def scaled(self, E: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """What is added up, (batch, seq, K, hidden)."""
        return normed * self.expert_norm.view(self.num_experts, -1)


def normed_scores(model: FinedeepForCausalLM) -> None:
    """Read scores from normalised outputs."""
    for sublayer in sublayers_of(model):
        sublayer.__class__ = NormedScores


def expert_norms(model: FinedeepForCausalLM) -> None:
    """Give each expert a norm, of which the sum starts as long as the sandwich norm's output: 0.1 a channel."""
    for sublayer in sublayers_of(model):
        sublayer.__class__ = ExpertNorms
        K, hidden = sublayer.router.shape
        weights = torch.full((K * hidden,), 0.1 / K**0.5, dtype=sublayer.router.dtype)  # a vector, so it does not decay
        sublayer.expert_norm = nn.Parameter(weights)


def sublayers_of(model: FinedeepForCausalLM) -> list[FinedeepSublayer]:
    """All of them, in order."""
    return [sublayer for layer in model.model.layers for sublayer in layer.sublayers]


IDEAS: dict[str, Callable[[FinedeepForCausalLM], None]] = {
    "normed_scores": normed_scores,
    "expert_norms": expert_norms,
}
