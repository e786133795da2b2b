"""The residual stream of a text, of the dense model and of the converted one, with one decoder layer in memory.

A dense layer is a Finedeep layer with M = K = 1. So every family that can be converted can be run here, from its own
tensors and without its own classes. All is computed in float32.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from finedeep_files.errors import ConversionError
from torch import nn

from ...configuration_finedeep import PER_LAYER, FinedeepConfig
from ...modeling_finedeep import FinedeepModel, FinedeepSublayer, LlamaRotaryEmbedding
from ..cut import layer_tensors
from ..plan import Plan, make_plan
from .sharing import everywhere, median

LONG = 4  # times the median token's stream
CHUNK = 8192  # tokens that are worked on at a time


class Stream:
    """h (batch, seq, hidden), on the CPU, of the dense model and of the converted one: `dense` and `finedeep`."""

    def __init__(self, plan: Plan, tokens: torch.Tensor, device: torch.device):
        """Args: tokens (batch, seq), all of them text, no padding."""
        self.plan, self.device = plan, device
        one = replace(plan.options, num_expert_sublayers=1, num_experts_per_sublayer=1, mode="split", dtype="float32")
        calibrated = {"calibrate": None, "calibration_tokens": None, "calibration_steps": None}
        self.dense_plan = make_plan(plan.dense, replace(one, assignment="contiguous", text=None, **calibrated))
        embeddings = plan.dense.load("model.embed_tokens.weight").float()
        self.dense = nn.functional.embedding(tokens, embeddings) * plan.config.embedding_multiplier
        self.finedeep = self.dense.clone()

    def attend(self, layer: int) -> FinedeepSublayer:
        """Take both streams past a layer's attention, which the two models share. Returns its dense FFN.

        Raises:
            ConversionError: the dense model's activations are NaN or infinite.
        """
        width = self.plan.dense_config.intermediate_size
        tensors = layer_tensors(self.dense_plan, layer, torch.arange(width).view(1, 1, width))
        attention = self._attention(layer, tensors)
        for h in (self.dense, self.finedeep):
            over_chunks(lambda x: attention(inputs_embeds=x, use_cache=False).last_hidden_state, h, self.device)
        self.check(f"after the attention of layer {layer}")
        return sublayers_from(self.dense_plan.config, tensors, layer, self.device)[0]

    def check(self, where: str) -> None:
        """Raise `ConversionError` where the dense model's activations are NaN or infinite."""
        finite = not self.dense.numel() or bool(torch.isfinite(torch.stack(self.dense.aminmax())).all())
        if not everywhere(finite, self.device):
            raise ConversionError(
                f"{where} the dense model's activations are NaN or infinite. The checkpoint is "
                "damaged, or config.json is not its own."
            )

    def _attention(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> FinedeepModel:
        """A decoder of one layer that has no FFN: h -> h + r * Attention(RMSNorm(h)), masks and RoPE included."""
        config = copy.deepcopy(self.dense_plan.config)
        config.num_hidden_layers, config.embedding_multiplier, config.output_router_logits = 1, 1.0, False
        for field in PER_LAYER:
            values = getattr(self.dense_plan.config, field)
            setattr(config, field, None if values is None else values[layer : layer + 1])
        with torch.device("meta"):
            model = FinedeepModel(config).eval().requires_grad_(False)
        model.layers[0].sublayers = nn.ModuleList()
        model.embed_tokens, model.norm = None, nn.Identity()
        model.rotary_emb = LlamaRotaryEmbedding(config=config).to(self.device)
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if ".sublayers." not in name}
        model.layers[0].load_state_dict({name: tensor.to(self.device) for name, tensor in own.items()}, assign=True)
        return model


def sublayers_from(
    config: FinedeepConfig, tensors: Mapping[str, torch.Tensor], layer: int, device: torch.device
) -> nn.ModuleList:
    """A layer's M sub-layers, in float32, from its tensors by their names in the checkpoint."""
    with torch.device("meta"):
        sublayers = nn.ModuleList(FinedeepSublayer(config) for _ in range(config.num_expert_sublayers))
    prefix = f"model.layers.{layer}.sublayers."
    own = {name.removeprefix(prefix): t.float().to(device) for name, t in tensors.items() if name.startswith(prefix)}
    sublayers.load_state_dict(own, assign=True)
    return sublayers.requires_grad_(False)


def through(sublayers: nn.Module, h: torch.Tensor, r: float) -> torch.Tensor:
    """h (..., hidden) after sub-layers one after the other: h <- h + r * sum_k g_k * E_k."""
    for sublayer in sublayers:
        h = torch.add(h, sublayer(h)[0], alpha=r)
    return h


@torch.inference_mode()
def over_chunks(function: Callable[[torch.Tensor], torch.Tensor], h: torch.Tensor, device: torch.device) -> None:
    """Put function(h) in h's place, some rows of h (batch, seq, hidden) at a time."""
    for part in h.split(max(1, CHUNK // h.shape[1])):
        part.copy_(function(part.to(device)))


def longest_usual(wanted: torch.Tensor) -> float:
    """How long a usual token's stream is at most: L = 4 times the median. Args: wanted (tokens, hidden), h*.

    Longer ones are massive activations (arXiv:2402.17762), 10 to 180 times the median in SmolLM2-135M. In a model that
    has none, all tokens weigh the same: weighing each by its own length made stories260k a little worse.
    """
    return LONG * median(torch.linalg.vector_norm(wanted, dim=-1))


def token_weights(wanted: torch.Tensor) -> torch.Tensor:
    """L / max(|h*|, L) of each token, (tokens, 1), with L of `longest_usual`. Args: wanted (tokens, hidden), h*."""
    longest = longest_usual(wanted)
    return longest / torch.linalg.vector_norm(wanted, dim=-1, keepdim=True).clamp(min=longest)
