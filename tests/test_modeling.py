"""The model against the plain-loop reference, both forms, every option, values and gradients."""

import itertools

import pytest
import reference
import torch
from finedeep import FinedeepConfig, FinedeepForCausalLM
from finedeep import operators_finedeep as operators
from finedeep.configuration_finedeep import ROUTING_FUNCTIONS
from finedeep.modeling_finedeep import FinedeepRMSNorm, FinedeepSublayer

FORMS = {"definition": 10**9, "one product": 0}  # the token count up to which experts are computed one by one
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
    monkeypatch.setattr(FinedeepSublayer, "definition_max_tokens", FORMS[request.param])
    return request.param


@pytest.fixture(autouse=True)
def _float64_norms(monkeypatch):
    """Llama's RMSNorm and gates work in float32; here both sides must be exact to float64."""

    def forward(self, hidden_states):
        return reference.rms_norm(hidden_states, self.weight, self.variance_epsilon)

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
        gates, c = sublayer.routing
        torch.testing.assert_close(c * gates(torch.zeros(2, 5, K)), torch.ones(2, 5, K))


def test_forms_agree_in_low_precision():
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
        config = tiny_config(K=4, hidden_size=64, intermediate_size=256)
        sublayer = FinedeepForCausalLM(config).model.layers[0].sublayers[0].to(dtype)
        torch.nn.init.normal_(sublayer.router, std=0.1)
        G, U, n = (torch.randn(1, 40, width, dtype=dtype) for width in (128, 128, 64))
        for one, other in zip(sublayer.definition(G, U, n), sublayer.one_product(G, U, n), strict=True):
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
    model = FinedeepForCausalLM(tiny_config(hidden_size=64, router_initializer_range=0.5))
    for sublayer in model.model.layers[0].sublayers:
        assert abs(sublayer.router.std().item() - 0.5) < 0.1


# What keeps its inputs alone and computes the rest again in backward, against finite differences and autograd's own.

WEIGHTINGS = {
    "sigmoid": ("sigmoid", True, None),
    "softmax": ("softmax", True, None),
    "sigmoid with biases": ("sigmoid", True, (3,)),
    "sigmoid of the hidden state": ("sigmoid", False, (2, 4, 3)),
    "softmax of the hidden state": ("softmax", False, (2, 4, 3)),
}


def weighting_inputs(case):
    function, has_v, s_shape = WEIGHTINGS[case]
    torch.manual_seed(0)
    G, U = (torch.randn(2, 4, 15, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.randn(3, 5, dtype=torch.float64, requires_grad=True) if has_v else None
    s = None if s_shape is None else torch.randn(s_shape, dtype=torch.float64, requires_grad=True)
    routing = ROUTING_FUNCTIONS[function]
    return [G, U, v, s], (torch.nn.SiLU(), routing.gates, routing.neutral_scale(3))


@pytest.mark.parametrize("case", WEIGHTINGS)
def test_gradients_of_the_weighting_are_right_twice(case):
    inputs, options = weighting_inputs(case)
    run = lambda G, U, v, s: operators.weighted_activations(G, U, v, s, *options)  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("score", [-20.0, -60.0, -1000.0, 1000.0])
def test_gradients_of_nearly_closed_gates_in_half_precision(score):
    """What float16 makes of dL/dv and dL/ds where gates are nearly 0 or c, against float64 on the same numbers."""
    torch.manual_seed(0)
    G, U, dy = (torch.randn(1, 50, 12, dtype=torch.float16) for _ in range(3))
    v, s = torch.randn(3, 4) / 8, torch.full((3,), score)
    routing, found = ROUTING_FUNCTIONS["sigmoid"], {}
    for dtype in (torch.float16, torch.float64):
        exact = torch.promote_types(dtype, torch.float32)
        given = [G.to(dtype).requires_grad_(), U.to(dtype).requires_grad_()]
        given += [v.to(exact).requires_grad_(), s.to(exact).requires_grad_()]
        y, g = operators.weighted_activations(*given, torch.nn.SiLU(), routing.gates, 2.0)
        total = (y * dy.to(dtype)).double().sum() + g.double().sum()
        found[dtype] = [x.double() for x in torch.autograd.grad(total, given)[2:]]
    for one, other in zip(found[torch.float16], found[torch.float64], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-2 * other.abs().max().item())


def test_gradients_of_the_norm_are_right_twice():
    torch.manual_seed(0)
    norm = FinedeepRMSNorm(6).double()
    x, w = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True), torch.randn(6, dtype=torch.float64)
    run = lambda x, w: torch.func.functional_call(norm, {"weight": w}, (x,))  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, w.requires_grad_()))
    assert torch.autograd.gradgradcheck(run, (x, w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_norm_in_training_is_llamas_to_the_bit(dtype, monkeypatch):
    monkeypatch.undo()  # Llama's own forward again
    torch.manual_seed(0)
    norm = FinedeepRMSNorm(64).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 40, 64).to(dtype)
    found = norm(x.requires_grad_())
    with torch.no_grad():
        assert torch.equal(found, norm(x))


def test_gradients_of_each_example_by_vmap():
    """torch.func reaches what is written out as it reaches Llama: per-example gradients equal one backward for each."""
    torch.manual_seed(0)
    sublayer = FinedeepForCausalLM(tiny_config(K=4)).model.layers[0].sublayers[0]
    torch.nn.init.normal_(sublayer.router)
    parameters = dict(sublayer.named_parameters())
    h = torch.randn(3, 40, 16)

    def loss(parameters, h):
        return torch.func.functional_call(sublayer, parameters, (h.unsqueeze(0),))[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, h)
    for i in range(3):
        expected = torch.autograd.grad(loss(parameters, h[i]), list(parameters.values()))
        for name, one in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[name][i], one, rtol=1e-4, atol=1e-5)


