"""From dense tensors to Finedeep tensors: which is made of which, and how.

Nothing here reads a weight: names, shapes and row ranges only. What a dense checkpoint must hold is asked of the
family's own class in transformers, built without memory.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from finedeep_files.errors import ConversionError
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from ..configuration_finedeep import FinedeepConfig
from ..modeling_finedeep import FinedeepForCausalLM
from .families import Family

# Tensors that some checkpoints carry although the config determines them.
RECOMPUTED = ("rotary_emb.inv_freq",)
# A tensor of a sub-layer: the dense FFN's tensor that it is made of, the part of it that a sub-layer gets, and the
# dimension along which its neurons lie.
SUBLAYER = {
    "gate_proj.weight": ("mlp.gate_proj.weight", "neurons", 0),
    "gate_proj.bias": ("mlp.gate_proj.bias", "neurons", 0),
    "up_proj.weight": ("mlp.up_proj.weight", "neurons", 0),
    "up_proj.bias": ("mlp.up_proj.bias", "neurons", 0),
    "down_proj.weight": ("mlp.down_proj.weight", "neurons", 1),
    "expert_bias": ("mlp.down_proj.bias", "share", 0),
    "router": ("mlp.down_proj.weight", "zeros", 0),
    "norm.weight": ("post_attention_layernorm.weight", "whole", 0),
}
# In grow mode, what sub-layers after the first are made of instead. Those with a zero W_down change nothing.
GROWN = {
    "gate_proj.weight": "random",
    "up_proj.weight": "random",
    "gate_proj.bias": "zeros",
    "up_proj.bias": "zeros",
    "down_proj.weight": "zeros",
    "expert_bias": "zeros",
}


@dataclass(frozen=True)
class Piece:
    """A tensor of Llama's names as the dense checkpoint stores it: all rows of a stored tensor, or some."""

    stored: str
    start: int
    rows: int


@dataclass(frozen=True)
class Target:
    """One tensor to write: `part` of `piece`, for sub-layer `m` of `layer` where it is a sub-layer's."""

    name: str
    shape: tuple[int, ...]
    piece: Piece
    part: str = "whole"  # whole, neurons, share, zeros, random
    dim: int = 0
    layer: int = -1
    m: int = 0


def family_config(model_type: str, fields: Mapping[str, Any]) -> PretrainedConfig:
    """The family's own configuration. Raises whatever transformers raises where the fields are no good."""
    return CONFIG_MAPPING[model_type](**{k: v for k, v in fields.items() if k not in ("model_type", "auto_map")})


def dense_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the family's causal language model, tied embeddings once."""
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def pieces(family: Family, config: PretrainedConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Piece]:
    """Llama's name of each dense tensor -> where it is stored."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rows = {
        "self_attn.q_proj": config.num_attention_heads * head_dim,
        "self_attn.k_proj": config.num_key_value_heads * head_dim,
        "self_attn.v_proj": config.num_key_value_heads * head_dim,
        "mlp.gate_proj": config.intermediate_size,
        "mlp.up_proj": config.intermediate_size,
    }
    found = {}
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        fused = next((fused for fused in family.fused if module.endswith(f".{fused}")), None)
        if fused is None:
            found[name] = Piece(name, 0, shape[0])
            continue
        start = 0
        for part in family.fused[fused]:
            found[f"{module.removesuffix(fused)}{part}.{kind}"] = Piece(name, start, rows[part])
            start += rows[part]
        if start != shape[0]:
            raise ConversionError(f"{name} has {shape[0]} rows; its parts, by the config, have {start}.")
    return found


def targets(family: Family, dense: PretrainedConfig, config: FinedeepConfig, mode: str) -> list[Target]:
    """Every tensor of the Finedeep model, layer by layer, sub-layer by sub-layer, in the dense model's order.

    Raises:
        ConversionError: the mapping leaves out or invents a tensor, which is a mistake in this module or in the table.
    """
    shapes = dense_shapes(dense)
    where = pieces(family, dense, shapes)
    with torch.device("meta"):
        model = FinedeepForCausalLM(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight")
    found = list(_targets(wanted, where, config.num_expert_sublayers, mode))
    used = {target.piece.stored for target in found}
    twice = [name for name, count in Counter(target.name for target in found).items() if count > 1]
    for what, names in {
        "not used": set(shapes) - used,
        "not written": set(wanted) - {target.name for target in found},
        "written twice": twice,
    }.items():
        if names:
            raise ConversionError(f"the mapping is wrong, tensors {what}: {some(names)}. This is a bug in Finedeep.")
    order = {name: i for i, name in enumerate(shapes)}
    return sorted(found, key=lambda target: (target.layer, target.m, order[target.piece.stored], target.piece.start))


def _targets(
    wanted: Mapping[str, tuple[int, ...]], where: Mapping[str, Piece], num_sublayers: int, mode: str
) -> Iterator[Target]:
    for name, shape in wanted.items():
        if ".sublayers." not in name:
            if name in where:
                layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
                yield Target(name, shape, where[name], layer=layer)
            continue
        prefix, _, rest = name.partition("sublayers.")
        m, _, kind = rest.partition(".")
        source, part, dim = SUBLAYER[kind]
        if mode == "grow" and int(m) > 0:
            part = GROWN.get(kind, part)
        if prefix + source in where:
            yield Target(name, shape, where[prefix + source], part, dim, int(prefix.split(".")[2]), int(m))


def some(names: Any, most: int = 5) -> str:
    """The first few names, and how many more."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
