# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for what lies between the matrix products of a Finedeep model, each in one pass over its tokens.

`weigh`: from the gate and up projections G and U to weighted activations, forward and backward.
`combine`: from K expert outputs to scores, gates and their weighted sum, for few tokens.
`norm`: RMSNorm, forward and backward.

All is computed in float32 and rounded where the plain forms in PyTorch round, so that a gate of 1 gives the dense
model's numbers. Scalars are `constexpr`: a Python float would be a float64 argument where Inductor launches a kernel.
On a CPU the kernels run in Triton's interpreter (`TRITON_INTERPRET=1`), which is how they are tested.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch

try:  # a machine without Triton still has to load the model
    import triton
    import triton.language as tl
except ImportError:
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MAX_WIDTH = 16384  # numbers that one program holds of a row
MAX_TILE = 32768  # numbers that one program holds in all
REAL = (torch.Tensor, torch.nn.Parameter)  # tensors that are not another class's
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Kernels(NamedTuple):
    """The functions that one kind of device has; the first says whether the others can take some tensors."""

    runs_on: Callable[[list[torch.Tensor]], bool]
    weigh: Callable[..., tuple]
    weigh_backward: Callable[..., tuple]
    norm: Callable[..., torch.Tensor]
    norm_backward: Callable[..., tuple]


