"""How far each converted FFN is from the dense one, on a small batch of tokens.

The batch is what enters the first layer: the embeddings of a few tokens, drawn by the seed. Deeper layers are probed
with it too. It is no measure of quality, but of whether the conversion did what was meant: some 1e-7 where it is exact.
"""

from collections.abc import Sequence

import torch
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

TOKENS = 8
CHUNK = 2**18  # values of a weight that are held in float32 at a time: few enough to stay in a core's cache


def linear(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """X W' in float32, a few rows of W at a time. Args: x (batch, in), W (out, in)."""
    return torch.cat([x @ rows.float().T for rows in W.split(max(1, CHUNK // W.shape[1]))], dim=1)


class HalfFFN:
    """A SwiGLU FFN that is given its tensors one by one: activations are kept, weights are not."""

    def __init__(self, n: torch.Tensor, act: torch.nn.Module):
        self.n = n
        self.act = act
        self.pre = {"gate_proj": 0.0, "up_proj": 0.0}
        self.out: torch.Tensor | float = 0.0

    def take(self, module: str, kind: str, tensor: torch.Tensor) -> None:
        """Use a tensor; `module` is one of gate_proj, up_proj, down_proj, which has to come last."""
        if module in self.pre:
            self.pre[module] = self.pre[module] + (linear(self.n, tensor) if kind == "weight" else tensor.float())
        elif kind == "weight":
            a = self.act(self.pre["gate_proj"]) * self.pre["up_proj"]
            self.out = self.out + linear(a, tensor)
        else:
            self.out = self.out + tensor.float()


class LayerProbe:
    """One decoder layer's FFN, dense and cut, on the same residual stream h (batch, hidden)."""

    def __init__(self, h: torch.Tensor, norm: torch.Tensor, config: PretrainedConfig):
        self.h = h
        self.norm = norm.float()
        self.eps = config.rms_norm_eps
        self.act = ACT2FN[config.hidden_act]
        self.r = getattr(config, "residual_multiplier", 1.0)
        self.dense = HalfFFN(self._normalised(h), self.act)
        self.sublayers: list[HalfFFN] = []

    def take_dense(self, module: str, kind: str, tensor: torch.Tensor) -> None:
        """A tensor of the dense FFN."""
        self.dense.take(module, kind, tensor)

    def take(self, m: int, module: str, kind: str, tensor: torch.Tensor) -> None:
        """A tensor of sub-layer m, as it is written. Sub-layers come one after the other."""
        if m == len(self.sublayers):
            before = self.h if m == 0 else self._after(m - 1)
            self.sublayers.append(HalfFFN(self._normalised(before), self.act))
        self.sublayers[m].take(module, kind, tensor)

    def difference(self) -> float:
        """||cut - dense|| / ||dense||."""
        total = sum(sublayer.out for sublayer in self.sublayers)
        return ((total - self.dense.out).norm() / self.dense.out.norm()).item()

    def _after(self, m: int) -> torch.Tensor:
        return self.h + self.r * sum(sublayer.out for sublayer in self.sublayers[: m + 1])

    def _normalised(self, h: torch.Tensor) -> torch.Tensor:
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps) * self.norm


def probe_tokens(vocabulary: int, seed: int) -> Sequence[int]:
    """The tokens whose embeddings are the batch."""
    return torch.randint(vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(seed)).tolist()
