"""Ideas beyond the paper: each is what its equation says, and can be trained."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from finedeep import FinedeepConfig, FinedeepForCausalLM

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
import ideas  # noqa: E402
from recipe import runs_of  # noqa: E402


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = FinedeepConfig(**sizes, vocab_size=50, num_expert_sublayers=2, num_experts_per_sublayer=3)
    model = FinedeepForCausalLM(config).double()
    for sublayer in ideas.sublayers_of(model):
        sublayer.router.data.normal_()
    return model


def expert_outputs(sublayer, h):
    """E_k in plain loops, [K] of (hidden)."""
    n = sublayer.norm(h)
    a = torch.nn.functional.silu(sublayer.gate_proj.weight @ n) * (sublayer.up_proj.weight @ n)
    e = sublayer.expert_width
    return [sublayer.down_proj.weight[:, k * e : (k + 1) * e] @ a[k * e : (k + 1) * e] for k in range(3)]


def over_rms(x):
    return x / (x.square().mean() + 1e-6).sqrt()


@pytest.mark.parametrize("idea", ideas.IDEAS)
def test_each_is_what_its_equation_says(model, idea):
    ideas.IDEAS[idea](model)
    sublayer = ideas.sublayers_of(model)[1]
    if idea == "expert_norms":
        torch.testing.assert_close(sublayer.expert_norm, torch.full((48,), 0.1 / 3**0.5, dtype=torch.float64))
        sublayer.expert_norm.data.normal_()
    h = torch.randn(2, 40, 16, dtype=torch.float64)
    combined, gates = sublayer(h)
    for b, t in ((0, 0), (1, 39)):
        expected = 0
        for k, E in enumerate(expert_outputs(sublayer, h[b, t])):
            g = 2 * torch.sigmoid(sublayer.router[k] @ over_rms(E))
            torch.testing.assert_close(gates[b, t, k], g)
            weights = sublayer.expert_norm.view(3, 16)[k] if idea == "expert_norms" else 1
            expected = expected + g * (weights * over_rms(E) if idea == "expert_norms" else E)
        torch.testing.assert_close(combined[b, t], expected)


@pytest.mark.parametrize("idea", ideas.IDEAS)
def test_all_of_it_is_trained(model, idea):
    ideas.IDEAS[idea](model)
    ids = torch.arange(40).view(1, 40)
    model(ids, labels=ids).loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    decaying = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    assert not [name for name in decaying if "norm" in name]


def test_those_in_the_grid_are_there():
    grid = yaml.safe_load((EXAMPLES / "gpu_grid.yaml").read_text(encoding="utf-8"))
    named = {idea for _, changes in runs_of(grid) for idea in changes.get("ideas", [])}
    assert named == ideas.IDEAS.keys()
