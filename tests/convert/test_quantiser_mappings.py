"""Scales moved by the mappings for AWQ and SmoothQuant change no logit, and each mapping is found in each layer."""

import re

import pytest
import torch
from conftest import random_model
from finedeep.convert.quantiser_mappings import EXPERTS, SUBLAYER, mappings_of

IDS = torch.arange(2 * 40).reshape(2, 40)


def matching(model, pattern):
    return [name for name, _ in model.named_modules() if re.fullmatch(pattern.removeprefix("re:"), name)]


@torch.no_grad()
def move_scales(model, smoothed, readers):
    """From each layer that the first pattern matches into those beside it that the others do. Returns how many."""
    layers = matching(model, smoothed)
    for name in layers:
        layer, parent = model.get_submodule(name), name.rpartition(".")[0]
        beside = [
            reader for pattern in readers for reader in matching(model, pattern) if reader.startswith(f"{parent}.")
        ]
        assert len(beside) == len(readers), (name, beside)
        scale = 0.5 + torch.rand(layer.weight.shape[0], generator=torch.Generator().manual_seed(0))
        layer.weight.div_(scale.view(-1, *[1] * (layer.weight.ndim - 1)))
        if getattr(layer, "bias", None) is not None:
            layer.bias.div_(scale)
        for reader in beside:
            model.get_submodule(reader).weight.mul_(scale)
    return len(layers)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_expert_sublayers": 1, "attention_bias": True, "mlp_bias": True},
        {"routing_input": "hidden_state", "routing_function": "softmax"},
    ],
    ids=["default", "biases", "hidden_state"],
)
@torch.no_grad()
def test_moved_scales_change_no_logit(fields):
    model = random_model(num_key_value_heads=4, **fields).double()
    before = model(IDS).logits
    M = model.config.num_expert_sublayers
    pairs = mappings_of(model.config)
    assert (SUBLAYER in pairs) == ("routing_input" not in fields)
    for smoothed, readers in pairs:
        moved = move_scales(model, smoothed, readers)
        assert moved == (2 * M if "sublayers" in smoothed else 2)
        torch.testing.assert_close(model(IDS).logits, before, rtol=1e-9, atol=1e-9)


def test_smoothquant_has_norms_alone():
    config = random_model().config
    assert EXPERTS not in mappings_of(config, norms_only=True)
    assert all("norm" in smoothed for smoothed, _ in mappings_of(config, norms_only=True))
