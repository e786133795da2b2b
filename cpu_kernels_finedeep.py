# SPDX-License-Identifier: Apache-2.0
"""What lies between the matrix products of a Finedeep model, on a CPU: as few passes and new tensors as PyTorch allows.

The functions are those of `kernels_finedeep.py`, without `combine`. On a CPU each pass reads and writes the caches, and
each new tensor costs page faults. All is in float32 or float64, so that nothing is rounded on the way.
"""

from functools import lru_cache

import torch
from torch import nn

from .kernels_finedeep import REAL, Kernels, has_memory


def runs_on(tensors: list[torch.Tensor]) -> bool:
    """Whether these forms can take the tensors: real ones on a CPU, all float32 or all float64, without autocast."""
    x = tensors[0]
    if x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
        return False
    for y in tensors:
        if y.dtype != x.dtype or type(y) not in REAL or not y.is_cpu:
            return False
    return has_memory(*tensors)


@lru_cache
def _scalar(value: float, dtype: torch.dtype) -> torch.Tensor:
    """A number as a tensor, which PyTorch would make of it at every call."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype)


def weigh(G: torch.Tensor, U: torch.Tensor, v: torch.Tensor, c: float) -> tuple[torch.Tensor, torch.Tensor]:
    """y_k = g_k * a_k with a = silu(G) * U and g_k = c * sigmoid(<v_k, a_k>).

    Args: G and U (..., K * e); v (K, e). Returns y as G, and g (..., K).
    """
    a = nn.functional.silu(G.contiguous()).mul_(U).view(*G.shape[:-1], *v.shape)
    g = (a * v).sum(-1).sigmoid_().mul_(_scalar(c, G.dtype))
    return a.mul_(g.unsqueeze(-1)).view(G.shape), g


def weigh_backward(
    G: torch.Tensor, U: torch.Tensor, v: torch.Tensor, dy: torch.Tensor, dg: torch.Tensor, c: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `weigh`'s G, U and v, from those of y (..., K * e) and g (..., K)."""
    G, per_expert = G.contiguous(), (*G.shape[:-1], *v.shape)
    b, dy = nn.functional.silu(G), dy.reshape(per_expert)
    a = (b * U).view(per_expert)
    g = (a * v).sum(-1).sigmoid_()  # over c, as c's powers are in ds
    ds = (dy * a).sum(-1).add_(dg).mul_(g).mul_(1 - g).mul_(c)
    da = (dy * (g * c).unsqueeze(-1)).addcmul_(ds.unsqueeze(-1), v)
    dv = torch.bmm(ds.flatten(0, -2).t().unsqueeze(1), a.flatten(0, -3).transpose(0, 1)).squeeze(1)
    da = da.view(G.shape)
    dU = b.mul_(da)
    return torch.ops.aten.silu_backward(da.mul_(U), G), dU, dv


def norm(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    """w * x / rms(x). Args: x (..., d); w (d)."""
    return (x * _over_rms(x, eps)).mul_(w)


def norm_backward(x: torch.Tensor, w: torch.Tensor, dn: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `norm`'s x and w, from that of its output."""
    r = _over_rms(x, eps)
    z = x * r
    p = dn * z
    dw = p.flatten(0, -2).sum(0)
    mean = p.mul_(w).sum(-1, keepdim=True).mul_(1 / x.shape[-1])
    return (dn * w).addcmul_(z, mean, value=-1).mul_(r), dw


def _over_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / rms(x), (..., 1), to the bit as Llama computes it."""
    return x.square().mean(-1, keepdim=True).add_(_scalar(eps, x.dtype)).rsqrt_()


CPU = Kernels(runs_on, weigh, weigh_backward, norm, norm_backward)
