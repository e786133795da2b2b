"""How the cost of a decoder layer's FFN grows with tokens, K, M and d, beside a dense FFN: without attention.

Here a block is what Finedeep replaces: RMSNorm, FFN and residual; M of them for Finedeep. Whole models dilute the ratio
with attention and embeddings, which are the same for both. Short work is repeated on the same weights, which caches may
then hold, as they do not when a whole model decodes.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from finedeep_files.timing import Work, interleaved, let_go
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from ..modeling_finedeep import FinedeepSublayer
from .models import DTYPES, ExpertLoop, Shape, config_of, randomise_routers

BLOCKS = ("dense", "finedeep", "loop", "definition", "one_product")


@dataclass(frozen=True)
class Block:
    """One point of a curve; `along` says of which."""

    along: str
    tokens: int = 1024
    M: int = 2
    K: int = 8
    hidden_size: int = 1024
    dtype: str = "float32"
    backward: bool = False

    def fields(self) -> dict[str, Any]:
        """The point as the results have it."""
        return asdict(self)


def points(device: str) -> list[Block]:
    """The curves, inference and training."""
    dtype = "float32" if device == "cpu" else "bfloat16"
    plan = [
        *(Block("tokens", tokens=2**i) for i in range(15)),
        *(Block("K", K=2**i) for i in range(7)),
        *(Block("M", M=M) for M in (1, 2, 4, 8)),
        *(Block("d", hidden_size=d) for d in (256, 512, 1024, 2048)),
        *(Block("K, one token", tokens=1, K=2**i) for i in range(7)),
        *(Block("M, one token", tokens=1, M=M) for M in (1, 2, 4, 8)),
        *(Block("d, one token", tokens=1, hidden_size=d) for d in (256, 512, 1024, 2048)),
        *(Block("tokens, training", tokens=t, backward=True) for t in (128, 1024, 4096)),
        *(Block("K, training", K=K, backward=True) for K in (1, 8, 64)),
        *(Block("M, training", M=M, backward=True) for M in (1, 2, 4, 8)),
        *(Block("d, training", hidden_size=d, backward=True) for d in (256, 512, 1024, 2048)),
    ]
    return [replace(block, dtype=dtype) for block in plan]


class DenseBlock(nn.Module):
    """Llama's norm, FFN and residual."""

    def __init__(self, config: Any):
        super().__init__()
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.mlp(self.norm(h))


class SublayerBlock(nn.Module):
    """M sub-layers, each with its residual."""

    def __init__(self, sublayers: list[nn.Module]):
        super().__init__()
        self.sublayers = nn.ModuleList(sublayers)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        for sublayer in self.sublayers:
            h = h + sublayer(h)[0]
        return h


def build_block(kind: str, block: Block, device: str) -> nn.Module:
    """A block of I = 2.75 d, as in Llama, rounded so that every M * K of the curves divides it."""
    torch.manual_seed(0)
    d = block.hidden_size
    shape = Shape(d, 1, d * 11 // 4 // 128 * 128, 8, 8, 8)
    config = config_of("dense" if kind == "dense" else "finedeep", shape, block.M, block.K)
    if kind == "dense":
        module: nn.Module = DenseBlock(config)
    else:
        sublayers = [FinedeepSublayer(config) for _ in range(block.M)]
        for sublayer in sublayers:
            randomise_routers(sublayer)
            if kind in FORCED:
                sublayer.definition_max_tokens = FORCED[kind]
        module = SublayerBlock([ExpertLoop(s) for s in sublayers] if kind == "loop" else sublayers)
    return module.to(device=device, dtype=DTYPES[block.dtype])


FORCED = {"definition": 2**62, "one_product": 0}  # the tokens up to which a sub-layer computes every E_k


def run_block(block: Block, kinds: tuple[str, ...], seconds: float, device: str) -> dict[str, list[float]]:
    """Time one point. Returns seconds, by kind of block and round."""
    generator = torch.Generator().manual_seed(2)
    h = torch.randn(1, block.tokens, block.hidden_size, generator=generator).to(device, DTYPES[block.dtype])
    # Short work is repeated within a run, so that a run is well above the clock's and the interpreter's noise.
    repeats = max(1, 64 // block.tokens)
    works = {kind: work_of(build_block(kind, block, device), h, block.backward, repeats) for kind in kinds}
    taken = interleaved(works, seconds, device)
    del works
    let_go(device)
    return {kind: [t / repeats for t in times] for kind, times in taken.items()}


def work_of(module: nn.Module, h: torch.Tensor, backward: bool, repeats: int) -> Work:
    """Forward alone, or with backward to the weights and to h."""
    do: Callable[[Any], None]
    if backward:
        h = h.clone().requires_grad_()
        direction = torch.randn_like(h)

        def do(_: Any) -> None:
            for _ in range(repeats):
                torch.autograd.grad(module(h), [h, *module.parameters()], direction)
    else:

        @torch.no_grad()
        def do(_: Any) -> None:
            for _ in range(repeats):
                module(h)

    return Work(lambda: None, do)
