"""The vLLM plug-in without vLLM: its arithmetic beside the model's, with vLLM's classes stood in for.

`make test-vllm` has the real ones.
"""

import importlib
import importlib.metadata
import subprocess
import sys
import types

import pytest
import torch
from conftest import random_model
from finedeep.modeling_finedeep import FinedeepSublayer
from torch import nn

VARIANTS = {
    "default": {},
    "softmax": {"routing_function": "softmax"},
    "hidden state": {"routing_input": "hidden_state"},
    "biases": {"mlp_bias": True},
    "biases, softmax": {"mlp_bias": True, "routing_function": "softmax"},
    "sandwich": {"sublayer_output_norm": True},
}


class World:
    """Which process this is, of how many, and what it gathers."""

    rank, size, gathered = 0, 1, None


class RowParallelLinear(nn.Module):
    def __init__(self, width, hidden, bias, reduce_results, return_bias, quant_config, prefix):
        super().__init__()
        assert not any([bias, reduce_results, return_bias])
        self.input_size = self.input_size_per_partition = width // World.size
        self.weight = nn.Parameter(torch.empty(hidden, self.input_size), requires_grad=False)

    def forward(self, x):
        return x @ self.weight.T


class RowParallelLinearWithLoRA(nn.Module):
    """vLLM's, for tokens whose adapters `adapter_of` (tokens) says, with -1 for none."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer, self.input_size, self.device = base_layer, base_layer.input_size, "cpu"
        self.punica_wrapper = self

    def create_lora_weights(self, max_loras, lora_config, model_config):
        rank, hidden = lora_config.max_lora_rank, self.base_layer.weight.shape[0]
        self.lora_a_stacked = (torch.zeros(max_loras, 1, rank, self.input_size),)
        self.lora_b_stacked = (torch.zeros(max_loras, 1, hidden, rank),)

    def reset_lora(self, index):
        self.lora_a_stacked[0][index], self.lora_b_stacked[0][index] = 0, 0

    def set_lora(self, index, lora_a, lora_b):
        self.reset_lora(index)
        self.lora_a_stacked[0][index, 0, : len(lora_a)] = lora_a
        self.lora_b_stacked[0][index, 0, :, : len(lora_a)] = lora_b

    def add_shrink(self, y, x, stacked, scale):
        for t, adapter in enumerate(self.adapter_of):
            if adapter >= 0:
                y[0, t] += scale * (stacked[0][adapter, 0] @ x[t])

    def forward(self, x):
        out = self.base_layer(x)
        for t, adapter in enumerate(self.adapter_of):
            if adapter >= 0:
                out[0, t] += self.lora_b_stacked[0][adapter, 0] @ (self.lora_a_stacked[0][adapter, 0] @ x[0, t])
        return out


def sharded_weight_loader(axis):
    def load(parameter, weight):
        size = parameter.shape[axis]
        parameter.data.copy_(weight.narrow(axis, World.rank * size, size))

    return load


NAMES = {
    "vllm.distributed": {
        "get_tensor_model_parallel_rank": lambda: World.rank,
        "get_tensor_model_parallel_world_size": lambda: World.size,
        "tensor_model_parallel_all_gather": lambda s: World.gathered,
        "tensor_model_parallel_all_reduce": lambda x: x,
    },
    "vllm.lora": {"utils": types.SimpleNamespace(_all_lora_classes=(RowParallelLinearWithLoRA,))},
    "vllm.lora.layers": {"RowParallelLinearWithLoRA": RowParallelLinearWithLoRA},
    "vllm.model_executor.layers.linear": {"RowParallelLinear": RowParallelLinear},
    "vllm.model_executor.model_loader.weight_utils": {"sharded_weight_loader": sharded_weight_loader},
    "vllm.model_executor.models.transformers": {"TransformersForCausalLM": nn.Module},
}


@pytest.fixture
def plugin(monkeypatch):
    for name, attributes in NAMES.items():
        module = types.ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(World, "size", 1)
    monkeypatch.setattr(World, "rank", 0)
    for name in ("finedeep_serving.vllm_sublayer", "finedeep_serving.vllm_model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("finedeep_serving.vllm_sublayer")
    for name in ("finedeep_serving.vllm_sublayer", "finedeep_serving.vllm_model"):
        sys.modules.pop(name, None)


def part_of(linear, dim):
    """What vLLM's merged projection holds of one of the two."""
    part = nn.Linear(1, 1, bias=linear.bias is not None)
    part.weight = nn.Parameter(linear.weight.chunk(World.size, dim)[World.rank])
    if linear.bias is not None:
        part.bias = nn.Parameter(linear.bias.chunk(World.size)[World.rank])
    return part


def served(plugin, theirs):
    """The plug-in's sub-layer, loaded from the model's."""
    sublayer = plugin.FinedeepSublayer(theirs, None, "")
    sublayer.gate_proj, sublayer.up_proj = part_of(theirs.gate_proj, 0), part_of(theirs.up_proj, 0)
    sublayer.down_proj.weight.data = theirs.down_proj.weight.data.chunk(World.size, 1)[World.rank]
    for name in ("router", "expert_bias"):
        if (parameter := getattr(sublayer, name)) is not None:
            parameter.weight_loader(parameter, getattr(theirs, name).data)
    sublayer.read_score_vectors()
    return sublayer


