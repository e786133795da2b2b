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


def float8(linear):
    training = pytest.importorskip("torchao.float8")
    holder = nn.Sequential(linear)
    training.convert_to_float8_training(holder, config=training.Float8LinearConfig(emulate=True))
    assert type(holder[0]) is not nn.Linear
    return holder[0]


def int8_activations(linear):
    quantization = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(linear)
    quantization.quantize_(holder, quantization.Int8DynamicActivationInt8WeightConfig())
    return holder[0]


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
    "LoRA with a bias": functools.partial(lora, lora_bias=True),
    "float8 training": float8,
    "torchao int8 activations": int8_activations,
}
# These also round what goes in, so that no matrix gives exactly what they give.
ROUNDS_INPUT = {
    "bitsandbytes int8": 0.05,
    "torch dynamic int8": 0.05,
    "torchao int8 activations": 0.05,
    "float8 training": 0.15,
}
NO_GRADIENT = ("torch dynamic int8", "torchao int8 activations")


@pytest.mark.parametrize("tokens", [3, 5 * E, 60], ids=lambda tokens: f"{tokens} tokens")
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.filterwarnings("ignore")
def test_scores_follow_what_stands_in(name, grad, tokens):
    config, layer = sublayer()
    layer.down_proj = STAND_INS[name](layer.down_proj)
    with torch.no_grad():
        b = layer.down_proj(torch.zeros(1, K * E))[0]
        W = (layer.down_proj(torch.eye(K * E)) - b).T
    parameters = {name: p.detach() for name, p in layer.named_parameters() if "down_proj" not in name}
    router = parameters["router"].clone().requires_grad_()
    h = torch.randn(tokens, HIDDEN)
    expected = reference.sublayer(h, {**parameters, "router": router, "down_proj.weight": W}, config) + b
    with torch.set_grad_enabled(grad):
        found, g = layer(h[None])
    tolerance = ROUNDS_INPUT.get(name, 1e-4) * expected.abs().max().item()
    assert g.shape == (1, tokens, K)
    assert (found[0] - expected).abs().max() < tolerance
    if grad and name not in NO_GRADIENT:
        direction = torch.randn(tokens, HIDDEN)
        (wanted,) = torch.autograd.grad(expected, router, direction)
        (gradient,) = torch.autograd.grad(found[0], layer.router, direction)
        assert (gradient - wanted).abs().max() < ROUNDS_INPUT.get(name, 1e-4) * wanted.abs().max()


def steer(x):
    return x + torch.linspace(-1, 1, x.shape[-1])


def forward_hook(linear, see, change):
    def hook(module, inputs, output):
        see(inputs[0])
        return change(output)

    linear.register_forward_hook(hook)


def forward_pre_hook(linear, see, change):
    def hook(module, inputs):
        see(inputs[0])
        return (change(inputs[0]),)

    linear.register_forward_pre_hook(hook)


def forward_of_the_instance(linear, see, change):
    def forward(x, old=linear.forward):
        see(x)
        return change(old(x))

    linear.forward = forward


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("tokens", [1, 3, 60])
@pytest.mark.parametrize("watch", [forward_hook, forward_pre_hook, forward_of_the_instance])
def test_who_watches_sees_each_tokens_weighted_activations_once(watch, tokens, grad):
    """As on a Llama. What is changed is changed for the sum over experts; scores are read from the weight."""
    config, layer = sublayer()
    h, seen, W = torch.randn(1, tokens, HIDDEN), [], layer.down_proj.weight.detach()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    expected = reference.sublayer(h[0], parameters, config)
    watch(layer.down_proj, seen.append, steer)
    with torch.set_grad_enabled(grad):
        found = layer(h)[0][0]
    assert [x.shape for x in seen] == [(1, tokens, K * E)]
    torch.testing.assert_close(seen[0][0] @ W.T, expected, rtol=1e-4, atol=1e-5)
    steered = steer(seen[0][0]) @ W.T if watch is forward_pre_hook else steer(expected)
    torch.testing.assert_close(found, steered, rtol=1e-4, atol=1e-4)


def test_a_hook_that_only_moves_tensors_leaves_the_weight_readable():
    """`device_map` over several devices hooks every leaf, those that stay where they are too."""
    accelerate = pytest.importorskip("accelerate")
    _, layer = sublayer()
    h = torch.randn(1, 3, HIDDEN)
    expected = layer(h)
    accelerate.hooks.add_hook_to_module(layer.down_proj, accelerate.hooks.AlignDevicesHook("cpu", offload=False))
    calls = []
    old = layer.down_proj.forward
    layer.down_proj.forward = lambda x: calls.append(x.shape) or old(x)
    for tokens in (3, 60):
        layer(torch.randn(1, tokens, HIDDEN))
    assert all(shape[1] in (3, 60) for shape in calls)  # tokens, and no other rows
    torch.testing.assert_close(layer(h), expected)


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
