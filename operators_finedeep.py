# SPDX-License-Identifier: Apache-2.0
"""How a Finedeep sub-layer is computed: faster forms of the function that `modeling_finedeep.py` defines.

1. What lies between the matrix products, in one pass on a GPU, keeping its inputs alone for backward.
2. The scores without any expert output: <w_k, W_down,k a_k> = <v_k, a_k> with v_k = W_down,k' w_k.
3. What W_down is, whatever has been put around or in the place of `down_proj`.
"""

import inspect
import math
import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from .cpu_kernels_finedeep import CPU
from .kernels_finedeep import INTERPRETED, MAX_TILE, MAX_WIDTH, TRITON, Kernels, combine

# What lies between the matrix products: "plain", PyTorch as the equations are written, everywhere; "triton", Triton's
# kernels in their interpreter on a CPU too; by default Triton's kernels on a GPU, our own on a CPU. For debugging.
FORCED = os.environ.get("FINEDEEP_KERNELS")
VECTORS = weakref.WeakKeyDictionary()  # of each cache of keys and values: of each `down_proj`, its score vectors
NO_ROWS_OF_ZEROS = weakref.WeakSet()  # layers with DoRA that have been looked at
SILU = (nn.SiLU, type(ACT2FN["silu"]))


# 1. Between the matrix products


def run(plain: Callable[..., Any], work: str | None, number: float, *inputs: torch.Tensor | None) -> Any:
    """plain(*inputs) in eager mode, by the kernels of this name and `number` where some can take the inputs.

    Backward keeps the inputs and nothing else. Compilers choose for themselves what to fuse and to keep; tracers, the
    transforms of `torch.func` and forward-mode derivatives need plain operators. In eager mode a kernel of our own was
    weighed against this region under `torch.compile` on an H100: that took longer at every call, for its guards, and
    seconds at the first.
    """
    given = [x for x in inputs if x is not None]
    kernels = kernels_for(given) if work else None
    if not torch.is_grad_enabled():
        return plain(*inputs) if kernels is None else getattr(kernels, work)(*given, number)
    if torch._C._are_functorch_transforms_active():
        return plain(*inputs)
    if any(torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in given):
        return plain(*inputs)
    return Recomputed.apply(plain, kernels, work, number, *inputs)


def is_eager(x: torch.Tensor) -> bool:
    """Whether PyTorch computes as it goes: no compiler or tracer is at work, and `x` is not an engine's `fx.Proxy`."""
    return isinstance(x, torch.Tensor) and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def kernels_for(given: list[torch.Tensor]) -> Kernels | None:
    """Those that take these tensors, or None."""
    if FORCED == "plain":
        return None
    kernels = TRITON if given[0].is_cuda or (FORCED == "triton" and INTERPRETED) else CPU
    return kernels if kernels.runs_on(given) else None


class Recomputed(torch.autograd.Function):
    """A function of which backward keeps the inputs, and computes the rest again."""

    @staticmethod
    def forward(ctx: Any, plain: Callable, kernels: Kernels | None, work: str, number: float, *inputs: Any) -> Any:
        ctx.plain, ctx.kernels, ctx.work, ctx.number = plain, kernels, work, number
        ctx.save_for_backward(*inputs)
        given = [x for x in inputs if x is not None]
        return plain(*inputs) if kernels is None else getattr(kernels, work)(*given, number)

    @staticmethod
    def backward(ctx: Any, *d_outputs: torch.Tensor) -> tuple:
        inputs, needed = ctx.saved_tensors, ctx.needs_input_grad[4:]
        if torch.is_grad_enabled():  # for derivatives of derivatives

            def of_needed(*some: torch.Tensor) -> Any:
                some = iter(some)
                return ctx.plain(*(next(some) if need else x for x, need in zip(inputs, needed, strict=True)))

            pull_back = torch.func.vjp(of_needed, *(x for x, need in zip(inputs, needed, strict=True) if need))[1]
            found = iter(pull_back(d_outputs if len(d_outputs) > 1 else d_outputs[0]))
        elif ctx.kernels is not None:
            given = [x for x in inputs if x is not None]
            found = getattr(ctx.kernels, f"{ctx.work}_backward")(*given, *d_outputs, ctx.number)
            return None, None, None, None, *found, *[None] * (len(inputs) - len(given))  # what is not given comes last
        else:
            with torch.enable_grad():
                inputs = [x if x is None else x.detach().requires_grad_(n) for x, n in zip(inputs, needed, strict=True)]
                outputs = ctx.plain(*inputs)
            outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
            # Gates need none where neither their router nor what they are read from does.
            pairs = [(out, d) for out, d in zip(outputs, d_outputs, strict=True) if out.requires_grad]
            wanted = [x for x in inputs if x is not None and x.requires_grad]
            outputs, d_outputs = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(outputs, wanted, d_outputs))
        return None, None, None, None, *(next(found) if need else None for need in needed)


def dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """<x, y> over the last dimension in float32 at least, under autocast too (which would round an einsum)."""
    return (x.to(torch.promote_types(x.dtype, torch.float32)) * y).sum(-1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Llama's RMSNorm in eager mode: weight * x / rms(x), with its rounding. Args: x (..., hidden)."""

    def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        return weight * nn.functional.rms_norm(exact, exact.shape[-1:], eps=eps).to(x.dtype)

    fits = weight.dtype == x.dtype and x.shape[-1] <= MAX_WIDTH
    return run(plain, "norm" if fits else None, eps, x, weight)


class FinedeepRMSNorm(LlamaRMSNorm):
    """Llama's RMSNorm in one pass, which keeps only its input for backward: there are M for each of Llama's."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Args: hidden_states (batch, seq, hidden). Returns the same shape."""
        if not is_eager(hidden_states):
            return super().forward(hidden_states=hidden_states)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class FinedeepOutputNorm(FinedeepRMSNorm):
    """The sandwich norm on a sub-layer's output. It starts small, so that M sub-layers do not swamp the residual."""

    initial_weight = 0.1


class FinedeepStackGates(nn.Module):
    """Stacks a layer's gates to (batch, seq, M, K), a module only so that transformers can record what it returns."""

    def forward(self, gates: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(gates, dim=-2)


def weighted_activations(
    G: torch.Tensor, U: torch.Tensor, v: torch.Tensor | None, s: torch.Tensor | None, act: Any, gates: Any, c: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """y_k = g_k * a_k, where a = act(G) * U, and g, the gates of <v_k, a_k> + s_k; of v and s one may be None.

    Args: G and U (batch, seq, K * e); v (K, e); s (batch, seq, K), or (K) for all tokens; act, the activation; gates,
    scores to gates as in `ROUTING_FUNCTIONS`. Returns y as G, and g (batch, seq, K) in float32 at least.
    """

    def plain(G: torch.Tensor, U: torch.Tensor, v: torch.Tensor | None, s: torch.Tensor | None) -> tuple:
        a = (act(G) * U).unflatten(-1, ((s if v is None else v.transpose(0, 1)).shape[-1], -1))
        scores = s if v is None else dot(a, v) if s is None else dot(a, v) + s
        g = c * gates(scores)
        return (g.to(a.dtype).unsqueeze(-1) * a).flatten(-2), g

    # Who hooks the activation meets it once, with its gradient.
    if is_watched(act) or not is_eager(G):
        return plain(G, U, v, s)
    fits = s is None and gates is torch.sigmoid and isinstance(act, SILU) and v.shape[-1] <= MAX_WIDTH
    return run(plain, "weigh" if fits else None, c, G, U, v, s)


def combined_by_kernel(E: torch.Tensor, router: torch.Tensor, gates: Any, c: float) -> tuple | None:
    """sum_k g_k * E_k and g by one kernel; None where that cannot be, as with gradients. E: (batch, seq, K, hidden)."""
    if torch.is_grad_enabled() or not is_eager(E) or gates is not torch.sigmoid:
        return None
    tile = math.prod(1 << (size - 1).bit_length() for size in E.shape[-2:])
    fits = tile <= MAX_TILE and kernels_for([E, router]) is TRITON
    return combine(E, router, c) if fits else None


# 2. and 3. Scores from `down_proj`. One rule:
#
# - Where it is an `nn.Linear` whose weight is there to be read, scores are read from the weight. Hooks on it, and a
#   `forward` of its instance, meet each token's weighted activations, once, and act on what is made of them.
# - What stands in its place (an adapter, a quantiser, an offload hook, a sharding engine) is asked for its linear part:
#   whatever it adds besides is added once, has no gate, and is not in the scores.


def is_readable(linear: nn.Module, like: torch.Tensor) -> bool:
    """Whether `linear` is an `nn.Linear` whose weight is here: not replaced, quantised, sharded or offloaded.

    torchao's float8 training keeps the weight as it is, and rounds it only on the way into a product.
    """
    weight = linear._parameters.get("weight")
    return (
        (type(linear) is nn.Linear or type(linear).__module__.startswith("torchao.float8"))
        and weight is not None
        and not hasattr(weight, "__tensor_flatten__")  # one tensor that stands for others: quantised, or sharded
        and weight.ndim == 2  # flat, or empty, where an engine has taken it away
        and weight.is_meta == like.is_meta
    )


def is_watched(linear: nn.Module) -> bool:
    """Whether something wants to see, or to do, what `linear` does; a hook that only moves tensors does not."""
    hook = linear.__dict__.get("_hf_hook")  # getattr is slow where there is none
    moves = hook is not None and not getattr(hook, "offload", True)
    return bool(linear._forward_hooks or linear._forward_pre_hooks or ("forward" in linear.__dict__ and not moves))


def differs_by_token(linear: nn.Module) -> bool:
    """Whether `linear` may be another function for each token: an adapter that hooks tell which ones it is for."""
    return not isinstance(linear, nn.Linear) and bool(linear._forward_pre_hooks or "forward" in linear.__dict__)


def expert_outputs(linear: nn.Module, a: torch.Tensor) -> torch.Tensor:
    """E_k = W_k a_k. Args: a (batch, seq, K, e). Returns (batch, seq, K, hidden).

    Where the weight cannot be read, by one call with K rows for each token (a_k, else zeros) and a row of zeros.
    """
    K, e = a.shape[-2:]
    if not is_readable(linear, a):
        alone = torch.eye(K, dtype=a.dtype, device=a.device).unsqueeze(-1) * a.unsqueeze(-3)
        rows = alone.flatten(-2).flatten(0, -2)  # (tokens * K, K * e)
        E = linear(torch.cat([rows, rows.new_zeros(1, K * e)])[None])[0]
        return (E[:-1] - E[-1]).view(*a.shape[:-1], -1)
    W = linear.weight.unflatten(1, (K, e)).permute(1, 2, 0)  # (K, e, hidden), a view
    E = torch.bmm(a.flatten(0, -3).transpose(0, 1), W)  # an einsum's product, without an einsum's bookkeeping
    return E.transpose(0, 1).view(*a.shape[:-1], W.shape[-1])


def scores_of(
    linear: nn.Module,
    router: torch.Tensor,
    a: Callable[[], torch.Tensor],
    like: torch.Tensor,
    cache: DynamicCache | None,
) -> tuple:
    """What the scores s_k = <w_k, L_k a_k> of `linear`'s linear part L are read from.

    Args: router (K, hidden); a, which gives the activations (batch, seq, K, e); like (batch, seq, K * e), for shape,
    dtype and device. Returns v (K, e) and None, where one v serves all tokens, or None and s (batch, seq, K).
    """
    if cache is not None and (v := kept_vectors(cache, linear, router)) is not None:
        return v, None
    K = router.shape[0]
    if is_readable(linear, like):
        v = score_vectors(linear.weight, router)
        if cache is not None:
            keep_vectors(cache, linear, router, v)
        return v, None
    refuse_engines_adapters(linear)
    refuse_rows_of_zeros(linear)
    if differs_by_token(linear):
        return None, scores_by_expert(linear, router, a())
    if (V := pull_back(linear, router, like.new_zeros(K, like.shape[-1]))) is not None:
        return torch.einsum("kke->ke", V.unflatten(-1, (K, -1))), None
    tokens, width = like.shape[:-1].numel(), like.shape[-1]
    if tokens * K <= width:
        return None, dot(expert_outputs(linear, a()), router)
    rows = torch.eye(width + 1, width, dtype=like.dtype, device=like.device)  # the last one, zeros: what is added
    W = linear(rows)
    return score_vectors((W[:-1] - W[-1]).transpose(0, 1), router), None


def refuse_engines_adapters(linear: nn.Module) -> None:
    """Raise `ValueError` for vLLM's LoRA layer: it knows each row's adapter, and rows that are no tokens have none."""
    if hasattr(linear, "lora_a_stacked"):
        raise ValueError(
            "vLLM's Transformers backend cannot serve adapters on down_proj. Install finedeep beside vLLM, as its "
            "plug-in can, or leave down_proj out: --lora-target-modules q_proj k_proj v_proj o_proj gate_proj up_proj."
        )


def refuse_rows_of_zeros(linear: nn.Module) -> None:
    """Raise `ValueError` for DoRA on a `down_proj` with rows of zeros, as a grown model has: it divides by norms."""
    vectors = getattr(linear, "lora_magnitude_vector", None)
    if not vectors or linear in NO_ROWS_OF_ZEROS or torch.compiler.is_compiling():
        return
    if any((vector.weight == 0).any() for vector in vectors.values()):
        raise ValueError(
            "DoRA divides by the norms of down_proj's rows, and some of these are zeros (a model made with --mode grow "
            "has such). Use LoRA without use_dora, or leave down_proj out of target_modules."
        )
    NO_ROWS_OF_ZEROS.add(linear)


def score_vectors(W: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
    """v_k = W_k' w_k. Args: W (hidden, K * e); router (K, hidden). Returns (K, e)."""
    if router.dtype != W.dtype or router.device != W.device:
        router = router.to(W.device, W.dtype)
    W = W.unflatten(1, (router.shape[0], -1)).transpose(0, 1)  # (K, hidden, e), a view
    return torch.bmm(router.unsqueeze(1), W).squeeze(1)


def cache_in(arguments: dict[str, Any], h: torch.Tensor) -> list[DynamicCache]:
    """The cache of keys and values that score vectors are kept with: in eager generation, whatever its name.

    Not a static one, which outlives a generation and what is done to the weights after it.
    """
    if torch.is_grad_enabled() or not is_eager(h):
        return []
    return [value for value in arguments.values() if type(value) is DynamicCache][:1]


def state_of(W: torch.Tensor, router: torch.Tensor) -> tuple | None:
    """What changes when somebody writes to these tensors or rounds them, or None if they do not say.

    Inference tensors count no changes, those of a functional transform have no memory. Autocast would round.
    """
    try:
        rounded = torch.is_autocast_enabled(W.device.type)
        return W.data_ptr(), W._version, router.data_ptr(), router._version, rounded
    except RuntimeError:
        return None


def keep_vectors(cache: DynamicCache, linear: nn.Linear, router: torch.Tensor, v: torch.Tensor) -> None:
    """Keep v_k = W_k' w_k (K, e) as long as the cache is, and nothing writes to the weights."""
    W = linear.weight
    if (now := state_of(W, router)) is not None:
        of_layers = VECTORS.setdefault(cache, weakref.WeakKeyDictionary())
        # Another tensor may lie where one has been freed.
        of_layers[linear] = now, weakref.ref(W), weakref.ref(router), v


def kept_vectors(cache: DynamicCache, linear: nn.Module, router: torch.Tensor) -> torch.Tensor | None:
    """The v_k (K, e) that were kept with the cache for these very weights, or None."""
    then, of_W, of_router, v = VECTORS.get(cache, {}).get(linear, (None,) * 4)
    if then is None or of_W() is not linear.weight or of_router() is not router or then != state_of(of_W(), router):
        return None
    return v


def pull_back(linear: nn.Module, rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """`rows` L, as autograd knows it, or None if it does not. Args: rows (K, out), x (K, in). Returns (K, in)."""
    if torch.compiler.is_compiling():
        if not torch.is_grad_enabled():
            return None
        y, pull = torch.func.vjp(linear, x)
        return pull(rows.to(y.dtype))[0]
    if any(module._forward_pre_hooks for module in linear.modules()):
        return None  # FSDP and ZeRO, at work in hooks, free the weight before autograd could use it
    recorded = torch.is_grad_enabled()
    # Without hooks of its own, a checkpoint around the layer would run the layer again for what autograd keeps here.
    keep = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    try:
        with torch.inference_mode(False), torch.enable_grad(), keep:
            x = torch.zeros_like(x, requires_grad=True)
            y = linear(x)
            if not y.requires_grad:
                return None
            rows = rows.to(y.dtype)
            return torch.autograd.grad(y, x, rows if recorded else rows.detach().clone(), create_graph=recorded)[0]
    except (RuntimeError, AssertionError, NotImplementedError):  # of what rounds, or packs, and has no derivative
        return None


def scores_by_expert(linear: nn.Module, router: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """s_k = <w_k, L_k a_k>, by a call for each expert, of the shape that every other call has."""
    nothing = torch.zeros_like(a)
    added = linear(nothing.flatten(-2))
    scores = []
    for k, w_k in enumerate(router):
        alone = nothing.index_copy(-2, torch.tensor([k], device=a.device), a[..., k : k + 1, :])
        scores.append(dot(linear(alone.flatten(-2)) - added, w_k))
    return torch.stack(scores, dim=-1)


def local_part(x: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that tensor parallelism has sharded; otherwise the tensor itself."""
    return x.to_local() if hasattr(x, "to_local") else x


def prefers_definition(sublayer: nn.Module, G: torch.Tensor, cache: DynamicCache | None) -> bool:
    """Whether K outputs a token cost less than the score vectors. Args: G (batch, seq, K * e).

    Never where the vectors are kept, nor in a graph that is exported, which has one form for every number of tokens.
    """
    if cache is not None or sublayer.routing_input == "hidden_state" or is_exporting():
        return False
    linear, experts = sublayer.down_proj, sublayer.num_experts
    if G.shape[-1] != experts * sublayer.expert_width:
        return False
    # torch multiplies batches of matrices slowly in bfloat16 on a CPU (measured).
    few = sublayer.definition_max_tokens
    few = few // experts if G.dtype == torch.bfloat16 and G.device.type == "cpu" else few
    return (
        G.shape[:-1].numel() <= few and type(linear) is nn.Linear and is_readable(linear, G) and not is_watched(linear)
    )


def score_source(
    sublayer: nn.Module, G: torch.Tensor, U: torch.Tensor, n: torch.Tensor, cache: DynamicCache | None
) -> tuple:
    """What the scores are read from: v (K, e), or None; and what they have besides <v_k, a_k>, or None.

    Args: G and U (batch, seq, K * e); n (batch, seq, hidden); cache, of keys and values, or None.
    """
    router, linear, e, width = sublayer.router, sublayer.down_proj, sublayer.expert_width, G.shape[-1]
    if width == sublayer.num_experts * e and sublayer.routing_input == "expert_output" and sublayer.expert_bias is None:
        return scores_of(linear, router, lambda: (sublayer.act_fn(G) * U).unflatten(-1, (-1, e)), G, cache)
    router, experts = local_part(router), width // e
    if width % e:
        raise NotImplementedError(
            f"Tensor parallelism shares out whole experts: {sublayer.num_experts} experts per sub-layer must be "
            "divisible by the number of processes."
        )
    if router.shape[0] != experts:
        raise NotImplementedError(
            f"This process holds {experts} of the sub-layer's {sublayer.num_experts} experts and {router.shape[0]} of "
            "their routers. Share out gate_proj, up_proj, router and down_proj together, as tp_plan='auto' does."
        )
    if sublayer.routing_input == "hidden_state":
        return None, scores_of_hidden_state(n, router)
    if experts == sublayer.num_experts:
        v, s = scores_of(linear, router, lambda: (sublayer.act_fn(G) * U).unflatten(-1, (experts, e)), G, cache)
    elif type(linear) is nn.Linear:
        v, s = score_vectors(local_part(linear.weight), router), None
    else:
        raise NotImplementedError(
            f"With experts shared out over processes, down_proj must be an nn.Linear, not a {type(linear).__name__}: "
            "take adapters and quantisation off, or load in one process."
        )
    if sublayer.expert_bias is not None:
        bias = dot(sublayer.expert_bias, router)
        s = bias if s is None else s + bias
    return v, s


def scores_of_hidden_state(n: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
    """s_k = <w_k, n> in float32 at least. Args: n (batch, seq, hidden); router (K, hidden). Returns (batch, seq, K)."""
    exact = torch.promote_types(n.dtype, torch.float32)
    with torch.autocast("cpu" if n.device.type == "meta" else n.device.type, enabled=False):
        return nn.functional.linear(n.to(exact), router.to(exact))


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


def kept(h: torch.Tensor, positions: int | torch.Tensor) -> torch.Tensor:
    """Those of h (batch, seq, hidden) that logits are computed for: `slice_logits_to_keep` of transformers 5.24.

    Args: positions as Llama's `logits_to_keep`: the last ones, of which 0 are all; indices (n); indices (batch, n) of
    each sequence; or a mask (batch, seq), which gives (tokens, hidden).
    """
    if isinstance(positions, int):
        return h[:, -positions:, :]
    if positions.ndim < 2:
        return h[:, positions, :]
    return h[positions] if positions.dtype == torch.bool else torch.take_along_dim(h, positions[..., None], dim=1)


def is_exporting() -> bool:
    """Whether a graph is exported; old versions of torch do not say."""
    return getattr(torch.compiler, "is_exporting", lambda: False)()
