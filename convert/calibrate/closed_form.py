r"""The closed-form part of calibration: what can be repaired in a cut layer by linear least squares.

With u the residual stream before a layer's FFN, * for the dense model's, N the dense FFN's norm and F_m the part of the
dense FFN whose neurons sub-layer m has, sub-layer m was trained to read N(u*) and should bring the stream to

    u*_m = u* + r * sum_{j <= m} F_j(N(u*)),

but reads N(h) of a stream h that sub-layers before it, and layers before that, have changed. Two corrections, one
sub-layer after the other:

    input map        A  = argmin sum over tokens of |A N(h) - N(u*)|^2        W_gate <- W_gate A,  W_up <- W_up A
    down projection  dW = argmin sum of |(W_down + dW) a - (u*_m - h) / r|^2  W_down <- W_down + dW

each with a ridge that pulls A to 1 and dW to 0, as strong as is best on held-out tokens.
"""

import copy
from collections.abc import Iterator

import torch
from torch import nn

from .least_squares import LeastSquares
from .neuron_statistics import activations
from .residual_stream import CHUNK


@torch.no_grad()
def correct(sublayers: nn.ModuleList, u: torch.Tensor, dense_u: torch.Tensor, r: float, held: int) -> None:
    """Correct a layer's sub-layers, which have the dense weights, in place.

    Args:
        sublayers: as they were cut, gates at 1.
        u: (tokens, hidden), the converted model's stream before them.
        dense_u: (tokens, hidden), the dense model's stream u* before its FFN.
        r: the model's residual multiplier.
        held: so many tokens, the first ones, are held out.
    """
    device = sublayers[0].norm.weight.device
    h, ideal = u.clone(), dense_u.clone()
    for sublayer in sublayers:
        part = copy.deepcopy(sublayer)
        fit, held_out = LeastSquares(), LeastSquares()
        for rows, solver in _rows(len(u), held, fit, held_out):
            n = sublayer.norm(h[rows].to(device))
            solver.add(n, sublayer.norm(dense_u[rows].to(device)) - n)
        towards = fit.best_on(held_out).float()
        for projection in (sublayer.gate_proj, sublayer.up_proj):
            projection.weight += projection.weight @ towards

        fit, held_out = LeastSquares(), LeastSquares()
        for rows, solver in _rows(len(u), held, fit, held_out):
            ideal[rows] += (r * part(dense_u[rows].to(device))[0]).cpu()
            x = h[rows].to(device)
            _, a = activations(sublayer, x)
            solver.add(a, (ideal[rows].to(device) - x) / r - sublayer(x)[0])
        sublayer.down_proj.weight += fit.best_on(held_out).float()
        for rows, _ in _rows(len(u), held, fit, held_out):
            x = h[rows].to(device)
            h[rows] = torch.add(x, sublayer(x)[0], alpha=r).cpu()


def _rows(tokens: int, held: int, fit: LeastSquares, held_out: LeastSquares) -> Iterator[tuple[slice, LeastSquares]]:
    """The tokens in pieces, each with the sums that it belongs to."""
    for begin, end, solver in ((0, held, held_out), (held, tokens, fit)):
        for first in range(begin, end, CHUNK):
            yield slice(first, min(first + CHUNK, end)), solver
