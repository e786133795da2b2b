# SPDX-License-Identifier: Apache-2.0  # trf-ignore: TRF028
"""What a Finedeep model is: a Llama configuration plus the shape of the expert sub-layers.

What other families of dense models have in their attention, beyond Llama, are fields too, under the names that those
families' configurations have in transformers wherever there is one.
"""

import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, Qwen3Config

# The package's version. It travels with the code, and is read from it without running it.
__version__ = "0.2.0"


class RoutingFunction(NamedTuple):
    """How scores s (batch, seq, K) become gates, before the factor c."""

    gates: Callable[[Any], Any]
    neutral_scale: Callable[[int], float]
    """Of K, the c with which a zero router gives every expert the weight exactly 1."""


# To add one, add an entry, and its words for the command line and the model card in files/conversion_options.py.
ROUTING_FUNCTIONS = {
    "sigmoid": RoutingFunction(torch.sigmoid, lambda num_experts: 2.0),
    "softmax": RoutingFunction(partial(torch.softmax, dim=-1), float),
}
ROUTING = {"routing_input": ("expert_output", "hidden_state"), "routing_function": ROUTING_FUNCTIONS}
# Fields with a value for each layer, and the values that there are.
PER_LAYER: dict[str, tuple[Any, ...]] = {
    "layer_types": ("full_attention", "sliding_attention"),
    "no_rope_layers": (0, 1),
}

# Tensor parallelism, by the styles that transformers has had since 4.57: each process holds whole experts, and the one
# reduction that a dense FFN needs too, after `down_proj`, adds up their outputs.
ATTENTION_TP_PLAN = {rule: style for rule, style in LlamaConfig.base_model_tp_plan.items() if ".self_attn." in rule}
QK_NORM_TP_PLAN = {rule: style for rule, style in Qwen3Config.base_model_tp_plan.items() if "_norm" in rule}
EXPERT_TP_PLAN = {
    "layers.*.sublayers.*.gate_proj": "colwise",
    "layers.*.sublayers.*.up_proj": "colwise",
    "layers.*.sublayers.*.router": "colwise",
    "layers.*.sublayers.*.down_proj": "rowwise",
}

# Written into every config.json, so that whichever class saved the folder, every Auto class can load it.
AUTO_MAP = {
    "AutoConfig": "configuration_finedeep.FinedeepConfig",
    "AutoModel": "modeling_finedeep.FinedeepModel",
    "AutoModelForCausalLM": "modeling_finedeep.FinedeepForCausalLM",
    "AutoModelForQuestionAnswering": "modeling_finedeep.FinedeepForQuestionAnswering",
    "AutoModelForSequenceClassification": "modeling_finedeep.FinedeepForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_finedeep.FinedeepForTokenClassification",
}