if triton is not None:

    @triton.jit
    def _rounded(x, like):
        return x.to(like.dtype.element_ty).to(tl.float32)

    @triton.jit
    def _weigh(G, U, v, y, g, tokens, K: tl.constexpr, e: tl.constexpr, c: tl.constexpr, BT: tl.constexpr,
               BE: tl.constexpr):  # fmt: skip
        """One program: BT tokens of one expert."""
        k = tl.program_id(1)
        t = tl.program_id(0) * BT + tl.arange(0, BT)
        j = tl.arange(0, BE)
        here = (t < tokens)[:, None] & (j < e)[None, :]
        at = t.to(tl.int64)[:, None] * (K * e) + k * e + j[None, :]
        gate = tl.load(G + at, here, other=0.0).to(tl.float32)
        up = tl.load(U + at, here, other=0.0).to(tl.float32)
        v_k = tl.load(v + k * e + j, j < e, other=0.0).to(tl.float32)
        a = _rounded(_rounded(gate / (1 + tl.exp(-gate)), y) * up, y)
        g_k = c / (1 + tl.exp(-tl.sum(a * v_k[None, :], 1)))
        tl.store(g + t.to(tl.int64) * K + k, g_k, t < tokens)
        tl.store(y + at, (_rounded(g_k, y)[:, None] * a).to(y.dtype.element_ty), here)

    @triton.jit
    def _weigh_backward(G, U, v, dy, dg, dG, dU, dv, tokens, K: tl.constexpr, e: tl.constexpr, c: tl.constexpr,
                        BT: tl.constexpr, BE: tl.constexpr):  # fmt: skip
        """One program: every so many blocks of BT tokens of one expert, whose part of dv it sums up.

        t_k = <dy_k, a_k> + dg_k; ds_k = t_k g_k (1 - g_k / c); da_k = g_k dy_k + ds_k v_k; dU = da act(G);
        dG = da U act'(G); dv_k = sum over tokens of ds_k a_k.
        """
        k = tl.program_id(1)
        j = tl.arange(0, BE)
        v_k = tl.load(v + k * e + j, j < e, other=0.0).to(tl.float32)
        dv_k = tl.zeros([BE], tl.float32)
        for block in range(tl.program_id(0), tl.cdiv(tokens, BT), tl.num_programs(0)):
            t = block * BT + tl.arange(0, BT)
            here = (t < tokens)[:, None] & (j < e)[None, :]
            at = t.to(tl.int64)[:, None] * (K * e) + k * e + j[None, :]
            gate = tl.load(G + at, here, other=0.0).to(tl.float32)
            up = tl.load(U + at, here, other=0.0).to(tl.float32)
            dy_k = tl.load(dy + at, here, other=0.0).to(tl.float32)
            open_ = 1 / (1 + tl.exp(-gate))
            a = gate * open_ * up
            g_k = c / (1 + tl.exp(-tl.sum(a * v_k[None, :], 1)))
            t_k = tl.sum(dy_k * a, 1) + tl.load(dg + t.to(tl.int64) * K + k, t < tokens, other=0.0)
            ds_k = t_k * g_k * (1 - g_k / c)
            da = g_k[:, None] * dy_k + ds_k[:, None] * v_k[None, :]
            tl.store(dU + at, (da * gate * open_).to(dU.dtype.element_ty), here)
            tl.store(dG + at, (da * up * open_ * (1 + gate * (1 - open_))).to(dG.dtype.element_ty), here)
            dv_k += tl.sum(ds_k[:, None] * a, 0)
        tl.store(dv + (tl.program_id(0) * K + k) * e + j, dv_k, j < e)

    @triton.jit
    def _combine(E, w, out, g, by_token, by_expert, K: tl.constexpr, d: tl.constexpr, c: tl.constexpr,
                 BK: tl.constexpr, BD: tl.constexpr):  # fmt: skip
        """One program: one token. E (tokens, K, d), whose strides are given; w (K, d)."""
        t = tl.program_id(0).to(tl.int64)
        k, i = tl.arange(0, BK), tl.arange(0, BD)
        here = (k < K)[:, None] & (i < d)[None, :]
        E_k = tl.load(E + t * by_token + k[:, None] * by_expert + i[None, :], here, other=0.0).to(tl.float32)
        w_k = tl.load(w + k[:, None] * d + i[None, :], here, other=0.0).to(tl.float32)
        g_k = c / (1 + tl.exp(-tl.sum(E_k * w_k, 1)))
        tl.store(g + t * K + k, g_k, k < K)
        tl.store(out + t * d + i, tl.sum(g_k[:, None] * E_k, 0).to(out.dtype.element_ty), i < d)

    @triton.jit
    def _norm(x, w, n, rows, d: tl.constexpr, eps: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
        t = tl.program_id(0) * BT + tl.arange(0, BT)
        i = tl.arange(0, BD)
        here = (t < rows)[:, None] & (i < d)[None, :]
        at = t.to(tl.int64)[:, None] * d + i[None, :]
        x_t = tl.load(x + at, here, other=0.0).to(tl.float32)
        r = 1 / tl.sqrt(tl.sum(x_t * x_t, 1) / d + eps)
        weight = tl.load(w + i, i < d, other=0.0).to(tl.float32)
        tl.store(n + at, (weight[None, :] * _rounded(x_t * r[:, None], n)).to(n.dtype.element_ty), here)

    @triton.jit
    def _norm_backward(x, w, dn, dx, dw, rows, d: tl.constexpr, eps: tl.constexpr, BT: tl.constexpr,
                       BD: tl.constexpr):  # fmt: skip
        """With x^ = x r and p = dn x^: dx = r (w dn - x^ <p, w> / d), dw = sum over rows of p."""
        i = tl.arange(0, BD)
        weight = tl.load(w + i, i < d, other=0.0).to(tl.float32)
        dw_sum = tl.zeros([BD], tl.float32)
        for block in range(tl.program_id(0), tl.cdiv(rows, BT), tl.num_programs(0)):
            t = block * BT + tl.arange(0, BT)
            here = (t < rows)[:, None] & (i < d)[None, :]
            at = t.to(tl.int64)[:, None] * d + i[None, :]
            x_t = tl.load(x + at, here, other=0.0).to(tl.float32)
            dn_t = tl.load(dn + at, here, other=0.0).to(tl.float32)
            r = 1 / tl.sqrt(tl.sum(x_t * x_t, 1) / d + eps)
            x_t = x_t * r[:, None]
            p = dn_t * x_t
            dx_t = (dn_t * weight[None, :] - x_t * (tl.sum(p * weight[None, :], 1) / d)[:, None]) * r[:, None]
            tl.store(dx + at, dx_t.to(dx.dtype.element_ty), here)
            dw_sum += tl.sum(p, 0)
        tl.store(dw + tl.program_id(0) * d + i, dw_sum, i < d)


def has_memory(*tensors: torch.Tensor) -> bool:
    """Whether they are there themselves: those of a functional transform or of a tracer stand for others."""
    try:
        for x in tensors:
            x.data_ptr()
    except RuntimeError:
        return False
    return True


def runs_on(tensors: list[torch.Tensor]) -> bool:
    """Whether these kernels can take the tensors: real ones, of one device and of a known dtype, no zero of them."""
    if triton is None:
        return False
    for x in tensors:
        if x.dtype not in DTYPES or type(x) not in REAL or x.device != tensors[0].device:
            return False
    return has_memory(*tensors) and all(x.data_ptr() for x in tensors)


@lru_cache
def _blocks(width: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile for rows of this width, and its warps."""
    columns = 1 << (width - 1).bit_length()  # triton.cdiv and its like are slow outside of kernels
    return max(1, 4096 // columns), columns, 4 if columns <= 4096 else 8


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _programs(x: torch.Tensor, blocks: int, K: int = 1) -> int:
    """How many programs share out the blocks where each sums up something: a few for each multiprocessor."""
    return min(blocks, max(1, 4 * _processors(x.device) // K))


def _on(x: torch.Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensor's where a model is spread over several."""
    here = not x.is_cuda or x.device.index == torch.cuda.current_device()
    return nullcontext() if here else torch.cuda.device(x.device)


def weigh(G: torch.Tensor, U: torch.Tensor, v: torch.Tensor, c: float) -> tuple[torch.Tensor, torch.Tensor]:
    """y_k = g_k * a_k with a = silu(G) * U and g_k = c * sigmoid(<v_k, a_k>).

    Args: G and U (..., K * e); v (K, e). Returns y as G, and g (..., K) in float32.
    """
    K, e = v.shape
    G, U, v = G.contiguous(), U.contiguous(), v.contiguous()
    tokens = G.numel() // (K * e)
    y, g = torch.empty_like(G), torch.empty(*G.shape[:-1], K, dtype=torch.float32, device=G.device)
    BT, BE, warps = _blocks(e)
    with _on(G):
        _weigh[(-(-tokens // BT), K)](G, U, v, y, g, tokens, K, e, c, BT, BE, num_warps=warps)
    return y, g


def weigh_backward(
    G: torch.Tensor, U: torch.Tensor, v: torch.Tensor, dy: torch.Tensor, dg: torch.Tensor, c: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `weigh`'s G, U and v, from those of y (..., K * e) and g (..., K)."""
    K, e = v.shape
    G, U, v, dy, dg = G.contiguous(), U.contiguous(), v.contiguous(), dy.contiguous(), dg.contiguous()
    tokens = G.numel() // (K * e)
    BT, BE, warps = _blocks(e)
    programs = _programs(G, -(-tokens // BT), K)
    dG, dU = torch.empty_like(G), torch.empty_like(U)
    dv = torch.empty(programs, K, e, dtype=torch.float32, device=G.device)
    with _on(G):
        _weigh_backward[(programs, K)](G, U, v, dy, dg, dG, dU, dv, tokens, K, e, c, BT, BE, num_warps=warps)
    return dG, dU, dv.sum(0).to(v.dtype)


def combine(E: torch.Tensor, w: torch.Tensor, c: float) -> tuple[torch.Tensor, torch.Tensor]:
    """sum_k g_k * E_k (..., d) and g_k = c * sigmoid(<w_k, E_k>) (..., K). Args: E (..., K, d); w (K, d)."""
    *shape, K, d = E.shape
    E, w = E.flatten(0, -3), w.contiguous()
    E = E if E.stride(-1) == 1 else E.contiguous()
    out = torch.empty(*shape, d, dtype=E.dtype, device=E.device)
    g = torch.empty(*shape, K, dtype=torch.float32, device=E.device)
    BK, BD = 1 << (K - 1).bit_length(), 1 << (d - 1).bit_length()
    with _on(E):
        _combine[(E.shape[0],)](
            E, w, out, g, E.stride(0), E.stride(1), K, d, c, BK, BD, num_warps=16 if BK * BD > 8192 else 4
        )
    return out, g


def norm(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    """w * x / rms(x), rounded where Llama rounds. Args: x (..., d); w (d), of x's dtype."""
    x, d = x.contiguous(), x.shape[-1]
    n, rows = torch.empty_like(x), x.numel() // d
    BT, BD, warps = _blocks(d)
    with _on(x):
        _norm[(-(-rows // BT),)](x, w, n, rows, d, eps, BT, BD, num_warps=warps)
    return n


def norm_backward(x: torch.Tensor, w: torch.Tensor, dn: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `norm`'s x and w, from that of its output."""
    x, dn, d = x.contiguous(), dn.contiguous(), x.shape[-1]
    rows = x.numel() // d
    BT, BD, warps = _blocks(d)
    programs = _programs(x, -(-rows // BT))
    dx, dw = torch.empty_like(x), torch.empty(programs, d, dtype=torch.float32, device=x.device)
    with _on(x):
        _norm_backward[(programs,)](x, w, dn, dx, dw, rows, d, eps, BT, BD, num_warps=warps)
    return dx, dw.sum(0).to(w.dtype)


TRITON = Kernels(runs_on, weigh, weigh_backward, norm, norm_backward)
