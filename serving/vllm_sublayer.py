"""One expert sub-layer in vLLM, whole or, with tensor parallelism, on one of P processes.

A process holds K / P whole experts and their routers. With `n = RMSNorm(h)` and v_k = W_down,k' w_k, which no token
changes and which is computed once, after loading,

    a_k = act(W_gate,k n) * (W_up,k n)      s_k = <v_k, a_k>      g_k = c * sigmoid(s_k)
    sum_k g_k * E_k = W_down . concat_k(g_k * a_k)

and the processes' sums are added up: one reduction, as for a dense FFN.
"""

from typing import Any

import torch
from torch import nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.lora import utils as lora_layers
from vllm.lora.layers import RowParallelLinearWithLoRA
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader


class FinedeepSublayer(nn.Module):
    """vLLM's form of the sub-layer of the same name in `modeling_finedeep.py`, under the same parameter names."""

    def __init__(self, theirs: nn.Module, quant_config: Any, prefix: str):
        """Take over what `theirs`, the folder's sub-layer on the meta device, says; `prefix` is its name."""
        super().__init__()
        self.processes, self.rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        self.num_experts, self.expert_width = theirs.num_experts // self.processes, theirs.expert_width
        self.routing_input, self.routing_function = theirs.routing_input, theirs.routing_function
        self.gates, self.c = theirs.routing
        self.norm, self.act_fn, self.output_norm = theirs.norm, theirs.act_fn, theirs.output_norm
        self.gate_proj, self.up_proj = theirs.gate_proj, theirs.up_proj
        width, hidden = theirs.down_proj.in_features, theirs.down_proj.out_features
        self.down_proj = DownProjLinear(width, hidden, quant_config, f"{prefix}.down_proj")
        self.router = per_expert(self.num_experts, hidden)
        self.down_proj.router = lambda: self.router
        self.expert_bias = per_expert(self.num_experts, hidden) if theirs.expert_bias is not None else None
        v = torch.zeros(self.num_experts, self.expert_width, dtype=torch.float32)
        self.register_buffer("v", v, persistent=False)
        self.register_buffer("bias_scores", torch.zeros(self.num_experts, dtype=torch.float32), persistent=False)

    def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Args: h (1, tokens, hidden). Returns sum_k g_k * E_k, of the same shape, and this process's gates."""
        n = self.norm(h)
        # vLLM rewrites this line: one merged projection, and one kernel for the rest
        a = self.act_fn(self.gate_proj(n)) * self.up_proj(n)
        g = self.gate(self.scores(a, n)).to(a.dtype)
        y = g.unsqueeze(-1) * a.unflatten(-1, (self.num_experts, self.expert_width))
        combined = self.down_proj(y.flatten(-2))
        if self.expert_bias is not None:
            combined = combined + g @ self.expert_bias
        combined = tensor_model_parallel_all_reduce(combined)
        return combined if self.output_norm is None else self.output_norm(combined), g

    def scores(self, a: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        """s (1, tokens, K / P) in float32. Args: a (1, tokens, K / P * e); n (1, tokens, hidden)."""
        if self.routing_input == "hidden_state":
            return nn.functional.linear(n.float(), self.router.float())
        s = (a.float().unflatten(-1, (self.num_experts, self.expert_width)) * self.v).sum(-1)
        if self.expert_bias is not None:
            s = s + self.bias_scores
        if isinstance(self.down_proj, DownProjLinearWithLoRA):
            s = s + self.down_proj.scores(a)
        return s

    def gate(self, s: torch.Tensor) -> torch.Tensor:
        """The gates of this process's experts. Those of a sigmoid need no other scores; a softmax needs all K."""
        if self.routing_function == "sigmoid" or self.processes == 1:
            return self.c * self.gates(s)
        g = self.c * self.gates(tensor_model_parallel_all_gather(s))
        return g.unflatten(-1, (self.processes, self.num_experts))[..., self.rank, :]

    @torch.no_grad()
    def read_score_vectors(self) -> None:
        """v_k = W_down,k' w_k, from what `down_proj` makes of unit rows: packed or quantised, it has no such weight."""
        K, e = self.v.shape
        # A fixed scale for activations, as some quantised layers have, holds its own value exactly, and no large one.
        # Negative, since int8 products on CPUs without VNNI add 128 to activations and saturate at large ones.
        scale = getattr(self.down_proj, "input_scale", None)
        unit = -1.0 if scale is None else -float(scale.max())
        for k in range(K):
            rows = torch.zeros(e, K * e, dtype=self.router.dtype, device=self.router.device)
            rows[:, k * e : (k + 1) * e].fill_diagonal_(unit)
            self.v[k] = self.down_proj(rows).float() @ self.router[k].float() / unit
        if self.expert_bias is not None:
            self.bias_scores.copy_((self.expert_bias.float() * self.router.float()).sum(-1))

    def refuse_projections_that_are_apart(self) -> None:
        """Raise `ValueError` where processes would not hold the same experts in all projections."""
        if self.processes > 1 and hasattr(self, "gate_proj"):
            raise ValueError(
                f"tensor_parallel_size={self.processes} needs a merged gate and up projection, which this version of "
                f"vLLM does not make with {type(self.act_fn).__name__}; 1 works."
            )


def per_expert(num_experts: int, hidden: int) -> nn.Parameter:
    """Rows (K / P, hidden), of which loading takes this process's from the checkpoint's K."""
    rows = nn.Parameter(torch.empty(num_experts, hidden), requires_grad=False)
    rows.weight_loader = sharded_weight_loader(0)
    return rows


class DownProjLinear(RowParallelLinear):
    """W_down, columns of whole experts, named so that a quantiser's target `Linear` finds it.

    The sub-layer adds up the outputs, with the biases of the experts.
    """

    def __init__(self, width: int, hidden: int, quant_config: Any, prefix: str):
        options = {"bias": False, "reduce_results": False, "return_bias": False}
        super().__init__(width, hidden, quant_config=quant_config, prefix=prefix, **options)


class DownProjLinearWithLoRA(RowParallelLinearWithLoRA):
    """W_down + B A, with another A and B for each adapter: what they add to scores is <A_k' B' w_k, a_k>."""

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """Make room for so many adapters. The vectors A_k' B' w_k are the rows of a LoRA layer of rank K / P."""
        super().create_lora_weights(max_loras, lora_config, model_config)
        rows = (max_loras, 1, len(self.base_layer.router()), self.input_size)
        self.score_rows = torch.zeros(rows, dtype=lora_config.lora_dtype, device=self.device)

    def reset_lora(self, index: int) -> None:
        """Empty an adapter's place."""
        super().reset_lora(index)
        self.score_rows[index] = 0

    def set_lora(self, index: int, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
        """Put an adapter into its place. Args: lora_a (rank, K * e); lora_b (hidden, rank), with its scale."""
        super().set_lora(index, lora_a, lora_b)
        w = self.base_layer.router().float()
        A, B = self.lora_a_stacked[0][index, 0].float(), self.lora_b_stacked[0][index, 0].float()
        v = torch.einsum("kr,rke->ke", w @ B, A.unflatten(-1, (len(w), -1)))
        self.score_rows[index, 0] = torch.block_diag(*v)

    def scores(self, a: torch.Tensor) -> torch.Tensor:
        """What each token's adapter adds to its scores. Args: a (1, tokens, K / P * e). Returns (1, tokens, K / P)."""
        s = torch.zeros(1, a.shape[:-1].numel(), self.score_rows.shape[2], dtype=torch.float32, device=a.device)
        self.punica_wrapper.add_shrink(s, a.flatten(0, -2), (self.score_rows,), 1.0)
        return s

    @classmethod
    def can_replace_layer(cls, source_layer: nn.Module, **_: Any) -> bool:
        """Whether a layer is one that this class is for, asked by vLLM."""
        return type(source_layer) is DownProjLinear


if DownProjLinearWithLoRA not in lora_layers._all_lora_classes:
    lora_layers._all_lora_classes = (DownProjLinearWithLoRA, *lora_layers._all_lora_classes)