class FinedeepConfig(LlamaConfig):  # trf-ignore: TRF057
    r"""Configuration of a Finedeep model (arXiv:2502.12928). Every field of `LlamaConfig` keeps its meaning.

    `intermediate_size` is the width of the *whole* FFN of a decoder layer, as in the dense model; the
    `M * K` experts share it equally.

    Args:
        num_expert_sublayers (`int`, defaults to 2):
            M, the expert sub-layers stacked in one decoder layer, each with its own norm and residual.
        num_experts_per_sublayer (`int`, defaults to 8):
            K, the experts of one sub-layer. All of them run for every token.
        routing_input (`str`, defaults to `"expert_output"`):
            What an expert's score is read from: its own output (`"expert_output"`, the paper's method) or the
            normalised input of the sub-layer (`"hidden_state"`, the paper's ablation).
        routing_function (`str`, defaults to `"sigmoid"`):
            How scores become gates: `"sigmoid"` (each expert by itself) or `"softmax"` (over the K experts).
        routed_scaling_factor (`float`, *optional*):
            c, the factor on every gate. Left out, it is the one with which a zero router gives every expert the
            weight exactly 1: 2 for sigmoid, K for softmax.
        router_initializer_range (`float`, defaults to 0.0):
            Standard deviation of fresh routers. With 0, a gate starts as the same constant for every token.
        sublayer_output_norm (`bool`, defaults to `False`):
            Whether a second RMSNorm acts on a sub-layer's output before it is added ("sandwich norm"). Set it to train
            from random weights: the loss was lower with it at 1, 4 and 31 million parameters. Leave it to convert a
            dense model, whose function it cannot have.
        attention_output_bias (`bool`, *optional*):
            Whether attention's output projection has a bias; left out, as `attention_bias` says (Llama). Qwen2 has
            biases on queries, keys and values only.
        qk_norm (`bool`, defaults to `False`):
            Whether queries and keys are RMS-normalised, head by head, before RoPE (Qwen3).
        sliding_window (`int`, *optional*):
            How many tokens, itself included, a token sees in layers with sliding attention (Mistral).
        layer_types (`list[str]`, *optional*):
            For each layer `"full_attention"` or `"sliding_attention"`; left out, sliding where `sliding_window` is set.
        no_rope_layers (`list[int]`, *optional*):
            For each layer 1 where RoPE is applied and 0 where not; left out, 1 (SmolLM3's field, with its meaning).
        attention_multiplier (`float`, *optional*):
            The factor on attention scores; left out, `head_dim ** -0.5` (Granite's field, as are the next three).
        embedding_multiplier (`float`, defaults to 1.0):
            The factor on token embeddings.
        residual_multiplier (`float`, defaults to 1.0):
            r, the factor on what attention and each sub-layer add to the residual stream.
        logits_scaling (`float`, defaults to 1.0):
            What logits are divided by.
        output_router_logits (`bool`, defaults to `False`):
            Whether models return, for each layer, the gates of shape (batch, seq, M, K) as `router_logits`.

    Raises:
        ValueError: a field has a value that cannot work. The message names the field, the value and the nearest
            values that do.

    Example:

    ```python
    >>> from finedeep import FinedeepConfig
    >>> FinedeepConfig(intermediate_size=11008, num_expert_sublayers=2).expert_intermediate_size
    688
    ```
    """

    model_type = "finedeep"
    base_model_tp_plan = ATTENTION_TP_PLAN | EXPERT_TP_PLAN

    def __init__(
        self,
        num_expert_sublayers: int = 2,
        num_experts_per_sublayer: int = 8,
        routing_input: str = "expert_output",
        routing_function: str = "sigmoid",
        routed_scaling_factor: float | None = None,
        router_initializer_range: float = 0.0,
        sublayer_output_norm: bool = False,
        attention_output_bias: bool | None = None,
        qk_norm: bool = False,
        sliding_window: int | None = None,
        layer_types: list[str] | None = None,
        no_rope_layers: list[int] | None = None,
        attention_multiplier: float | None = None,
        embedding_multiplier: float = 1.0,
        residual_multiplier: float = 1.0,
        logits_scaling: float = 1.0,
        output_router_logits: bool = False,
        **kwargs: Any,
    ):
        self.num_expert_sublayers = _positive_int("num_expert_sublayers", num_expert_sublayers)
        self.num_experts_per_sublayer = _positive_int("num_experts_per_sublayer", num_experts_per_sublayer)
        self.routing_input = routing_input
        self.routing_function = routing_function
        if routed_scaling_factor is None:
            routed_scaling_factor = ROUTING_FUNCTIONS[self.routing_function].neutral_scale(num_experts_per_sublayer)
        self.routed_scaling_factor = _positive_float("routed_scaling_factor", routed_scaling_factor)
        self.router_initializer_range = _deviation("router_initializer_range", router_initializer_range)
        self.sublayer_output_norm = _boolean("sublayer_output_norm", sublayer_output_norm)
        self.output_router_logits = _boolean("output_router_logits", output_router_logits)
        self.qk_norm = _boolean("qk_norm", qk_norm)
        self.sliding_window = None if sliding_window is None else _positive_int("sliding_window", sliding_window)
        scales = {"embedding_multiplier": embedding_multiplier, "residual_multiplier": residual_multiplier}
        scales["logits_scaling"] = logits_scaling
        for field, value in scales.items():
            setattr(self, field, _positive_float(field, value))
        self.attention_multiplier = (
            None if attention_multiplier is None else _positive_float("attention_multiplier", attention_multiplier)
        )
        # Before the parent, which reads some of these; for their length, it has to be known how many layers there are.
        num_layers = kwargs.get("num_hidden_layers", LlamaConfig().num_hidden_layers)
        attention = "full_attention" if self.sliding_window is None else "sliding_attention"
        self.layer_types = _per_layer(
            "layer_types", [attention] if layer_types is None else layer_types, num_layers, PER_LAYER["layer_types"]
        )
        if self.sliding_window is None and "sliding_attention" in self.layer_types:
            raise ValueError("layer_types has 'sliding_attention', for which sliding_window must be set; it is None.")
        if no_rope_layers is not None:
            no_rope_layers = _per_layer("no_rope_layers", no_rope_layers, num_layers, PER_LAYER["no_rope_layers"])
        self.no_rope_layers = no_rope_layers
        kwargs.pop("logit_scale", None)  # in a config.json that somebody has made fit for vLLM
        kwargs["auto_map"] = dict(AUTO_MAP)
        kwargs["finedeep_version"] = __version__  # of the code that writes config.json, not of what it was read from
        super().__init__(**_readable_by_every_version(kwargs))
        self.attention_output_bias = _boolean(
            "attention_output_bias", self.attention_bias if attention_output_bias is None else attention_output_bias
        )
        self._check_width()
        if self.qk_norm:
            self.base_model_tp_plan = self.base_model_tp_plan | QK_NORM_TP_PLAN
        if (routing_input, routing_function, self.mlp_bias) != ("expert_output", "sigmoid", False):
            # A softmax needs all scores, a hidden-state score gives every process a gradient for the same input, and an
            # expert's bias comes after the reduction: none of them is a sum over processes. Every process runs the FFN.
            shared = set(EXPERT_TP_PLAN)
            self.base_model_tp_plan = {k: v for k, v in self.base_model_tp_plan.items() if k not in shared}

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse a routing that there is not, from `from_pretrained` too, which would silently be another model.

        And where all layers are alike, the fields with a value for each follow their number, as in a model that is cut
        or read in part. Layers that differ are left alone: which of them are taken, or stand in for more, is not for a
        number to say; and some functions change it for a while only.
        """
        if name in ROUTING:
            value = _one_of(name, value, ROUTING[name])
        super().__setattr__(name, value)
        if name == "num_hidden_layers" and isinstance(value, int):
            for field in PER_LAYER:
                values = self.__dict__.get(field)
                if values and len(set(values)) == 1:
                    super().__setattr__(field, values[:1] * value)

    @property
    def expert_intermediate_size(self) -> int:
        """e = intermediate_size / (M * K), the width of one expert. Derived, never stored.

        Raises `ValueError` where a field that was changed after the config was made no longer fits.
        """
        self._check_width()
        return self.intermediate_size // (self.num_expert_sublayers * self.num_experts_per_sublayer)

    @property
    def logit_scale(self) -> float:
        """What vLLM multiplies logits by; the name by which it asks. Derived, never stored."""
        return 1 / self.logits_scaling

    def _check_width(self) -> None:
        experts = self.num_expert_sublayers * self.num_experts_per_sublayer
        if self.intermediate_size % experts == 0 and self.intermediate_size > 0:
            return
        below = self.intermediate_size // experts * experts
        nearest = f"{below} or {below + experts}" if below > 0 else f"{experts}"
        raise ValueError(
            f"intermediate_size={self.intermediate_size} cannot be shared by num_expert_sublayers * "
            f"num_experts_per_sublayer = {self.num_expert_sublayers} * {self.num_experts_per_sublayer} = {experts} "
            f"experts of equal width; the nearest sizes that can: {nearest}."
        )


def _readable_by_every_version(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Spell RoPE as `rope_theta` and `rope_scaling`, which transformers 4 and 5 both read.

    transformers 5 writes `rope_parameters`; transformers 4 does not know that key and would silently fall back to
    theta 10000. Raises `ValueError` for what Llama's rotary embedding is not made of.
    """
    rope = dict(kwargs.pop("rope_parameters", None) or kwargs.get("rope_scaling") or {})
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(
            f"RoPE's parameters have an entry for each of {', '.join(rope)}; Finedeep has one RoPE for all layers. "
            "Give one dictionary with rope_type and rope_theta."
        )
    if "type" in rope:  # as it was called until transformers 4.43
        rope.setdefault("rope_type", rope.pop("type"))
    partial_rotary_factor = rope.pop("partial_rotary_factor", kwargs.get("partial_rotary_factor"))
    if partial_rotary_factor not in (None, 1, 1.0):
        raise ValueError(
            f"partial_rotary_factor={partial_rotary_factor!r} rotates heads in part; Finedeep, like Llama, rotates "
            "whole heads. The value that works: 1.0."
        )
    if rope:
        if "rope_theta" in rope:
            kwargs["rope_theta"] = rope.pop("rope_theta")
        kwargs["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    return kwargs


def _positive_int(field: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{field}={value!r} is not a whole number of at least 1; the nearest that works: 1.")
    return value


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _positive_float(field: str, value: Any) -> float:
    if not _finite(value) or value <= 0:
        raise ValueError(
            f"{field}={value!r} is not a finite number above 0; values that work: 2.0 (a zero sigmoid router gives "
            "every expert the weight 1) or 1.0 (gates between 0 and 1)."
        )
    return float(value)


def _deviation(field: str, value: Any) -> float:
    if not _finite(value) or value < 0:
        raise ValueError(f"{field}={value!r} is not a finite number of at least 0; the nearest that works: 0.0.")
    return float(value)


def _one_of(field: str, value: Any, known: Collection[Any]) -> str:
    if value not in tuple(known):  # which takes what has no hash, too
        raise ValueError(f"{field}={value!r} is not known; values that work: {', '.join(map(repr, known))}.")
    return value


def _per_layer(field: str, values: Any, num_layers: int, known: tuple[Any, ...]) -> list[Any]:
    """One value for each layer. One that all share is repeated; of more than there are layers, the first are taken."""
    if not isinstance(values, (list, tuple)) or not values:
        raise ValueError(f"{field}={values!r} is not a list with a value for each of the {num_layers} layers.")
    for value in values:
        _one_of(f"{field}'s entry", value, known)
    if len(set(values)) == 1:
        return [values[0]] * num_layers
    if len(values) < num_layers:
        raise ValueError(f"{field} has {len(values)} entries; it must have num_hidden_layers={num_layers}.")
    return list(values[:num_layers])


def _boolean(field: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{field}={value!r} is not a boolean; values that work: True, False.")
    return value


__all__ = ["FinedeepConfig"]
