# Copyright 2026 The Finedeep contributors. Licensed under the Apache License, Version 2.0.
r"""Finedeep (arXiv:2502.12928): a Llama whose FFN is M stacked sub-layers of K small, always-active experts.

With d the hidden size and e the expert width, one decoder layer computes

    h    <- h + Attention(RMSNorm(h))
    for m in 1..M:
        n    = RMSNorm_m(h)
        E_k  = W_down[m,k] . (act(W_gate[m,k] n) * (W_up[m,k] n))      k = 1..K
        g_k  = c * sigmoid(<w[m,k], E_k>)
        h    <- h + sum_k g_k * E_k

Everything else is inherited from Llama.
"""

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from .configuration_finedeep import FinedeepConfig


class FinedeepOutputNorm(LlamaRMSNorm):
    """The sandwich norm on a sub-layer's output. It starts small, so that M sub-layers do not swamp the residual."""

    initial_weight = 0.1


class FinedeepDownProjection(nn.Module):
    r"""The second half of a sub-layer's K experts: from activations a_k to sum_k g_k * E_k.

    With a_k = act(W_gate_k n) * (W_up_k n), an expert's output and gate are

        E_k = W_down_k a_k + b_k        g_k = c * sigmoid(<w_k, E_k>)

    and `forward` returns sum_k g_k * E_k by whichever of two equal forms is cheaper for the number of tokens.
    The down projections and the routers live in one module, because the one-GEMM form reads scores from the
    product of both: a wrapper around either one (LoRA, offload, quantisation) must see that use.

    Shapes: `weight` (hidden, K * e), the K down projections side by side; `router` (K, hidden), row k is w_k;
    `bias` (K, hidden) where `mlp_bias` is set.
    """

    # Up to here K expert outputs per token cost less than reading W_down twice (measured: 16 to 32 on two CPU cores).
    per_expert_max_tokens = 32

    def __init__(self, config: FinedeepConfig):
        super().__init__()
        self.num_experts = config.num_experts_per_sublayer
        self.expert_width = config.expert_intermediate_size
        self.routing_input = config.routing_input
        self.routing_function = config.routing_function
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.hidden_size, self.num_experts * self.expert_width))
        self.router = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        bias_shape = (self.num_experts, config.hidden_size)
        self.bias = nn.Parameter(torch.empty(bias_shape)) if config.mlp_bias else None

    def forward(self, a: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        """Args: a (batch, seq, K * e) activations; n (batch, seq, hidden). Returns (batch, seq, hidden)."""
        a = a.unflatten(-1, (self.num_experts, self.expert_width))
        tokens = a.shape[:-2].numel()
        return self.per_expert(a, n) if tokens <= self.per_expert_max_tokens else self.one_gemm(a, n)

    def per_expert(self, a: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        """The definition: K outputs, K gates, their weighted sum. One read of W_down."""
        E = torch.einsum("...ke,dke->...kd", a, self.experts_view())
        if self.bias is not None:
            E = E + self.bias
        if self.routing_input == "expert_output":
            s = torch.einsum("...kd,kd->...k", E, self.router)
        else:
            s = nn.functional.linear(n, self.router)
        g = self.gate(s)
        return torch.einsum("...k,...kd->...d", g, E)

    def one_gemm(self, a: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        """The same function without storing any E_k: <w_k, W_down_k a_k> = <W_down_k' w_k, a_k> = <v_k, a_k>."""
        if self.routing_input == "expert_output":
            v = torch.einsum("kd,dke->ke", self.router, self.experts_view())
            s = torch.einsum("...ke,ke->...k", a, v)
            if self.bias is not None:
                s = s + (self.router * self.bias).sum(-1)
        else:
            s = nn.functional.linear(n, self.router)
        g = self.gate(s)
        out = nn.functional.linear((g.unsqueeze(-1) * a).flatten(-2), self.weight)
        return out if self.bias is None else out + g @ self.bias

    def gate(self, s: torch.Tensor) -> torch.Tensor:
        """g_k = c * sigmoid(s_k), or c * softmax(s)_k; s and g (batch, seq, K). Computed in float32 at least."""
        exact = s if s.dtype == torch.float64 else s.float()
        g = torch.sigmoid(exact) if self.routing_function == "sigmoid" else torch.softmax(exact, dim=-1)
        return (self.routed_scaling_factor * g).to(s.dtype)

    def experts_view(self) -> torch.Tensor:
        """`weight` as (hidden, K, e): W_down_k is [:, k]."""
        return self.weight.unflatten(1, (self.num_experts, self.expert_width))

    def extra_repr(self) -> str:
        hidden, width = self.weight.shape
        return f"in_features={width}, out_features={hidden}, experts={self.num_experts}, bias={self.bias is not None}"


class FinedeepSublayer(nn.Module):
    """One expert sub-layer m: from h to sum_k g_k * E_k. `gate_proj` and `up_proj` hold the K experts' rows stacked."""

    def __init__(self, config: FinedeepConfig):
        super().__init__()
        width = config.num_experts_per_sublayer * config.expert_intermediate_size
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = FinedeepDownProjection(config)
        sandwich = config.sublayer_output_norm
        self.output_norm = FinedeepOutputNorm(config.hidden_size, config.rms_norm_eps) if sandwich else nn.Identity()

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Args: h (batch, seq, hidden), the residual stream. Returns what is to be added to it, same shape."""
        n = self.norm(h)
        a = self.act_fn(self.gate_proj(n)) * self.up_proj(n)
        return self.output_norm(self.down_proj(a, n))


class FinedeepDecoderLayer(LlamaDecoderLayer):
    """A Llama decoder layer whose dense FFN is M expert sub-layers, each with its own norm and residual."""

    def __init__(self, config: FinedeepConfig, layer_idx: int):
        super(LlamaDecoderLayer, self).__init__()  # not Llama's own: it would build the dense FFN
        self.hidden_size = config.hidden_size
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.sublayers = nn.ModuleList(FinedeepSublayer(config) for _ in range(config.num_expert_sublayers))

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Args: hidden_states (batch, seq, hidden); whatever attention takes passes through. Returns the same shape."""
        h = hidden_states
        h = h + self.self_attn(hidden_states=self.input_layernorm(h), **kwargs)[0]
        for sublayer in self.sublayers:
            h = h + sublayer(h)
        return h


class FinedeepPreTrainedModel(LlamaPreTrainedModel):
    """What all Finedeep models share; the rest is Llama's."""

    config_class = FinedeepConfig
    config: FinedeepConfig
    _no_split_modules = ["FinedeepDecoderLayer"]
    _can_record_outputs = {"hidden_states": FinedeepDecoderLayer, "attentions": LlamaAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FinedeepDownProjection):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            nn.init.zeros_(module.router)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, FinedeepOutputNorm):
            nn.init.constant_(module.weight, module.initial_weight)


class FinedeepModel(FinedeepPreTrainedModel, LlamaModel):
    """The decoder without a head. `forward` is Llama's."""

    def __init__(self, config: FinedeepConfig):
        super(LlamaModel, self).__init__(config)  # not Llama's own: it would build dense layers
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(FinedeepDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class FinedeepForCausalLM(FinedeepPreTrainedModel, LlamaForCausalLM):
    """The decoder with a language-model head. `forward` is Llama's."""

    def __init__(self, config: FinedeepConfig):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = FinedeepModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


# The generic heads build their decoder with AutoModel.from_config, which cannot name remote code. Their constructors
# are therefore stepped over, and only their `forward` is inherited.


class FinedeepForSequenceClassification(GenericForSequenceClassification, FinedeepPreTrainedModel):
    """The decoder with a linear score on the last token that is not padding."""

    def __init__(self, config: FinedeepConfig):
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = FinedeepModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class FinedeepForTokenClassification(GenericForTokenClassification, FinedeepPreTrainedModel):
    """The decoder with a linear score on every token."""

    def __init__(self, config: FinedeepConfig):
        super(GenericForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = FinedeepModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class FinedeepForQuestionAnswering(GenericForQuestionAnswering, FinedeepPreTrainedModel):
    """The decoder with start and end scores on every token."""

    def __init__(self, config: FinedeepConfig):
        super(GenericForQuestionAnswering, self).__init__(config)
        self.model = FinedeepModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


__all__ = [
    "FinedeepForCausalLM",
    "FinedeepForQuestionAnswering",
    "FinedeepForSequenceClassification",
    "FinedeepForTokenClassification",
    "FinedeepModel",
    "FinedeepPreTrainedModel",
]
