# SPDX-License-Identifier: Apache-2.0  # trf-ignore: TRF028
r"""Finedeep (arXiv:2502.12928): a decoder whose FFN is M stacked sub-layers of K small, always-active experts.

With d the hidden size and e the expert width, one decoder layer computes

    h    <- h + r * Attention(RMSNorm(h))
    for m in 1..M:
        n    = RMSNorm_m(h)
        E_k  = W_down[m,k] . (act(W_gate[m,k] n) * (W_up[m,k] n))      k = 1..K
        g_k  = c * sigmoid(<w[m,k], E_k>)
        h    <- h + r * sum_k g_k * E_k

(r is 1 but where a dense family scales its residuals.) Everything else is inherited: from Llama, and from Qwen3 what it
adds to Llama's attention, norms of queries and keys and sliding windows.

`operators_finedeep.py` has faster forms of the same function. Both files travel with every checkpoint and meet next
year's transformers there: they name only the arguments and output fields that they use, hand all others on by keyword,
and leave inherited `forward`s alone, whose source engines and tracers read.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import modeling_layers
from transformers.activations import ACT2FN
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaPreTrainedModel,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3Model
from transformers.utils.generic import can_return_tuple

from .configuration_finedeep import ROUTING_FUNCTIONS, FinedeepConfig
from .cpu_kernels_finedeep import CPU  # noqa: F401  # trf-ignore: TRF035  (transformers 5.0 copies what is named here)
from .kernels_finedeep import TRITON  # noqa: F401  # trf-ignore: TRF035
from .operators_finedeep import (
    FinedeepOutputNorm,
    FinedeepRMSNorm,
    FinedeepStackGates,
    cache_in,
    combined_by_kernel,
    dot,
    expert_outputs,
    kept,
    prefers_definition,
    scale_embeddings,
    score_source,
    weighted_activations,
)


class FinedeepSublayer(nn.Module):
    r"""One expert sub-layer m: from the residual stream h to the K experts' weighted sum, which is to be added to it.

    The K experts' projections are stacked into three linear layers of the dense model's kind: rows of `gate_proj` and
    `up_proj`, columns of `down_proj`. `router` (K, hidden) holds the w_k, `expert_bias` (K, hidden) the experts' output
    biases where `mlp_bias` is set.
    """

    # Up to here K outputs a token cost less than reading W_down twice (measured: 16 to 32 on two CPU cores).
    definition_max_tokens = 32

    def __init__(self, config: FinedeepConfig):
        super().__init__()
        self.num_experts, self.expert_width = config.num_experts_per_sublayer, config.expert_intermediate_size
        self.routing_input, self.routing_function = config.routing_input, config.routing_function
        self.routed_scaling_factor = config.routed_scaling_factor
        width, per_expert = self.num_experts * self.expert_width, (self.num_experts, config.hidden_size)
        self.norm = FinedeepRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.router = nn.Parameter(torch.empty(per_expert))
        # CODEPATH: Llama checkpoints with mlp_bias have output biases; the released Llama 1 to 3 do not.
        self.expert_bias = nn.Parameter(torch.empty(per_expert)) if config.mlp_bias else None
        sandwich = config.sublayer_output_norm
        self.output_norm = FinedeepOutputNorm(config.hidden_size, config.rms_norm_eps) if sandwich else None

    def forward(self, h: Tensor, cache: Any = None) -> tuple[Tensor, Tensor]:
        """Args: h (batch, seq, hidden); cache, of keys and values. Returns sum_k g_k * E_k, and g (batch, seq, K)."""
        n = self.norm(h)
        G, U = self.gate_proj(n), self.up_proj(n)
        few = prefers_definition(self, G, cache)
        combined, g = self.definition(G, U, n) if few else self.one_product(G, U, n, cache)
        return combined if self.output_norm is None else self.output_norm(combined), g

    def definition(self, G: Tensor, U: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        """K outputs, K scores, their weighted sum. Args: G and U (batch, seq, K * e), n (batch, seq, hidden)."""
        a = (self.act_fn(G) * U).unflatten(-1, (self.num_experts, self.expert_width))
        E = expert_outputs(self.down_proj, a)
        if self.expert_bias is not None:
            E = E + self.expert_bias
        gates, c = self.routing
        if self.routing_input == "expert_output" and (made := combined_by_kernel(E, self.router, gates, c)):
            return made
        g = c * gates(dot(E if self.routing_input == "expert_output" else n.unsqueeze(-2), self.router))
        return (g.unsqueeze(-1) * E).sum(-2).to(E.dtype), g

    def one_product(self, G: Tensor, U: Tensor, n: Tensor, cache: Any = None) -> tuple[Tensor, Tensor]:
        """The same function without any E_k: one product with W_down, of activations that are weighted already."""
        v, s = score_source(self, G, U, n, cache)
        y, g = weighted_activations(G, U, v, s, self.act_fn, *self.routing)
        combined = self.down_proj(y)
        if self.expert_bias is not None:
            combined = combined + g.to(y.dtype) @ self.expert_bias
        return combined, g

    @property
    def routing(self) -> tuple[Any, float]:
        """What makes gates of scores (batch, seq, K), and c."""
        return ROUTING_FUNCTIONS[self.routing_function].gates, self.routed_scaling_factor


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


class FinedeepDecoderLayer(LlamaDecoderLayer):
    """A decoder layer whose dense FFN is M expert sub-layers, each with its own norm and residual."""

    def __init__(self, config: FinedeepConfig, layer_idx: int):
        super(LlamaDecoderLayer, self).__init__()  # not Llama's own: it would build the dense FFN
        self.config, self.hidden_size = config, config.hidden_size
        self.self_attn = FinedeepAttention(config=config, layer_idx=layer_idx)
        self.attention_type = config.layer_types[layer_idx]
        self.input_layernorm = FinedeepRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.sublayers = nn.ModuleList(FinedeepSublayer(config) for _ in range(config.num_expert_sublayers))
        self.stack_gates = FinedeepStackGates()
        self.residual_multiplier = config.residual_multiplier
        self.use_rope = config.no_rope_layers is None or bool(config.no_rope_layers[layer_idx])

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Args: hidden_states (batch, seq, hidden); whatever attention takes passes through. Returns the same shape."""
        # CODEPATH: every fourth layer of SmolLM3 has no RoPE. A rotation by nothing is exact.
        if not self.use_rope:
            position_embeddings = torch.ones_like(position_embeddings[0]), torch.zeros_like(position_embeddings[1])
        h, gates, r, cache = hidden_states, [], self.residual_multiplier, cache_in(kwargs, hidden_states)
        n = self.input_layernorm(h)
        h = torch.add(h, self.self_attn(hidden_states=n, position_embeddings=position_embeddings, **kwargs)[0], alpha=r)
        for sublayer in self.sublayers:
            combined, g = sublayer(h, *cache)
            h = torch.add(h, combined, alpha=r)
            gates.append(g)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if output_router_logits:
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


