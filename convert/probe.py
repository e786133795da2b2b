"""How far each converted FFN is from the dense one, on a small batch of tokens.

The batch is what enters the first layer: the embeddings of a few tokens, drawn by the seed. Deeper layers are probed
with it too. It is no measure of quality, but of whether the conversion did what was meant: some 1e-7 where it is exact.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from transformers.activations import ACT2FN

from ..configuration_finedeep import FinedeepConfig

TOKENS = 4
CACHED = 2**19  # values of a weight that are in float32 at a time, few enough for a core's cache


class HalfFFN:
    """A SwiGLU FFN that sees its tensors pass by, a few rows at a time: activations are kept, weights are not."""

    def __init__(self, n: torch.Tensor, act: torch.nn.Module):
        self.n = n
        self.act = act
        self.pre = {"gate_proj": 0.0, "up_proj": 0.0}
        self.out: torch.Tensor | float = 0.0

    def watch(self, module: str, kind: str, blocks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Hand on the rows of a tensor of gate_proj, up_proj or, which has to come last, down_proj."""
        if kind == "bias":
            parts = []
            for rows in blocks:
                parts.append(rows.float())
                yield rows
            bias = torch.cat(parts)
            self._add(module, bias.sum(0) if bias.dim() == 2 else bias)  # each expert has one of its own, or all one
            return
        x = self.n if module in self.pre else self.act(self.pre["gate_proj"]) * self.pre["up_proj"]
        products = []
        for rows in blocks:
            products += [x @ part.float().T for part in rows.split(max(1, CACHED // rows.shape[1]))]
            yield rows
        self._add(module, torch.cat(products, dim=1))

    def _add(self, module: str, product: torch.Tensor) -> None:
        if module in self.pre:
            self.pre[module] = self.pre[module] + product
        else:
            self.out = self.out + product


class LayerProbe:
    """One decoder layer's FFN, dense and cut, on the same residual stream h (batch, hidden)."""

    def __init__(self, h: torch.Tensor, norm: torch.Tensor, config: FinedeepConfig):
        self.h = h
        self.norm = norm.float()
        self.eps = config.rms_norm_eps
        self.act = ACT2FN[config.hidden_act]
        self.r = config.residual_multiplier
        self.dense = HalfFFN(self._normalised(h), self.act)
        self.sublayers: list[HalfFFN] = []

    def sublayer(self, m: int) -> HalfFFN:
        """Sub-layer m, which has to be seen whole before the next."""
        if m == len(self.sublayers):
            done = sum(sublayer.out for sublayer in self.sublayers)
            self.sublayers.append(HalfFFN(self._normalised(self.h + self.r * done), self.act))
        return self.sublayers[m]

    def difference(self) -> float:
        """||cut - dense|| / ||dense||; 0 where both put out nothing."""
        apart = (sum(sublayer.out for sublayer in self.sublayers) - self.dense.out).norm()
        return (apart / self.dense.out.norm()).item() if apart else 0.0

    def _normalised(self, h: torch.Tensor) -> torch.Tensor:
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps) * self.norm


def probe_tokens(vocabulary: int, seed: int) -> Sequence[int]:
    """The tokens whose embeddings are the batch."""
    return torch.randint(vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(seed)).tolist()
