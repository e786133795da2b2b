"""What each neuron of a dense FFN does on a text."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from finedeep_files.errors import ConversionError
from torch import nn
from tqdm import tqdm
from transformers import PretrainedConfig

from ...modeling_finedeep import FinedeepSublayer
from ..source import load_dense
from .least_squares import LeastSquares
from .sharing import total
from .text import read_tokens, window_of

MAX_TOKENS = 32_768
CHUNK = 4096


def mean_activity(folder: Path, config: PretrainedConfig, text: Path, progress: bool) -> list[torch.Tensor]:
    """For each layer, the mean |activation| of each neuron, (width,), over up to 32,768 tokens of the text.

    The model is loaded whole.

    Raises:
        ConversionError: the text cannot be read or is shorter than two tokens.
    """
    ids = read_tokens(folder, text, config.vocab_size)[:MAX_TOKENS]
    if len(ids) < 2:
        raise ConversionError(f"{text} has {len(ids)} tokens; name a longer text.")
    model = load_dense(folder, config)
    totals = [torch.zeros(config.intermediate_size) for _ in range(config.num_hidden_layers)]

    def watch(total: torch.Tensor) -> Callable[..., None]:
        def add(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            total.add_(inputs[0].abs().flatten(0, -2).sum(0, dtype=torch.float32))

        return add

    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(watch(total))
        for layer, total in zip(model.model.layers, totals, strict=True)
    ]
    windows = ids[None].split(window_of(config), dim=1)
    with torch.inference_mode():
        for window in tqdm(windows, desc="Measuring activity", disable=None if progress else True):
            model.model(window)
    for hook in hooks:
        hook.remove()
    return [total / len(ids) for total in totals]


@torch.inference_mode()
def activations(ffn: FinedeepSublayer, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A dense FFN's normalised input n (tokens, hidden) and activations a (tokens, width). Args: u (tokens, hidden)."""
    n = ffn.norm(u)
    return n, ffn.act_fn(ffn.gate_proj(n)) * ffn.up_proj(n)


def activity_on(ffn: FinedeepSublayer, u: torch.Tensor) -> torch.Tensor:
    """The mean |activation| of each neuron, (width,), on a stream u (tokens, hidden)."""
    summed = total(sum(activations(ffn, part)[1].abs().sum(0) for part in _parts(ffn, u)))
    return (summed / total(torch.tensor(float(min(len(u), MAX_TOKENS)), device=summed.device))).cpu()


def nonlinearity_on(ffn: FinedeepSublayer, u: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """How much of what each neuron puts out no linear map of its input can, (width,).

    ||W_down[:, i]||^2 * sum over tokens of w^2 (a_i - <b_i, n>)^2, with b_i fitted by least squares.

    Args:
        ffn: the dense FFN.
        u: (tokens, hidden), the stream before it.
        weight: (tokens, 1), each token's w.
    """
    squares = LeastSquares()
    for part, w in zip(_parts(ffn, u), _parts(ffn, weight), strict=True):
        n, a = activations(ffn, part)
        squares.add(w * n, w * a)
    return (squares.summed().residuals(1e-6).float() * ffn.down_proj.weight.pow(2).sum(0)).cpu()


def _parts(ffn: FinedeepSublayer, u: torch.Tensor) -> map:
    return map(partial(torch.Tensor.to, device=ffn.norm.weight.device), u[:MAX_TOKENS].split(CHUNK))
