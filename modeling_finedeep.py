# Copyright 2026 The Finedeep contributors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
r"""Finedeep (arXiv:2502.12928): a decoder whose FFN is M stacked sub-layers of K small, always-active experts.

With d the hidden size and e the expert width, one decoder layer computes

    h    <- h + r * Attention(RMSNorm(h))
    for m in 1..M:
        n    = RMSNorm_m(h)
        E_k  = W_down[m,k] . (act(W_gate[m,k] n) * (W_up[m,k] n))      k = 1..K
        g_k  = c * sigmoid(<w[m,k], E_k>)
        h    <- h + r * sum_k g_k * E_k

(r is 1 but for models that were converted from a family that scales its residuals.) Everything else is inherited: from
Llama, and from Qwen3 what it adds to Llama's attention, norms of queries and keys and sliding windows.
"""

import inspect
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3Model
from transformers.processing_utils import Unpack
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from .configuration_finedeep import FinedeepConfig

is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # old versions of torch do not say


def backward_is_ours() -> bool:
    """Whether to take the backward that is written out here, which keeps less of the forward than autograd's own.

    A compiler chooses by itself what to keep, and tracing and forward-mode derivatives want plain operators.
    """
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and getattr(torch.autograd.forward_ad, "_current_level", -1) < 0
    )


def autocast_type(x: torch.Tensor) -> str:
    """The device type to switch autocast off for; the meta device has none of its own."""
    return "cpu" if x.device.type == "meta" else x.device.type


class NormKeepingItsInput(torch.autograd.Function):
    """An RMSNorm, n = w * x * r with r = 1 / rms(x), of which backward keeps x and not x * r.

    With p = dL/dn * x * r: dL/dw = sum over tokens of p, dL/dx = r * (w * dL/dn - x * r * <p, w> / hidden).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        return weight * (x * r).to(dtype)  # rounded where Llama rounds

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        x, weight, ctx.eps = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, d_n: torch.Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        exact = torch.promote_types(x.dtype, torch.float32)
        dtype, x, d_n, w = x.dtype, x.to(exact), d_n.to(exact), weight.to(exact)
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + ctx.eps)
        x = x * r
        p = d_n * x
        with torch.autocast(autocast_type(x), enabled=False):
            p_w = (p @ w).unsqueeze(-1)
        d_x = torch.addcmul(d_n * w, x, p_w, value=-1 / x.shape[-1]) * r
        return d_x.to(dtype), p.sum_to_size(w.shape).to(weight.dtype), None


class FinedeepRMSNorm(LlamaRMSNorm):
    """Llama's RMSNorm, which keeps less for backward: there are M for each of Llama's."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Args: hidden_states (batch, seq, hidden). Returns the same shape."""
        if backward_is_ours() and isinstance(hidden_states, torch.Tensor):  # not an engine's fx.Proxy
            return NormKeepingItsInput.apply(hidden_states, self.weight, self.variance_epsilon)
        return super().forward(hidden_states)


class FinedeepOutputNorm(FinedeepRMSNorm):
    """The sandwich norm on a sub-layer's output. It starts small, so that M sub-layers do not swamp the residual."""

    initial_weight = 0.1