def test_transforms_of_weights_alone():
    """The stream is a plain tensor then: derivatives of every kind by one weight, and ensembles."""
    torch.manual_seed(0)
    sublayer = FinedeepForCausalLM(tiny_config(K=4)).double().model.layers[0].sublayers[0]
    h, weights = torch.randn(1, 40, 16, dtype=torch.float64), dict(sublayer.named_parameters())
    for name in ("router", "down_proj.weight"):
        weight = torch.randn_like(weights[name], requires_grad=True)

        def loss(weight, name=name):
            return torch.func.functional_call(sublayer, weights | {name: weight}, (h,))[0].square().sum()

        expected = torch.autograd.grad(loss(weight), weight)[0]
        torch.testing.assert_close(torch.func.grad(loss)(weight), expected)
        direction = torch.randn_like(weight)
        found = torch.func.jvp(loss, (weight,), (direction,))[1]
        torch.testing.assert_close(found, (expected * direction).sum())
        product = torch.func.jvp(torch.func.grad(loss), (weight,), (direction,))[1]
        torch.testing.assert_close(product, torch.autograd.functional.vhp(loss, weight, direction)[1])
        ensemble = torch.stack([weight, direction])
        torch.testing.assert_close(torch.vmap(loss)(ensemble), torch.stack([loss(weight), loss(direction)]))


def test_gates_without_a_gradient():
    """Scores of the input with a frozen router, where nothing before it is trained: LoRA on gate_proj is so."""
    torch.manual_seed(0)
    model = FinedeepForCausalLM(tiny_config(K=4, routing_input="hidden_state", num_hidden_layers=1))
    sublayer = model.model.layers[0].sublayers[0]
    torch.nn.init.normal_(sublayer.router)
    h = torch.randn(2, 40, 16)
    gradients = []
    for frozen in (False, True):
        sublayer.requires_grad_(not frozen)
        sublayer.gate_proj.requires_grad_(True)
        gradients += torch.autograd.grad(sublayer(h)[0].square().sum(), sublayer.gate_proj.weight)
    torch.testing.assert_close(*gradients)


def test_backward_keeps_no_more_than_the_dense_ffn():
    """With M = 1, of width I: what autograd holds between forward and backward, counted by its own hooks."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    tokens, d, width = 100, 32, 96
    sublayer = FinedeepSublayer(tiny_config(M=1, K=4, hidden_size=d, intermediate_size=width))
    norm, mlp = LlamaRMSNorm(d), LlamaMLP(LlamaConfig(hidden_size=d, intermediate_size=width))
    h = torch.randn(1, tokens, d, requires_grad=True)

    def kept(run):
        storages = {}

        def pack(x):
            storages[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = run()  # noqa: F841  (alive until all is counted)
        return sum(x.untyped_storage().nbytes() for x in storages.values() if tokens in x.shape)

    gates = tokens * sublayer.num_experts * h.element_size()
    assert kept(lambda: sublayer(h)) <= kept(lambda: mlp(norm(h))) + gates


def test_deterministic_mode():
    torch.manual_seed(0)
    model = FinedeepForCausalLM(tiny_config(K=4))
    ids = torch.randint(0, 37, (2, 40))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        runs = [torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters())) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(before)
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_forward_mode_derivatives():
    """A directional derivative by dual numbers equals the one by backward."""
    torch.manual_seed(0)
    sublayer = FinedeepForCausalLM(tiny_config(K=4)).double().model.layers[0].sublayers[0]
    torch.nn.init.normal_(sublayer.router)
    h, direction = torch.randn(2, 40, 16, dtype=torch.float64), torch.randn(2, 40, 16, dtype=torch.float64)
    _, found = torch.func.jvp(lambda h: sublayer(h)[0].sum(), (h,), (direction,))
    gradient = torch.autograd.grad(sublayer(h.requires_grad_())[0].sum(), h)[0]
    torch.testing.assert_close(found, (gradient * direction).sum())


def test_backward_under_autocast_is_as_exact_as_outside():
    """Called inside autocast, which users should not but do, backward rounds nothing that it would not outside."""
    torch.manual_seed(0)
    sublayer = FinedeepForCausalLM(tiny_config(K=4)).model.layers[0].sublayers[0]
    torch.nn.init.normal_(sublayer.router)
    h = torch.randn(2, 40, 16)
    gradients = []
    for inside in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = sublayer(h)[0].float().square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            gradients.append(torch.autograd.grad(out, [sublayer.norm.weight, sublayer.router]))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * one.abs().max().item())


def test_no_tokens():
    sublayer = FinedeepForCausalLM(tiny_config(K=4)).model.layers[0].sublayers[0]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert sublayer(torch.zeros(1, 0, 16))[0].shape == (1, 0, 16)


def test_tracing_leaves_plain_operators(monkeypatch):
    monkeypatch.undo()  # Llama's own norm again
    torch.manual_seed(0)
    sublayer = FinedeepForCausalLM(tiny_config(K=4)).model.layers[0].sublayers[0]
    h = torch.randn(1, 40, 16)
    traced = torch.jit.trace(sublayer, h)
    assert "PythonOp" not in str(traced.graph)
    torch.testing.assert_close(traced(h), sublayer(h))
    with torch.no_grad():  # few tokens, without gradients, have a kernel on a GPU
        few = torch.jit.trace(sublayer, h[:, :3])
        torch.testing.assert_close(few(h[:, 5:7]), sublayer(h[:, 5:7]))
    graph = torch.fx.symbolic_trace(FinedeepRMSNorm(16)).graph  # as vLLM looks for what a norm is
    assert any(node.target is torch.rsqrt for node in graph.nodes)
