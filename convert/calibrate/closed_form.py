r"""The closed-form part of calibration: what can be repaired in a cut layer by linear least squares.

With u the residual stream before a layer's FFN, * for the dense model's, N the dense FFN's norm and F_m the part of the
dense FFN whose neurons sub-layer m has, sub-layer m was trained to read N(u*) and should bring the stream to

    u*_m = u* + r * sum_{j <= m} F_j(N(u*)),

but reads N(h) of a stream h that sub-layers before it, and layers before that, have changed. Two corrections, one
sub-layer after the other:

    input map        A  = argmin sum over tokens of w^2 |A N(h) - N(u*)|^2        W_gate <- W_gate A,  W_up <- W_up A
    down projection  dW = argmin sum of w^2 |(W_down + dW) a - (u*_m - h) / r|^2  W_down <- W_down + dW

each with a ridge that pulls A to 1 and dW to 0, as strong as is best on held-out tokens. A token's weight w is
1 / max(|h*|, L), with h* = u*_M the stream after the layer and L four times the median |h*|. Otherwise the first token
alone would decide, whose stream is a hundred times as long as any other's in many models.
"""

import copy
from collections.abc import Iterator

import torch
from torch import nn

from .least_squares import LeastSquares
from .neuron_statistics import activations
from .residual_stream import CHUNK, token_weights


@torch.no_grad()
def correct(
    sublayers: nn.ModuleList, u: torch.Tensor, dense_u: torch.Tensor, wanted: torch.Tensor, r: float, held: int
) -> None:
    """Correct a layer's sub-layers, which have the dense weights, in place.

    Args:
        sublayers: as they were cut, gates at 1.
        u: (tokens, hidden), the converted model's stream before them.
        dense_u: (tokens, hidden), the dense model's stream u* before its FFN.
        wanted: (tokens, hidden), the dense model's stream h* after it.
        r: the model's residual multiplier.
        held: so many tokens, the first ones, are held out.
    """
    device = sublayers[0].norm.weight.device
    h, ideal, weight = u.clone(), dense_u.clone(), token_weights(wanted)
    for sublayer in sublayers:
        part = copy.deepcopy(sublayer)
        fit, held_out = LeastSquares(), LeastSquares()
        for rows, solver in _rows(len(u), held, fit, held_out):
            n = sublayer.norm(h[rows].to(device))
            w = weight[rows].to(device)
            solver.add(w * n, w * (sublayer.norm(dense_u[rows].to(device)) - n))
        towards = fit.summed().best_on(held_out.summed()).float()
        for projection in (sublayer.gate_proj, sublayer.up_proj):
            projection.weight += projection.weight @ towards

        fit, held_out = LeastSquares(), LeastSquares()
        for rows, solver in _rows(len(u), held, fit, held_out):
            ideal[rows] += (r * part(dense_u[rows].to(device))[0]).cpu()
            x = h[rows].to(device)
            _, a = activations(sublayer, x)
            w = weight[rows].to(device)
            solver.add(w * a, w * ((ideal[rows].to(device) - x) / r - sublayer(x)[0]))
        sublayer.down_proj.weight += fit.summed().best_on(held_out.summed()).float()
        for rows, _ in _rows(len(u), held, fit, held_out):
            x = h[rows].to(device)
            h[rows] = torch.add(x, sublayer(x)[0], alpha=r).cpu()


def _rows(tokens: int, held: int, fit: LeastSquares, held_out: LeastSquares) -> Iterator[tuple[slice, LeastSquares]]:
    """The tokens in pieces, each with the sums that it belongs to."""
    for begin, end, solver in ((0, held, held_out), (held, tokens, fit)):
        for first in range(begin, max(end, begin + 1), CHUNK):  # once at least: another process may have some
            yield slice(first, min(first + CHUNK, end)), solver