class FinedeepModel(FinedeepPreTrainedModel, Qwen3Model):  # trf-ignore: TRF057
    """The decoder without a head; its `forward` is Qwen3's."""

    def __init__(self, config: FinedeepConfig):
        super(Qwen3Model, self).__init__(config)  # not Qwen3's own: it would build dense layers
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(FinedeepDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = FinedeepRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
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
        self.model, self.vocab_size = FinedeepModel(config), config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(  # trf-ignore: TRF057
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        r"""Llama's forward, which also hands on the gates.

        Args as `LlamaForCausalLM`'s, and `output_router_logits`, by default the config's: whether to return, for each
        layer, the gates g (batch, seq, M, K) as `router_logits`, in float32 at least. No balancing loss goes with them.
        """
        as_configured = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=as_configured if output_router_logits is None else output_router_logits,
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


# The generic heads build their decoder with AutoModel.from_config, which cannot name remote code: its classes are made
# anew at each load. Their constructors are therefore stepped over, and only their `forward` is inherited.


class FinedeepForSequenceClassification(modeling_layers.GenericForSequenceClassification, FinedeepPreTrainedModel):
    """The decoder with a linear score on the last token that is not padding."""

    def __init__(self, config: FinedeepConfig):
        super(modeling_layers.GenericForSequenceClassification, self).__init__(config)
        self.model, self.num_labels = FinedeepModel(config), config.num_labels
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class FinedeepForTokenClassification(modeling_layers.GenericForTokenClassification, FinedeepPreTrainedModel):
    """The decoder with a linear score on every token."""

    def __init__(self, config: FinedeepConfig):
        super(modeling_layers.GenericForTokenClassification, self).__init__(config)
        self.model, self.num_labels = FinedeepModel(config), config.num_labels
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class FinedeepForQuestionAnswering(modeling_layers.GenericForQuestionAnswering, FinedeepPreTrainedModel):
    """The decoder with start and end scores on every token."""

    def __init__(self, config: FinedeepConfig):
        super(modeling_layers.GenericForQuestionAnswering, self).__init__(config)
        self.model = FinedeepModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()
