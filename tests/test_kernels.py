"""Kernels against the plain forms in float64 and float32: Triton's, in its interpreter without a GPU, and the CPU's."""

import importlib.util
import itertools
from functools import partial

import pytest
import torch
from conftest import random_model
from finedeep import kernels_finedeep as kernels
from finedeep import operators_finedeep as operators
from torch import nn

TRITON = importlib.util.find_spec("triton") is not None
BY_TRITON = pytest.param("triton", marks=pytest.mark.skipif(not TRITON, reason="Triton is not installed here"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Widths that fill a block and that do not; one expert; more tokens than a program takes at once
SIZES = [(1, 1, 8), (5, 3, 6), (37, 4, 43), (300, 2, 64)]  # tokens, K, e
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True, params=[BY_TRITON, "cpu"])
def kind(request, monkeypatch):
    if request.param == "cpu" and DEVICE == "cuda":
        pytest.skip("of a machine without a GPU")
    if request.param == "triton":
        monkeypatch.setattr(operators, "FORCED", "triton")
    return request.param


def watch(monkeypatch, kind, do):
    """Have the kernels of a kind call `do(name, original, *inputs)` instead."""
    table = getattr(operators, kind.upper())
    functions = {name: partial(do, name, getattr(table, name)) for name in table._fields if name != "runs_on"}
    monkeypatch.setattr(operators, kind.upper(), table._replace(**functions))


def plainly(monkeypatch, function, *inputs):
    with monkeypatch.context() as patch:
        patch.setattr(operators, "FORCED", "plain")
        return function(*inputs)


def random(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape) * scale).to(DEVICE, dtype).requires_grad_()


def assert_near(found, expected, tolerance):
    found, expected = found.double(), expected.double()
    assert found.isfinite().all()
    assert (found - expected).norm() <= tolerance * expected.norm() + 1e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_weighted_activations_and_their_gradients(size, dtype, monkeypatch):
    tokens, K, e = size
    torch.manual_seed(0)
    inputs = [random(1, tokens, K * e, dtype=dtype), random(1, tokens, K * e, dtype=dtype), random(K, e, dtype=dtype)]
    directions = random(1, tokens, K * e, dtype=dtype).detach(), random(1, tokens, K).detach()

    def run(G, U, v):
        return operators.weighted_activations(G, U, v, None, nn.SiLU(), torch.sigmoid, 2.0)

    found = run(*inputs)
    gradients = torch.autograd.grad(found, inputs, directions)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = plainly(monkeypatch, run, *exact)
    wanted = torch.autograd.grad(expected, exact, [x.double() for x in directions])
    for one, other in itertools.chain(zip(found, expected, strict=True), zip(gradients, wanted, strict=True)):
        assert_near(one, other, DTYPES[dtype])
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32


@pytest.mark.parametrize("score", [-20.0, -60.0, 60.0])
def test_gradients_of_nearly_closed_gates(score, monkeypatch):
    """Of activations in half precision, where a gate that was rounded would have lost its own gradient."""
    torch.manual_seed(0)
    G, U = (random(1, 50, 24, dtype=torch.float16) for _ in range(2))
    a = nn.functional.silu(G).mul(U).detach().float().view(-1, 3, 8)
    v = (score * a[:1] / a[:1].square().sum(-1, keepdim=True))[0].requires_grad_()  # the first token's scores
    inputs = [G[:, :1], U[:, :1], v]

    def run(G, U, v):
        return operators.weighted_activations(G, U, v, None, nn.SiLU(), torch.sigmoid, 2.0)

    def gradients(inputs):
        y, g = run(*inputs)
        return torch.autograd.grad(y.double().sum() + g.double().sum(), inputs[2])[0]

    found = gradients(inputs)
    expected = plainly(monkeypatch, gradients, [x.detach().double().requires_grad_() for x in inputs])
    assert (found.double() - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "d"), [(1, 8), (7, 40), (300, 64)])
def test_norms_and_their_gradients(rows, d, dtype, monkeypatch):
    torch.manual_seed(0)
    x, w = random(1, rows, d, dtype=dtype, scale=3.0), random(d, dtype=dtype)
    dn = random(1, rows, d, dtype=dtype).detach()
    found = operators.rms_norm(x, w, 1e-5)
    gradients = torch.autograd.grad(found, (x, w), dn)
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    expected = plainly(monkeypatch, operators.rms_norm, *exact, 1e-5)
    wanted = torch.autograd.grad(expected, exact, dn.double())
    for one, other in zip((found, *gradients), (expected, *wanted), strict=True):
        assert_near(one, other, DTYPES[dtype])


