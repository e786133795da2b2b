"""Scores are read from the down projection's own function, whatever has been put in its place.

Each case puts something in the place of the `nn.Linear`, works out the matrix that it stands for by calling it on the
identity, and compares the sub-layer with the plain loops of `reference.py` on that matrix, forward and router gradient.
"""

import functools

import pytest
import reference
import torch
from finedeep import FinedeepConfig, FinedeepForCausalLM
from torch import nn

HIDDEN, K, E = 32, 4, 6


def sublayer():
    torch.manual_seed(0)
    config = FinedeepConfig(
        vocab_size=16,
        hidden_size=HIDDEN,
        intermediate_size=2 * K * E,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_experts_per_sublayer=K,
    )
    model = FinedeepForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return config, model.model.layers[0].sublayers[0]


def lora(linear, **options):
    peft = pytest.importorskip("peft")
    wrapper = nn.ModuleDict({"down_proj": linear})
    config = peft.LoraConfig(r=2, target_modules=["down_proj"], **options)
    peft.inject_adapter_in_model(config, wrapper)
    for name, parameter in wrapper.named_parameters():
        if "lora_B" in name or "lora_magnitude" in name:
            nn.init.normal_(parameter, std=0.3)
    return wrapper["down_proj"]


def bitsandbytes(linear, kind):
    bnb = pytest.importorskip("bitsandbytes")
    if kind == "int8":
        new = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
    else:
        new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32)
    new.load_state_dict({"weight": linear.weight.data})
    return new.to("cpu")


def torchao(linear):
    quantization = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(linear)
    quantization.quantize_(holder, quantization.Int8WeightOnlyConfig())
    return holder[0]


def dynamic_int8(linear):
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)[0]


def offloaded(linear, **options):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(linear, execution_device="cpu", **options)


def pruned(linear):
    from torch.nn.utils import prune

    prune.random_unstructured(linear, "weight", amount=0.3)
    linear.weight_orig.data *= 2  # as an optimiser does: `weight` is stale until the pre-hook runs
    return linear


def parametrized(linear):
    nn.utils.parametrize.register_parametrization(linear, "weight", nn.Tanh())
    return linear


def replaced_forward(linear):
    forward = linear.forward
    linear.forward = lambda x: 2 * forward(x)
    return linear


STAND_INS = {
    "nothing": lambda linear: linear,
    "LoRA": lora,
    "DoRA": functools.partial(lora, use_dora=True),
    "bitsandbytes int8": functools.partial(bitsandbytes, kind="int8"),
    "bitsandbytes nf4": functools.partial(bitsandbytes, kind="nf4"),
    "LoRA on bitsandbytes nf4": lambda linear: lora(bitsandbytes(linear, "nf4")),
    "torchao int8": torchao,
    "torch dynamic int8": dynamic_int8,
    "offload": offloaded,
    "pruning": pruned,
    "parametrization": parametrized,
    "replaced forward": replaced_forward,
}
# LLM.int8 and dynamic int8 also round what goes in, so that no matrix gives exactly what they give
ROUNDS_INPUT = {"bitsandbytes int8": 0.05, "torch dynamic int8": 0.05}


@pytest.mark.parametrize("tokens", [3, 5 * E, 60], ids=lambda tokens: f"{tokens} tokens")
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.filterwarnings("ignore")
def test_scores_follow_what_stands_in(name, grad, tokens):
    config, layer = sublayer()
    layer.down_proj = STAND_INS[name](layer.down_proj)
    with torch.no_grad():
        W = layer.down_proj(torch.eye(K * E)).T
    parameters = {name: p.detach() for name, p in layer.named_parameters() if "down_proj" not in name}
    router = parameters["router"].clone().requires_grad_()
    h = torch.randn(tokens, HIDDEN)
    expected = reference.sublayer(h, {**parameters, "router": router, "down_proj.weight": W}, config)
    with torch.set_grad_enabled(grad):
        found, g = layer(h[None])
    tolerance = ROUNDS_INPUT.get(name, 1e-4) * expected.abs().max().item()
    assert g.shape == (1, tokens, K)
    assert (found[0] - expected).abs().max() < tolerance
    if grad and name != "torch dynamic int8":  # which has no gradient
        direction = torch.randn(tokens, HIDDEN)
        (wanted,) = torch.autograd.grad(expected, router, direction)
        (gradient,) = torch.autograd.grad(found[0], layer.router, direction)
        assert (gradient - wanted).abs().max() < ROUNDS_INPUT.get(name, 1e-4) * wanted.abs().max()


@pytest.mark.parametrize("tokens", [3, 60])
def test_an_observer_sees_each_activation_once_and_the_output_that_is_used(tokens):
    """A forward hook (calibration, steering) on `down_proj` meets gated activations, and what it returns is used."""
    _, layer = sublayer()
    seen = []

    def steer(module, inputs, output):
        seen.append(inputs[0].shape)
        return output + 1

    h = torch.randn(1, tokens, HIDDEN)
    with torch.no_grad():
        before = layer(h)[0]
        layer.down_proj.register_forward_hook(steer)
        after = layer(h)[0]
    assert seen == [(1, tokens, K * E)]
    torch.testing.assert_close(after, before + 1, rtol=1e-4, atol=1e-4)


def test_lora_compiles_as_one_graph():
    _, layer = sublayer()
    layer.down_proj = lora(layer.down_proj)
    h = torch.randn(1, 60, HIDDEN)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected, found = layer(h)[0], compiled(h)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for one, other in zip(*(torch.autograd.grad(y.sum(), layer.router) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
