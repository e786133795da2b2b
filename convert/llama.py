"""What maps to what: the tensors of a dense Llama and of the Finedeep model made from it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import LlamaConfig

from .neurons import gather

# Tensors that some checkpoints carry although the config determines them.
RECOMPUTED = ("rotary_emb.inv_freq",)

Make = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Target:
    """One tensor to write: `make(source tensor, neurons of its sub-layer (K, e))`."""

    name: str
    source: str
    make: Make


def _same(tensor: torch.Tensor, neurons: torch.Tensor) -> torch.Tensor:
    return tensor


def _rows(tensor: torch.Tensor, neurons: torch.Tensor) -> torch.Tensor:
    return gather(tensor, 0, neurons)


def _columns(tensor: torch.Tensor, neurons: torch.Tensor) -> torch.Tensor:
    return gather(tensor, 1, neurons)


def _zero_router(down: torch.Tensor, neurons: torch.Tensor) -> torch.Tensor:
    return down.new_zeros(neurons.shape[0], down.shape[0])


def _share(num_sublayers: int) -> Make:
    """The dense FFN's one output bias (hidden), shared equally by all M * K experts."""

    def make(bias: torch.Tensor, neurons: torch.Tensor) -> torch.Tensor:
        num_experts = neurons.shape[0]
        return (bias / (num_sublayers * num_experts)).expand(num_experts, -1).contiguous()

    return make


def dense_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a dense checkpoint with this config must hold."""
    d, width = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, d),
        "model.norm.weight": (d,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    linear = {
        "self_attn.q_proj": (q, d, config.attention_bias),
        "self_attn.k_proj": (kv, d, config.attention_bias),
        "self_attn.v_proj": (kv, d, config.attention_bias),
        "self_attn.o_proj": (d, q, config.attention_bias),
        "mlp.gate_proj": (width, d, config.mlp_bias),
        "mlp.up_proj": (width, d, config.mlp_bias),
        "mlp.down_proj": (d, width, config.mlp_bias),
    }
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        for name, (rows, columns, biased) in linear.items():
            shapes[f"{layer}{name}.weight"] = (rows, columns)
            if biased:
                shapes[f"{layer}{name}.bias"] = (rows,)
        shapes[f"{layer}input_layernorm.weight"] = (d,)
        shapes[f"{layer}post_attention_layernorm.weight"] = (d,)
    return shapes


def finedeep_targets(config: LlamaConfig, num_sublayers: int) -> Iterator[tuple[int, Target]]:
    """Every tensor of the Finedeep model, with the number m of the sub-layer whose neurons it is made of."""
    ffn: dict[str, tuple[str, Make]] = {
        "norm.weight": ("post_attention_layernorm.weight", _same),
        "gate_proj.weight": ("mlp.gate_proj.weight", _rows),
        "up_proj.weight": ("mlp.up_proj.weight", _rows),
        "down_proj.weight": ("mlp.down_proj.weight", _columns),
        "router": ("mlp.down_proj.weight", _zero_router),
    }
    if config.mlp_bias:
        ffn["gate_proj.bias"] = ("mlp.gate_proj.bias", _rows)
        ffn["up_proj.bias"] = ("mlp.up_proj.bias", _rows)
        ffn["expert_bias"] = ("mlp.down_proj.bias", _share(num_sublayers))
    replaced = {source for source, _ in ffn.values()}
    for name in dense_shapes(config):
        if not name.endswith(tuple(replaced)):
            yield 0, Target(name, name, _same)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        for m in range(num_sublayers):
            for name, (source, make) in ffn.items():
                yield m, Target(f"{layer}sublayers.{m}.{name}", layer + source, make)
