"""The three models that do the same work: dense Llama, Finedeep, and Finedeep whose experts run in a loop."""

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel

from ..configuration_finedeep import FinedeepConfig
from ..modeling_finedeep import FinedeepForCausalLM, FinedeepSublayer

CONTENDERS = ("dense", "finedeep", "loop")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """A dense Llama's sizes. Finedeep of the same shape cuts `intermediate_size` into M * K experts."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int


# Named for the parameters of the dense model; the last one has the sizes of Llama 3.2 1B (meta-llama, its config.json).
SHAPES = {
    "11M": Shape(256, 8, 1024, 4, 4, 8192),
    "28M": Shape(512, 8, 1536, 8, 8, 2048),
    "31M": Shape(512, 8, 1536, 8, 8, 8192),
    "98M": Shape(768, 12, 2048, 12, 12, 16384),
    "325M": Shape(1024, 24, 2816, 16, 16, 16384),
    "1.2B": Shape(2048, 16, 8192, 32, 8, 128256),
}


class ExpertLoop(nn.Module):
    """A sub-layer as most mixture-of-experts code has it: one module for each expert, run one after the other."""

    def __init__(self, sublayer: FinedeepSublayer):
        super().__init__()
        K, e = sublayer.num_experts, sublayer.expert_width
        hidden = sublayer.router.shape[1]
        self.norm = sublayer.norm
        self.router = sublayer.router
        self.act_fn = sublayer.act_fn
        self.routed_scaling_factor = sublayer.routed_scaling_factor
        self.gates = nn.ModuleList(nn.Linear(hidden, e, bias=False) for _ in range(K))
        self.ups = nn.ModuleList(nn.Linear(hidden, e, bias=False) for _ in range(K))
        self.downs = nn.ModuleList(nn.Linear(e, hidden, bias=False) for _ in range(K))
        with torch.no_grad():
            for k in range(K):
                mine = slice(k * e, (k + 1) * e)
                self.gates[k].weight.copy_(sublayer.gate_proj.weight[mine])
                self.ups[k].weight.copy_(sublayer.up_proj.weight[mine])
                self.downs[k].weight.copy_(sublayer.down_proj.weight[:, mine])

    def forward(self, h: torch.Tensor, cache: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """As `FinedeepSublayer`: h (batch, seq, hidden) to the weighted sum, and the gates (batch, seq, K)."""
        n = self.norm(h)
        combined, gates = torch.zeros_like(h), []
        for gate, up, down, w in zip(self.gates, self.ups, self.downs, self.router, strict=True):
            E = down(self.act_fn(gate(n)) * up(n))
            g = self.routed_scaling_factor * torch.sigmoid((E * w).sum(-1, keepdim=True))
            combined = combined + g * E
            gates.append(g)
        return combined, torch.cat(gates, dim=-1)


def config_of(contender: str, shape: Shape, M: int, K: int) -> PretrainedConfig:
    """The contender's configuration, of the same shape for all."""
    fields = asdict(shape) | {"max_position_embeddings": 32768, "tie_word_embeddings": True}
    if contender == "dense":
        return LlamaConfig(**fields)
    return FinedeepConfig(**fields, num_expert_sublayers=M, num_experts_per_sublayer=K)


def build(contender: str, shape: Shape, M: int, K: int, dtype: str, device: str) -> PreTrainedModel:
    """A model with seeded random weights. The routers are random too, so that gates differ and none is a constant."""
    torch.manual_seed(0)
    config = config_of(contender, shape, M, K)
    with torch.device(device):  # a large model takes its time to be made on a CPU and moved
        if contender == "dense":
            model = LlamaForCausalLM(config)
        else:
            model = FinedeepForCausalLM(config)
            randomise_routers(model)
    if contender == "loop":
        swap_in_loops(model)
    return model.to(device=device, dtype=DTYPES[dtype])


def randomise_routers(model: nn.Module) -> None:
    """Scores of a size that a trained router might have."""
    generator = torch.Generator("cpu").manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, FinedeepSublayer):
                module.router.copy_(torch.randn(module.router.shape, generator=generator, device="cpu"))


def swap_in_loops(model: nn.Module) -> None:
    """Replace every sub-layer by its loop. What the two compute is the same."""
    for layer in model.model.layers:
        layer.sublayers = nn.ModuleList(ExpertLoop(sublayer) for sublayer in layer.sublayers)


def largest_difference(shape: Shape, M: int, K: int, dtype: str, device: str) -> float:
    """How far Finedeep's logits are from the loop's at most, as a share of the largest logit: that the work is one."""
    model = build("finedeep", shape, M, K, dtype, device)
    loop = copy.deepcopy(model)
    swap_in_loops(loop)
    loop.to(device=device, dtype=DTYPES[dtype])
    worst = 0.0
    for tokens in (1, 64):  # both forms of a sub-layer
        ids = torch.arange(tokens, device=device).view(1, -1)
        with torch.no_grad():
            found, expected = model(ids).logits.float(), loop(ids).logits.float()
        worst = max(worst, ((found - expected).abs().max() / expected.abs().max()).item())
    return worst


def parameters_of(shape: str, M: int, K: int) -> dict[str, int]:
    """How many parameters dense and Finedeep have."""
    counts = {}
    for contender in CONTENDERS[:2]:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config_of(contender, SHAPES[shape], M, K))
        model.tie_weights()  # which transformers 5.0 leaves undone without memory
        counts[contender] = sum(parameter.numel() for parameter in model.parameters())
    return counts
