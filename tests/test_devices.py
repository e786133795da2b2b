"""Memory and devices: offload to CPU and disk, the meta device, bfloat16 and float16, attention implementations."""

import accelerate
import pytest
import torch
from conftest import TINY, random_model
from finedeep import FinedeepConfig, FinedeepForCausalLM
from finedeep.modeling_finedeep import FinedeepSublayer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

LENGTHS = (4, 50)  # the per-expert form and the one-GEMM form


@pytest.fixture
def ids():
    return torch.randint(0, 256, (1, 50), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    random_model(tie_word_embeddings=False).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def assert_same_logits(model, folder, ids):
    whole = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for length in LENGTHS:
            torch.testing.assert_close(model(ids[:, :length]).logits, whole(ids[:, :length]).logits)


def test_offload_to_disk(tmp_path, folder, ids):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded = accelerate.disk_offload(loaded, tmp_path / "offload", execution_device="cpu")
    assert all(parameter.device.type == "meta" for parameter in loaded.parameters())
    assert_same_logits(loaded, folder, ids)


def test_offload_of_one_sublayer(tmp_path, folder, ids):
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    parts = ("self_attn", "input_layernorm", "sublayers.0", "sublayers.1")
    places |= {"model.layers.0": "cpu"} | {f"model.layers.1.{part}": "cpu" for part in parts}
    places["model.layers.1.sublayers.1"] = "disk"
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offload")
    assert loaded.model.layers[1].sublayers[1].down_proj.weight.device.type == "meta"
    assert_same_logits(loaded, folder, ids)


def test_offload_to_cpu(folder, ids):
    loaded = accelerate.cpu_offload(AutoModelForCausalLM.from_pretrained(folder), execution_device="cpu")
    assert all(parameter.device.type == "meta" for parameter in loaded.parameters())
    assert_same_logits(loaded, folder, ids)


def test_device_map_auto_splits_between_layers_only(tmp_path, folder, ids):
    size = sum(p.numel() * 4 for p in random_model().parameters())
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": size * 6 // 10}, offload_folder=tmp_path / "offload"
    )
    assert "disk" in loaded.hf_device_map.values()
    assert all(".sublayers" not in name for name in loaded.hf_device_map)
    assert_same_logits(loaded, folder, ids)


def test_meta_device_then_weights(folder, ids):
    """As accelerate and serving engines build: no memory first, then each weight put in its place."""
    with accelerate.init_empty_weights():
        empty = FinedeepForCausalLM(FinedeepConfig.from_pretrained(folder))
    assert all(parameter.device.type == "meta" for parameter in empty.parameters())
    loaded = accelerate.load_checkpoint_and_dispatch(empty, str(folder), device_map={"": "cpu"})
    assert_same_logits(loaded.eval(), folder, ids)


@pytest.mark.parametrize("routing_input", ["expert_output", "hidden_state"])
def test_shapes_of_a_training_step_on_the_meta_device(ids, routing_input):
    """Of a sub-layer, and of a whole model where Llama itself can: its RoPE could not in transformers 5.0."""
    model = random_model(routing_input=routing_input).to("meta").train()
    sublayer = model.model.layers[0].sublayers[0]
    sublayer(torch.empty(2, 5, TINY["hidden_size"], device="meta", requires_grad=True))[0].sum().backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in sublayer.parameters())
    ids = ids.to("meta")
    try:
        LlamaForCausalLM(LlamaConfig(**TINY)).to("meta")(ids)
    except RuntimeError as error:
        pytest.skip(f"Llama of this version of transformers cannot either: {error}")
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


def test_meta_device_then_memory_not_yet_set():
    """`to_empty` and then the model's own initialisation: nothing that a constructor sets may be lost."""
    config = FinedeepConfig(
        **{**TINY, "intermediate_size": 48, "sublayer_output_norm": True, "router_initializer_range": 1}
    )
    with torch.device("meta"):
        model = FinedeepForCausalLM(config)
    model = model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for module in model.modules():
        model._init_weights(module)
    sublayer = model.model.layers[0].sublayers[0]
    assert 0.5 < sublayer.router.std() < 1.5
    assert sublayer.output_norm.weight.eq(0.1).all()
    assert model(torch.arange(10)[None]).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_low_precision_follows_float32(ids, dtype, way):
    model = random_model(num_experts_per_sublayer=8)
    with torch.no_grad():
        for length in LENGTHS:
            expected = model(ids[:, :length]).logits
            if way == "autocast":
                with torch.autocast("cpu", dtype=dtype):
                    found = model(ids[:, :length]).logits
            else:
                found = random_model(num_experts_per_sublayer=8).to(dtype)(ids[:, :length]).logits
            assert found.dtype == dtype
            assert (found.float() - expected).abs().max() < 0.1 * expected.std()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("routing_input", ["expert_output", "hidden_state"])
@pytest.mark.parametrize("length", LENGTHS)
def test_scores_and_gates_are_float32(dtype, routing_input, length):
    """They differ from the gates of a float64 copy by less than the low precision could resolve."""
    sublayer = random_model(routing_input=routing_input).model.layers[0].sublayers[0].to(dtype)
    assert isinstance(sublayer, FinedeepSublayer)
    sublayer.router.data *= 0.2
    e, K = sublayer.expert_width, sublayer.num_experts
    n = torch.randn(1, length, TINY["hidden_size"]).to(dtype)
    a = torch.randn(1, length, K, e).to(dtype)
    sublayer.act_fn, G, U = torch.nn.Identity(), torch.ones(1, length, K * e, dtype=dtype), a.flatten(-2)
    W = sublayer.down_proj.weight.double().unflatten(1, (K, e))
    router = sublayer.router.double()
    if routing_input == "expert_output":
        s = torch.einsum("btke,dke,kd->btk", a.double(), W, router)
    else:
        s = n.double() @ router.T
    exact = 2 * torch.sigmoid(s)
    with torch.no_grad():
        definition = length <= 32 and routing_input != "hidden_state"
        _, g = (sublayer.definition if definition else sublayer.one_product)(G, U, n)
    assert g.dtype == torch.float32
    error = (g - exact).abs()
    assert error.median() < torch.finfo(dtype).eps / 4
    if routing_input == "hidden_state":  # nothing is rounded on the way
        assert error.max() < 1e-5


# Flex attention compiles a kernel.
@pytest.mark.parametrize("implementation", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_attention_implementations_agree(ids, implementation):
    model = random_model(hidden_size=64, head_dim=16)
    padded = torch.ones_like(ids)
    padded[:, :5] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=padded).logits[:, 5:]
        model.set_attn_implementation(implementation)
        found = model(ids, attention_mask=padded).logits[:, 5:]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
