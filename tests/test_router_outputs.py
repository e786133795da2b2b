"""`output_router_logits`: the gates of every layer, and nothing done for them when they are not asked for."""

import pytest
import reference
import torch
from conftest import TINY, random_model
from finedeep import FinedeepForCausalLM, FinedeepModel
from finedeep.operators_finedeep import FinedeepStackGates

M, K = 2, 4
LENGTHS = (4, 50)  # the per-expert form and the one-GEMM form


@pytest.fixture
def ids():
    return torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(0))


def gates_by_hand(h, sublayer, config):
    """From the definition, on this sub-layer's input h (tokens, hidden): a finite difference in each expert's output.

    The sum is linear in the gates, so that the gate of expert k is what the output loses when E_k is taken out.
    """
    p = dict(sublayer.named_parameters())
    whole = reference.sublayer(h, p, config)
    gates = []
    for k in range(K):
        e = p["down_proj.weight"].shape[1] // K
        others = p["down_proj.weight"].clone()
        others[:, k * e : (k + 1) * e] = 0
        lost = whole - reference.sublayer(h, {**p, "down_proj.weight": others}, config)
        a = torch.nn.functional.silu(h_norm(h, p, config) @ p["gate_proj.weight"].T) * (
            h_norm(h, p, config) @ p["up_proj.weight"].T
        )
        E = a[:, k * e : (k + 1) * e] @ p["down_proj.weight"][:, k * e : (k + 1) * e].T
        gates.append((lost * E).sum(-1) / (E * E).sum(-1))
    return torch.stack(gates, -1)


def h_norm(h, p, config):
    return reference.rms_norm(h, p["norm.weight"], config.rms_norm_eps)


@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_they_are_the_gates_of_every_layer(ids, length):
    model = random_model()
    seen = []
    for layer in model.model.layers:
        for sublayer in layer.sublayers:
            sublayer.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs[0])))
    out = model(ids[:, :length], output_router_logits=True)
    assert len(out.router_logits) == TINY["num_hidden_layers"]
    for gates in out.router_logits:
        assert gates.shape == (2, length, M, K)
        assert gates.dtype == torch.float32
    flat = [gates[0, :, m] for gates in out.router_logits for m in range(M)]
    for found, (sublayer, h) in zip(flat, seen, strict=True):
        torch.testing.assert_close(found, gates_by_hand(h[0], sublayer, model.config), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cls", [FinedeepForCausalLM, FinedeepModel])
def test_asked_for_by_argument_or_config(ids, cls):
    model = random_model(cls)
    assert model(ids).get("router_logits") is None
    asked = model(ids, output_router_logits=True).router_logits
    assert model(ids, output_router_logits=True, return_dict=False)[-1][0].shape == (2, 50, M, K)
    by_config = random_model(cls, output_router_logits=True)
    assert by_config(ids, output_router_logits=False).get("router_logits") is None
    for one, other in zip(by_config(ids).router_logits, asked, strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_is_stacked_when_they_are_not_asked_for(ids, monkeypatch):
    def stack(self, gates):
        raise AssertionError("gates were stacked for nobody")

    monkeypatch.setattr(FinedeepStackGates, "forward", stack)
    model = random_model()
    model(ids, labels=ids).loss.backward()
    model.generate(ids[:1, :5], max_new_tokens=3)
    with pytest.raises(AssertionError, match="for nobody"):
        model(ids, output_router_logits=True)


def test_they_have_gradients_and_leave_the_loss_alone(ids):
    model = random_model()
    plain = model(ids, labels=ids).loss
    out = model(ids, labels=ids, output_router_logits=True)
    assert torch.equal(out.loss, plain)
    assert out.aux_loss is None
    sum(gates.sum() for gates in out.router_logits).backward()
    for layer in model.model.layers:
        assert all(sublayer.router.grad.abs().max() > 0 for sublayer in layer.sublayers)


def test_they_come_out_of_generate(ids):
    out = random_model().generate(
        ids[:1, :5], max_new_tokens=3, output_router_logits=True, return_dict_in_generate=True, eos_token_id=None
    )
    assert out.sequences.shape == (1, 8)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_does_not_repeat_them(ids, reentrant):
    model = random_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    out = model(ids, labels=ids, output_router_logits=True, use_cache=False)
    out.loss.backward()
    assert len(out.router_logits) == TINY["num_hidden_layers"]


@pytest.mark.parametrize("cls", ["FinedeepModel", "FinedeepForCausalLM", "FinedeepForTokenClassification"])
def test_the_config_is_read_at_the_call(cls):
    """`config.output_router_logits = True` on a model that is built already, in every head that returns them."""
    import finedeep

    model = random_model(getattr(finedeep, cls))
    ids = torch.arange(6)[None]
    assert not model(ids).get("router_logits")
    model.config.output_router_logits = True
    if cls != "FinedeepForTokenClassification":  # whose output has no field for them
        assert len(model(ids).router_logits) == model.config.num_hidden_layers
    else:
        assert model(ids).logits.shape[:2] == (1, 6)