@pytest.mark.parametrize("kind", [BY_TRITON], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "K", "d"), [(1, 8, 64), (5, 3, 40)])
def test_expert_outputs_are_combined(tokens, K, d, dtype):
    torch.manual_seed(0)
    E, w = random(K, tokens, d, dtype=dtype).detach(), random(K, d, dtype=dtype, scale=0.2).detach()
    found, g = kernels.combine(E.transpose(0, 1), w, 2.0)
    exact = 2 * torch.sigmoid((E.double() * w.double().unsqueeze(1)).sum(-1))  # (K, tokens)
    assert_near(g, exact.T, 1e-5)
    assert_near(found, (exact.unsqueeze(-1) * E.double()).sum(0), DTYPES[dtype])


def test_a_gate_of_one_gives_the_dense_models_numbers_to_the_bit(kind):
    """So that a freshly converted model with M = 1 computes what the dense one computes, in bfloat16 too."""
    torch.manual_seed(0)
    # Triton's interpreter does not round to the nearest bfloat16 but towards zero.
    by_triton = DTYPES if DEVICE == "cuda" else (torch.float32, torch.float16)
    for dtype in by_triton if kind == "triton" else (torch.float32,):
        G, U = random(1, 50, 64, dtype=dtype).detach(), random(1, 50, 64, dtype=dtype).detach()
        y, g = getattr(operators, kind.upper()).weigh(G, U, torch.zeros(4, 16, dtype=dtype, device=DEVICE), 2.0)
        assert g.eq(1).all()
        dense = nn.functional.silu(G) * U
        assert (y != dense).float().mean() < (1e-3 if dtype != torch.float32 else 0.3)
        torch.testing.assert_close(y, dense, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_a_model_trains_by_the_kernels_as_it_does_without(kind, monkeypatch):
    """Losses and all gradients, of a derivative's derivative too; the kernels are seen to run."""
    model = random_model().to(DEVICE).train()
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    calls = []
    watch(monkeypatch, kind, lambda name, original, *inputs: calls.append(name) or original(*inputs))

    def gradients():
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    found = gradients()
    layers, M = model.config.num_hidden_layers, model.config.num_expert_sublayers
    assert calls.count("weigh") == calls.count("weigh_backward") == layers * M
    assert calls.count("norm") == calls.count("norm_backward") == layers * (1 + M) + 1
    for one, other in zip(found, plainly(monkeypatch, gradients), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4 * other.abs().max().item())


@pytest.mark.parametrize("kind", [BY_TRITON], indirect=True)
def test_few_tokens_go_through_one_kernel(kind, monkeypatch):
    model, ids, calls = random_model().to(DEVICE), torch.arange(3)[None].to(DEVICE), []
    original = kernels.combine
    monkeypatch.setattr(operators, "combine", lambda *a: calls.append(1) or original(*a))
    with torch.no_grad():
        run = partial(model, ids, use_cache=False)
        found, expected = run().logits, plainly(monkeypatch, run).logits
    assert len(calls) == model.config.num_hidden_layers * model.config.num_expert_sublayers
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_derivatives_of_derivatives_go_through_the_plain_form(monkeypatch):
    torch.manual_seed(0)
    inputs = [random(1, 40, 12), random(1, 40, 12), random(3, 4)]

    def twice(*inputs):
        y, g = operators.weighted_activations(*inputs, None, nn.SiLU(), torch.sigmoid, 2.0)
        first = torch.autograd.grad(y.square().sum() + g.sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), inputs)

    for one, other in zip(twice(*inputs), plainly(monkeypatch, twice, *inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", ["softmax", "no SiLU", "wide", "plain by switch", "functional transform"])
def test_what_no_kernel_can_take_goes_the_plain_way(case, kind, monkeypatch):
    watch(monkeypatch, kind, lambda *_: pytest.fail("the kernel was called"))
    G, U, v = random(1, 4, 12).detach(), random(1, 4, 12).detach(), random(3, 4).detach()
    gates, act = torch.sigmoid, nn.SiLU()
    if case == "softmax":
        gates = lambda s: s.softmax(-1)  # noqa: E731
    elif case == "no SiLU":
        act = nn.GELU()
    elif case == "wide":
        monkeypatch.setattr(operators, "MAX_WIDTH", 3)
    elif case == "plain by switch":
        monkeypatch.setattr(operators, "FORCED", "plain")
    run = lambda G: operators.weighted_activations(G, U, v, None, act, gates, 2.0)[0]  # noqa: E731
    if case == "functional transform":
        run = torch.func.vmap(run)
    assert run(G).isfinite().all()
