"""The model against the plain-loop reference, both forms, every option, values and gradients."""

import itertools

import pytest
import reference
import torch
from finedeep import FinedeepConfig, FinedeepForCausalLM
from finedeep.modeling_finedeep import FinedeepSublayer

FORMS = {"per_expert": 10**9, "one_gemm": 0}  # the token count up to which experts are computed one by one
OPTIONS = list(
    itertools.product(
        ("expert_output", "hidden_state"), ("sigmoid", "softmax"), (False, True), (False, True)
    )  # routing input, routing function, sandwich norm, biases
)


def tiny_config(M=2, K=2, **changes):
    fields = {
        "vocab_size": 37,
        "hidden_size": 16,
        "intermediate_size": 3 * M * K,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 500.0,
        "num_expert_sublayers": M,
        "num_experts_per_sublayer": K,
    }
    return FinedeepConfig(**{**fields, **changes})


def randomised(config):
    """A float64 model with every parameter random, so that no zero router or unit norm hides a term."""
    torch.manual_seed(0)
    model = FinedeepForCausalLM(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture(params=FORMS, ids=str)
def form(request, monkeypatch):
    monkeypatch.setattr(FinedeepSublayer, "per_expert_max_tokens", FORMS[request.param])
    return request.param


@pytest.fixture(autouse=True)
def _float64_norms(monkeypatch):
    """Llama's RMSNorm and gates work in float32; here both sides must be exact to float64."""

    def forward(self, x):
        return reference.rms_norm(x, self.weight, self.variance_epsilon)

    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def assert_layer_matches(config):
    layer = randomised(config).model.layers[0].sublayers
    h = torch.randn(5, config.hidden_size, dtype=torch.float64, requires_grad=True)
    expected = reference.ffn(h, dict(layer.named_parameters()), config)
    found = h
    for sublayer in layer:
        found = found + sublayer(found)[0]
    inputs = [h, *layer.parameters()]
    direction = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, inputs, direction, allow_unused=True)
    found_gradients = torch.autograd.grad(found, inputs, direction, allow_unused=True)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for e, f in zip(expected_gradients, found_gradients, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("routing_input", "routing_function", "sandwich", "biases"), OPTIONS)
def test_every_option_equals_the_equations(form, routing_input, routing_function, sandwich, biases):
    assert_layer_matches(
        tiny_config(
            routing_input=routing_input,
            routing_function=routing_function,
            sublayer_output_norm=sandwich,
            mlp_bias=biases,
            routed_scaling_factor=1.7,
        )
    )


@pytest.mark.parametrize("M", range(1, 9))
@pytest.mark.parametrize("K", range(1, 9))
def test_every_m_and_k_equals_the_equations(form, M, K):
    assert_layer_matches(tiny_config(M, K))


@pytest.mark.parametrize("biases", [False, True])
def test_whole_model_equals_the_equations(form, biases):
    config = tiny_config(attention_bias=biases, mlp_bias=biases)
    model = randomised(config).eval()
    ids = [3, 1, 4, 1, 5, 9, 2]
    # rotary tables are made in float32 by Llama, which bounds this comparison
    found = model(torch.tensor([ids])).logits[0]
    expected = reference.logits(ids, model.state_dict(), config, theta=500.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_zero_router_gives_every_expert_the_weight_one():
    for routing_function, K in itertools.product(("sigmoid", "softmax"), (1, 3, 8)):
        config = tiny_config(K=K, routing_function=routing_function)
        sublayer = FinedeepForCausalLM(config).model.layers[0].sublayers[0]
        gates = sublayer.gate(torch.zeros(2, 5, K))
        torch.testing.assert_close(gates, torch.ones(2, 5, K))


def test_forms_agree_in_low_precision():
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
        config = tiny_config(K=4, hidden_size=64, intermediate_size=256)
        sublayer = FinedeepForCausalLM(config).model.layers[0].sublayers[0].to(dtype)
        torch.nn.init.normal_(sublayer.router, std=0.1)
        a, n = torch.randn(40, 4, 32, dtype=dtype), torch.randn(40, 64, dtype=dtype)
        for one, other in zip(sublayer.per_expert(a), sublayer.one_gemm(a, n), strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_same_parameters_as_the_dense_model_but_for_norms_and_routers():
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 96, "num_hidden_layers": 3}
    shape["num_attention_heads"] = 4
    M, K, d, layers = 3, 4, 16, 3
    dense = LlamaForCausalLM(LlamaConfig(**shape))
    finedeep = FinedeepForCausalLM(FinedeepConfig(**shape, num_expert_sublayers=M, num_experts_per_sublayer=K))
    extra = finedeep.num_parameters() - dense.num_parameters()
    assert extra == layers * ((M - 1) * d + M * K * d)


def test_fresh_weights_follow_the_initializer_range():
    torch.manual_seed(0)
    config = tiny_config(hidden_size=64, intermediate_size=1024, sublayer_output_norm=True, mlp_bias=True)
    model = FinedeepForCausalLM(config)
    for sublayer in model.model.layers[0].sublayers:
        assert abs(sublayer.down_proj.weight.std().item() - config.initializer_range) < 0.001
        assert sublayer.router.eq(0).all()
        assert sublayer.expert_bias.eq(0).all()
        assert sublayer.norm.weight.eq(1).all()
        torch.testing.assert_close(sublayer.output_norm.weight, torch.full((64,), 0.1))