def sublayer_of(variant):
    return random_model(**VARIANTS[variant]).model.layers[0].sublayers[0]


def h_of(sublayer, tokens=7):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, tokens, sublayer.down_proj.weight.shape[0], generator=generator)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_plugin_computes_the_models_sublayer(plugin, variant):
    theirs = sublayer_of(variant)
    h = h_of(theirs)
    for found, expected in zip(served(plugin, theirs)(h), theirs(h), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "sandwich"])
@torch.no_grad()
def test_processes_outputs_add_up_to_the_models(plugin, monkeypatch, variant, processes):
    theirs = sublayer_of(variant)
    h = h_of(theirs)
    monkeypatch.setattr(World, "size", processes)
    parts = []
    for rank in range(processes):
        monkeypatch.setattr(World, "rank", rank)
        parts.append(served(plugin, theirs))
    n = theirs.norm(h)
    scores = [part.scores(part.act_fn(part.gate_proj(n)) * part.up_proj(n), n) for part in parts]
    monkeypatch.setattr(World, "gathered", torch.cat(scores, -1))
    combined, gates = zip(*(part(h) for part in parts), strict=True)
    expected, g = theirs(h)
    torch.testing.assert_close(sum(combined), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(gates, -1), g, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["default", "softmax", "biases"])
@torch.no_grad()
def test_each_token_has_its_adapters_scores(plugin, variant):
    """Two adapters and none in one batch, against the model with B A added to its weight."""
    theirs = sublayer_of(variant)
    h, sublayer = h_of(theirs), served(plugin, theirs)
    wrapped = plugin.DownProjLinearWithLoRA(sublayer.down_proj)
    wrapped.create_lora_weights(2, types.SimpleNamespace(max_lora_rank=4, lora_dtype=torch.float32))
    hidden, width = theirs.down_proj.weight.shape
    adapters = [(torch.randn(3, width) * 0.3, torch.randn(hidden, 3) * 0.3) for _ in range(2)]
    for index, adapter in enumerate(adapters):
        wrapped.set_lora(index, *adapter)
    wrapped.adapter_of = [0, 0, -1, 1, 1, -1, 0]
    sublayer.down_proj = wrapped
    found = sublayer(h)[0][0]
    weight = theirs.down_proj.weight.data.clone()
    for t, adapter in enumerate(wrapped.adapter_of):
        theirs.down_proj.weight.data = weight + (adapters[adapter][1] @ adapters[adapter][0] if adapter >= 0 else 0)
        torch.testing.assert_close(found[t], theirs(h)[0][0, t], rtol=1e-3, atol=1e-3)
    wrapped.reset_lora(0)
    assert not wrapped.score_rows[0].any()


def test_what_cannot_be_served_is_refused(plugin):
    refuse = importlib.import_module("finedeep_serving.vllm_model").refuse_what_cannot_be_served

    def options(processes, lora=None):
        model = types.SimpleNamespace(hf_config=random_model().config)
        parallel = types.SimpleNamespace(tensor_parallel_size=processes)
        return types.SimpleNamespace(model_config=model, parallel_config=parallel, lora_config=lora)

    refuse(options(2, types.SimpleNamespace(fully_sharded_loras=False)))
    with pytest.raises(ValueError, match="tensor_parallel_size=3 cannot share out the 4 experts"):
        refuse(options(3))
    with pytest.raises(ValueError, match="fully_sharded_loras=True"):
        refuse(options(1, types.SimpleNamespace(fully_sharded_loras=True)))


def test_the_model_refuses_adapters_that_the_backend_alone_would_get_wrong():
    sublayer = sublayer_of("default")
    linear = RowParallelLinearWithLoRA(RowParallelLinear(48 // 2, 32, False, False, False, None, ""))
    linear.create_lora_weights(1, types.SimpleNamespace(max_lora_rank=4), None)
    sublayer.down_proj = linear
    with pytest.raises(ValueError, match=r"adapters on down_proj\. Install finedeep beside vLLM"):
        sublayer(torch.randn(1, 40, 32))


def test_the_models_sublayer_has_what_the_plugin_takes_over():
    sublayer = sublayer_of("biases")
    assert isinstance(sublayer, FinedeepSublayer)
    names = "num_experts expert_width routing_input routing_function routing norm act_fn output_norm gate_proj up_proj"
    assert [name for name in f"{names} down_proj router expert_bias".split() if not hasattr(sublayer, name)] == []


def test_vllm_finds_the_plugin_which_imports_nothing_of_weight(monkeypatch):
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="finedeep")
    code = f"import sys; import {entry.module}; print([m for m in ('torch', 'vllm', 'finedeep') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    registered = {}
    vllm = types.ModuleType("vllm")
    vllm.ModelRegistry = types.SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    entry.load()()
    assert registered == {"FinedeepForCausalLM": "finedeep_serving.vllm_model:FinedeepForCausalLM"}
