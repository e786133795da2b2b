"""How active each neuron of a dense model is on a text."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoTokenizer, PretrainedConfig

from .errors import ConversionError

WINDOW = 512
MAX_TOKENS = 32_768


def mean_activity(folder: Path, config: PretrainedConfig, text: Path, progress: bool) -> list[torch.Tensor]:
    """For each layer, the mean |activation| of each neuron, (width,), over up to 32,768 tokens of the text.

    The model is loaded whole, in its own dtype, by the family's class in transformers.

    Raises:
        ConversionError: the text cannot be read or is shorter than two tokens.
    """
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"{text} cannot be read as a text ({error}); a UTF-8 text file is wanted.") from error
    ids = AutoTokenizer.from_pretrained(folder)(content, return_tensors="pt", verbose=False)["input_ids"]
    if ids.shape[1] < 2:
        raise ConversionError(f"{text} has {ids.shape[1]} tokens; a longer text is wanted.")
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        folder, config=config, dtype="auto", use_safetensors=True
    )
    totals = [torch.zeros(config.intermediate_size) for _ in range(config.num_hidden_layers)]

    def watch(total: torch.Tensor) -> Callable[..., None]:
        def add(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            total.add_(inputs[0].abs().flatten(0, -2).sum(0, dtype=torch.float32))

        return add

    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(watch(total))
        for layer, total in zip(model.model.layers, totals, strict=True)
    ]
    windows = ids[:, :MAX_TOKENS].split(min(WINDOW, config.max_position_embeddings), dim=1)
    with torch.inference_mode():
        for window in tqdm(windows, desc="Measuring activity", disable=None if progress else True):
            model.model(window)
    for hook in hooks:
        hook.remove()
    return [total / min(ids.shape[1], MAX_TOKENS) for total in totals]