class FinedeepSublayer(nn.Module):
    r"""One expert sub-layer m: from the residual stream h to the K experts' weighted sum, which is to be added to it.

    The K experts' projections are stacked into three linear layers of the dense model's kind: rows of `gate_proj` and
    `up_proj`, columns of `down_proj`. `router` (K, hidden) holds the w_k, `expert_bias` (K, hidden) the experts' output
    biases where `mlp_bias` is set.

    The function has two forms. `per_expert` is the definition: K outputs, K scores, their weighted sum. `one_gemm`
    stores no expert output, since <w_k, W_down_k a_k> = <W_down_k' w_k, a_k> = <v_k, a_k>, and v has no token in it.
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
        width = self.num_experts * self.expert_width
        self.norm = FinedeepRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        per_expert = (self.num_experts, config.hidden_size)
        self.router = nn.Parameter(torch.empty(per_expert))
        # CODEPATH: Llama checkpoints with mlp_bias have output biases; the released Llama 1 to 3 do not.
        self.expert_bias = nn.Parameter(torch.empty(per_expert)) if config.mlp_bias else None
        sandwich = config.sublayer_output_norm
        self.output_norm = FinedeepOutputNorm(config.hidden_size, config.rms_norm_eps) if sandwich else nn.Identity()

    def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Args: h (batch, seq, hidden). Returns sum_k g_k * E_k, of the same shape, and the gates g (batch, seq, K)."""
        n = self.norm(h)
        a = self.act_fn(self.gate_proj(n)) * self.up_proj(n)
        if a.shape[-1] % self.expert_width:
            raise NotImplementedError(
                f"Tensor parallelism shares out whole experts: {self.num_experts} experts per sub-layer must be "
                "divisible by the number of processes."
            )
        a = a.unflatten(-1, (-1, self.expert_width))  # (batch, seq, K, e)
        combined, g = self.per_expert(a) if self.prefers_per_expert(a) else self.one_gemm(a, n)
        return self.output_norm(combined), g

    def per_expert(self, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The definition. One read of W_down, K outputs per token. Args: a (batch, seq, K, e) activations."""
        E = expert_outputs(self.down_proj, a)
        if self.expert_bias is not None:
            E = E + self.expert_bias
        g = self.gate(dot(E, self.router))
        return (g.unsqueeze(-1) * E).sum(-2).to(E.dtype), g

    def one_gemm(self, a: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same function without any E_k. Args: a (batch, seq, K, e) activations; n (batch, seq, hidden)."""
        router = local_part(self.router)
        if router.shape[0] != a.shape[-2]:
            raise NotImplementedError(
                f"This process holds {a.shape[-2]} of the sub-layer's {self.num_experts} experts and {router.shape[0]} "
                "of their routers. Share out gate_proj, up_proj, router and down_proj together, as tp_plan='auto' does."
            )
        v, s = None, None  # s: what the scores have besides <v_k, a_k>
        if self.routing_input == "hidden_state":
            s = scores_of_hidden_state(n, router)
        else:
            v = self.score_vectors(router, a)
            if self.expert_bias is not None:
                s = dot(self.expert_bias, router)
        weigh = WeightedActivations.apply if backward_is_ours() else weighted_activations
        weighted, g = weigh(a, v, s, self.routing_function, self.routed_scaling_factor)
        combined = self.down_proj(weighted.flatten(-2))
        if self.expert_bias is not None:
            combined = combined + g.to(a.dtype) @ self.expert_bias
        return combined, g

    def score_vectors(self, router: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """v_k = W_down_k' w_k of the experts that this process holds; router (K, hidden), v (K, e)."""
        if a.shape[-2] == self.num_experts:
            return score_vectors(self.down_proj, router, a)
        if type(self.down_proj) is not nn.Linear:
            raise NotImplementedError(
                f"With experts shared out over processes, down_proj must be an nn.Linear, not a "
                f"{type(self.down_proj).__name__}: take adapters and quantisation off, or load in one process."
            )
        return score_vectors_of(local_part(self.down_proj.weight), router)

    def gate(self, s: torch.Tensor) -> torch.Tensor:
        """The gates g of scores s, both (batch, seq, K)."""
        return gates(s, self.routing_function, self.routed_scaling_factor)

    def prefers_per_expert(self, a: torch.Tensor) -> bool:
        """Whether the definition is the cheaper form. It is no choice where this process holds only some experts.

        Nor in a graph that is exported, which has one form for every number of tokens.
        """
        if self.routing_input == "hidden_state" or a.shape[-2] != self.num_experts or is_exporting():
            return False
        tokens = a.shape[:-2].numel()
        if weight_is_readable(self.down_proj):
            most = self.per_expert_max_tokens // (self.num_experts if bmm_is_slow(a) else 1)
            return tokens <= most and not self.down_proj._forward_hooks
        return tokens <= self.expert_width and not can_pull_back(self.down_proj)


def gates(s: torch.Tensor, function: str, c: float) -> torch.Tensor:
    """g_k = c * sigmoid(s_k), or c * softmax(s)_k; s and g (batch, seq, K), in float32 at least."""
    return c * (torch.sigmoid(s) if function == "sigmoid" else torch.softmax(s, dim=-1))


def weighted_activations(
    a: torch.Tensor, v: torch.Tensor | None, s: torch.Tensor | None, function: str, c: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """y_k = g_k * a_k, and g, the gates of <v_k, a_k> + s_k.

    Args: a (batch, seq, K, e); v (K, e); s (batch, seq, K), or (K) for all tokens; of v and s one may be None.
    """
    if v is not None:
        s = dot(a, v) if s is None else dot(a, v) + s
    g = gates(s, function, c)
    return g.to(a.dtype).unsqueeze(-1) * a, g


class WeightedActivations(torch.autograd.Function):
    """`weighted_activations`, which keeps for backward y and not a, as `down_proj` has to keep y in any case.

    With L the loss and t_k = g_k * dL/dg_k = <dL/dy_k, y_k>: dL/ds_k = t_k * (1 - g_k / c), or for softmax
    t_k - g_k / c * sum_j t_j; dL/da_k = g_k * dL/dy_k + dL/ds_k * v_k; dL/dv_k = sum over tokens of dL/ds_k * a_k,
    where a_k = y_k / g_k.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        a: torch.Tensor, v: torch.Tensor | None, s: torch.Tensor | None, function: str, c: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return weighted_activations(a, v, s, function, c)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        _, v, s, ctx.function, ctx.c = inputs
        ctx.s_shape = None if s is None else s.shape
        ctx.save_for_backward(*output, v)

    @staticmethod
    def backward(ctx: Any, d_y: torch.Tensor, d_g: torch.Tensor) -> tuple:
        y, g, v = ctx.saved_tensors
        t = dot(d_y, y) + d_g * g
        d_s = t * (1 - g / ctx.c) if ctx.function == "sigmoid" else t - g / ctx.c * t.sum(-1, keepdim=True)
        d_a, d_v = g.unsqueeze(-1) * d_y, None
        if v is not None:
            d_a = torch.addcmul(d_a, d_s.unsqueeze(-1), v.to(g.dtype))
        if ctx.needs_input_grad[1]:
            over_g = d_s / torch.where(g == 0, 1, g)  # where g is 0, so are d_s and y
            with torch.autocast(autocast_type(y), enabled=False):
                d_v = torch.einsum("...k,...ke->ke", over_g, y.to(g.dtype)).to(v.dtype)
        return d_a.to(y.dtype), d_v, None if ctx.s_shape is None else d_s.sum_to_size(ctx.s_shape), None, None


# `down_proj` computes a -> W a, and scores need W' w as well. Reading W off the module is the fast way; but an adapter,
# a quantiser, an offload hook or a sharding engine may have put something in its place of which the weight is a part
# only, packed, or not there yet. Then W is known by calling the module and in no other way: all of them support that.


def weight_is_readable(linear: nn.Module) -> bool:
    """Whether `linear` is an `nn.Linear` that nothing has wrapped, replaced, quantised, sharded or offloaded."""
    weight = linear._parameters.get("weight")
    return (
        type(linear) is nn.Linear
        and weight is not None
        and not hasattr(weight, "__tensor_flatten__")  # one tensor that stands for others: quantised, or sharded
        and "forward" not in linear.__dict__
        and not linear._forward_pre_hooks  # one of which may bring the weight into being
    )


def bmm_is_slow(x: torch.Tensor) -> bool:
    """Whether K rows a token, zeros but for one a_k, beat torch's K products: in bfloat16 on a CPU (measured)."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"


def can_pull_back(linear: nn.Module) -> bool:
    """Whether autograd may run in the middle of a forward. FSDP and ZeRO, at work in hooks, free the weight before."""
    return torch.is_grad_enabled() and not linear._forward_pre_hooks


def expert_outputs(linear: nn.Module, a: torch.Tensor) -> torch.Tensor:
    """E_k = W_k a_k. Args: a (batch, seq, K, e). Returns (batch, seq, K, hidden)."""
    K, e = a.shape[-2:]
    if weight_is_readable(linear) and (torch.compiler.is_compiling() or not bmm_is_slow(a)):
        W = linear.weight.unflatten(1, (K, e)).permute(1, 2, 0)  # (K, e, hidden), a view
        E = torch.bmm(a.flatten(0, -3).transpose(0, 1), W)  # an einsum's product, without an einsum's bookkeeping
        return E.transpose(0, 1).view(*a.shape[:-1], W.shape[-1])
    alone = torch.eye(K, dtype=a.dtype, device=a.device).unsqueeze(-1) * a.unsqueeze(-3)  # row k: a_k, else zeros
    rows = alone.flatten(-2).flatten(-3, -2)  # (batch, seq * K, K * e), the number of dimensions that all expect
    return linear(rows).unflatten(-2, (-1, K))


def score_vectors(linear: nn.Module, router: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """v_k = W_k' w_k. Args: router (K, hidden); a (batch, seq, K, e), for its shape and dtype. Returns (K, e)."""
    K, e = a.shape[-2:]
    if weight_is_readable(linear):
        return score_vectors_of(linear.weight, router)
    if can_pull_back(linear) and (V := pull_back(linear, router, a.new_zeros(K, K * e))) is not None:
        return torch.einsum("kke->ke", V.unflatten(-1, (K, e)))
    return score_vectors_of(linear(torch.eye(K * e, dtype=a.dtype, device=a.device)).transpose(0, 1), router)


def score_vectors_of(W: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
    """v_k = W_k' w_k. Args: W (hidden, K * e); router (K, hidden). Returns (K, e)."""
    W = W.unflatten(1, (router.shape[0], -1)).transpose(0, 1)  # (K, hidden, e), a view
    return torch.bmm(router.to(W.dtype).unsqueeze(1), W).squeeze(1)


def pull_back(linear: nn.Module, rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """`rows` W, as autograd knows it, or None if it does not. Args: rows (K, out), x (K, in). Returns (K, in)."""
    if torch.compiler.is_compiling():
        y, pullback = torch.func.vjp(linear, x)
        return pullback(rows.to(y.dtype))[0]
    x.requires_grad_()
    y = linear(x)
    return torch.autograd.grad(y, x, rows.to(y.dtype), create_graph=True, allow_unused=True)[0]


def local_part(x: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that tensor parallelism has sharded; otherwise the tensor itself."""
    return x.to_local() if hasattr(x, "to_local") else x


def scores_of_hidden_state(n: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
    """s_k = <w_k, n> in float32 at least. Args: n (batch, seq, hidden); router (K, hidden). Returns (batch, seq, K)."""
    exact = torch.promote_types(n.dtype, torch.float32)
    with torch.autocast(autocast_type(n), enabled=False):
        return nn.functional.linear(n.to(exact), router.to(exact))


def kept(h: torch.Tensor, positions: int | torch.Tensor) -> torch.Tensor:
    """Those of h (batch, seq, hidden) that logits are wanted of.

    Args: positions as Llama's `logits_to_keep`: the last ones, of which 0 are all; indices (n); indices (batch, n) of
    each sequence; or a mask (batch, seq), which gives (tokens, hidden).
    """
    if isinstance(positions, int):
        return h[:, -positions:, :]
    if positions.ndim < 2:
        return h[:, positions, :]
    return h[positions] if positions.dtype == torch.bool else torch.take_along_dim(h, positions[..., None], dim=1)


def dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """<x, y> over the last dimension in float32 at least, under autocast too (which would round an einsum)."""
    return (x.to(torch.promote_types(x.dtype, torch.float32)) * y).sum(-1)


class FinedeepAttention(Qwen3Attention):
    """Attention of whichever family the dense model was of: Qwen3's, with what the config switches off or adds."""

    def __init__(self, config: FinedeepConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        # CODEPATH: Qwen3 normalises queries and keys; Llama and the other families do not.
        if not config.qk_norm:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        # CODEPATH: Qwen2 and Seed-OSS have biases on queries, keys and values only.
        if config.attention_output_bias != config.attention_bias:
            self.o_proj = nn.Linear(self.o_proj.in_features, config.hidden_size, bias=config.attention_output_bias)
        # CODEPATH: Granite sets the scale of the scores itself.
        if config.attention_multiplier is not None:
            self.scaling = config.attention_multiplier
        self.use_rope = config.no_rope_layers is None or bool(config.no_rope_layers[layer_idx])

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Args: hidden_states (batch, seq, hidden); cosines and sines (batch, seq, head_dim). Returns Qwen3's."""
        # CODEPATH: every fourth layer of SmolLM3 has no RoPE. A rotation by nothing is exact.
        if not self.use_rope:
            cos, sin = position_embeddings
            position_embeddings = (torch.ones_like(cos), torch.zeros_like(sin))
        return super().forward(hidden_states, position_embeddings, **kwargs)


class FinedeepStackGates(nn.Module):
    """Stacks a layer's gates to (batch, seq, M, K), a module only so that transformers can record what it returns."""

    def forward(self, gates: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(gates, dim=-2)


class FinedeepDecoderLayer(LlamaDecoderLayer):
    """A decoder layer whose dense FFN is M expert sub-layers, each with its own norm and residual."""

    def __init__(self, config: FinedeepConfig, layer_idx: int):
        super(LlamaDecoderLayer, self).__init__()  # not Llama's own: it would build the dense FFN
        self.hidden_size = config.hidden_size
        self.self_attn = FinedeepAttention(config=config, layer_idx=layer_idx)
        self.attention_type = config.layer_types[layer_idx]
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.sublayers = nn.ModuleList(FinedeepSublayer(config) for _ in range(config.num_expert_sublayers))
        self.stack_gates = FinedeepStackGates()
        self.residual_multiplier = config.residual_multiplier
        self.output_router_logits = config.output_router_logits

    def forward(
        self, hidden_states: torch.Tensor, output_router_logits: bool | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Args: hidden_states (batch, seq, hidden); whatever attention takes passes through. Returns the same shape."""
        h, gates = hidden_states, []
        r = self.residual_multiplier
        h = torch.add(h, self.self_attn(hidden_states=self.input_layernorm(h), **kwargs)[0], alpha=r)
        for sublayer in self.sublayers:
            combined, g = sublayer(h)
            h = torch.add(h, combined, alpha=r)
            gates.append(g)
        if self.output_router_logits if output_router_logits is None else output_router_logits:
            self.stack_gates(gates)
        return h


class FinedeepPreTrainedModel(LlamaPreTrainedModel):  # trf-ignore: TRF057
    """What all Finedeep models share; the rest is Llama's."""

    config_class = FinedeepConfig
    config: FinedeepConfig
    _no_split_modules = ["FinedeepDecoderLayer"]
    _can_record_outputs = {
        "hidden_states": FinedeepDecoderLayer,
        "attentions": FinedeepAttention,
        "router_logits": FinedeepStackGates,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FinedeepSublayer):
            nn.init.normal_(module.router, std=self.config.router_initializer_range)
            if module.expert_bias is not None:
                nn.init.zeros_(module.expert_bias)
        elif isinstance(module, FinedeepOutputNorm):
            nn.init.constant_(module.weight, module.initial_weight)


def scale_embeddings(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Embeddings times the config's `embedding_multiplier`, whoever made them, on their way into `model.forward`.

    A hook, and not a `forward` around the inherited one, whose source engines and tracers read.
    """
    given = dict(zip(inspect.signature(type(model).forward).parameters, (model, *args), strict=False)) | kwargs
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        return args, kwargs  # the model says what is wrong
    embeds = model.embed_tokens(ids) if embeds is None else embeds
    del given["self"]
    return (), given | {"input_ids": None, "inputs_embeds": embeds * model.config.embedding_multiplier}


class FinedeepModel(FinedeepPreTrainedModel, Qwen3Model):  # trf-ignore: TRF057
    """The decoder without a head; its `forward` is Qwen3's."""

    def __init__(self, config: FinedeepConfig):
        super(Qwen3Model, self).__init__(config)  # not Qwen3's own: it would build dense layers
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(FinedeepDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.has_sliding_layers = "sliding_attention" in config.layer_types
        self.gradient_checkpointing = False
        # CODEPATH: Granite scales its embeddings.
        if config.embedding_multiplier != 1:
            self.register_forward_pre_hook(scale_embeddings, with_kwargs=True)
        self.post_init()


class FinedeepForCausalLM(FinedeepPreTrainedModel, LlamaForCausalLM):  # trf-ignore: TRF057
    """The decoder with a language-model head."""

    def __init__(self, config: FinedeepConfig):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = FinedeepModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(  # trf-ignore: TRF057
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        r"""Llama's forward, which also hands on the gates.

        Args are those of `LlamaForCausalLM`, and `output_router_logits`: whether to return `router_logits`, for each
        layer the gates g of shape (batch, seq, M, K), in float32 at least. By default as the config says. There is no
        balancing loss to go with them.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=self.config.output_router_logits
            if output_router_logits is None
            else output_router_logits,
            **kwargs,
        )
        logits = self.lm_head(kept(outputs.last_hidden_state, logits_to_keep))
        # CODEPATH: Granite scales its logits.
        if self.config.logits_scaling != 1:
            logits = logits / self.config.logits_scaling
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = MoeCausalLMOutputWithPast(loss=loss, logits=logits)
        for name, value in outputs.items():  # whatever they are called in the version that runs
            if name != "last_hidden_state":
                output[name] = value
        return output


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
