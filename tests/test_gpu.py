"""On a GPU: the model on the device, one graph, FlashAttention, and a tiny one the whole way (`make test-gpu`)."""

import importlib.util

import pytest
import torch
from conftest import CACHE, TINY, byte_tokenizer, make_dense, random_model
from finedeep.modeling_finedeep import FinedeepSublayer
from transformers import AutoModelForCausalLM, StaticCache

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")

LENGTHS = (4, 60)  # for each form of a sub-layer


def ids(length, rows=2):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("changes", [{}, {"sublayer_output_norm": True}, {"routing_function": "softmax"}], ids=str)
def test_logits_are_those_of_the_cpu(changes):
    model = random_model(**changes)
    for length in LENGTHS:
        with torch.no_grad():
            expected = model(ids(length)).logits
            found = model.cuda()(ids(length).cuda()).logits.cpu()
        model.cpu()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def gradients(model, **options):
    model.zero_grad()
    model(ids(60).cuda(), labels=ids(60).cuda(), use_cache=False, **options).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    model = random_model().cuda().train()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for name, found in gradients(model).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_under_autocast(dtype):
    model = random_model().cuda().train()
    expected = gradients(model)
    with torch.autocast("cuda", dtype=dtype):
        found = gradients(model)
    for name in expected:
        assert (found[name] - expected[name]).norm() < 0.1 * expected[name].norm() + 1e-5


@pytest.mark.parametrize("training", [False, True])
def test_one_graph(training):
    model = random_model().cuda().train(training)
    compiled = torch.compile(model, fullgraph=True)
    for length in LENGTHS:
        given = {"input_ids": ids(length).cuda(), "labels": ids(length).cuda(), "use_cache": False}
        with torch.set_grad_enabled(training):
            found, expected = compiled(**given).loss, model(**given).loss
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    torch.compiler.reset()


@pytest.mark.parametrize("length", LENGTHS)
def test_cuda_graphs(length):
    """A sub-layer is captured and replayed with another input, its kernels included."""
    sublayer = random_model().model.layers[0].sublayers[0].cuda().to(torch.bfloat16)
    assert isinstance(sublayer, FinedeepSublayer)
    h = torch.randn(1, length, TINY["hidden_size"], device="cuda", dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        sublayer(h)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            captured, _ = sublayer(h)
        other = torch.randn_like(h)
        expected, _ = sublayer(other)
    h.copy_(other)
    graph.replay()
    torch.testing.assert_close(captured, expected, rtol=1e-2, atol=1e-2)


def test_decoding_in_a_cuda_graph_with_a_static_cache():
    model = random_model().cuda().eval()
    step = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        expected = model(ids(12, 1).cuda()).logits
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(ids(12, 1)[:, :8].cuda(), **{CACHE: cache})
        for i in range(8, 12):
            torch.compiler.cudagraph_mark_step_begin()
            position = torch.tensor([[i]], device="cuda")
            found = step(ids(12, 1)[:, i : i + 1].cuda(), position_ids=position, **{CACHE: cache}).logits
            torch.testing.assert_close(found[0, 0], expected[0, i], rtol=1e-3, atol=1e-3)
    torch.compiler.reset()


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed here")
def test_flash_attention():
    model = random_model().cuda().to(torch.bfloat16)
    expected = model(ids(60).cuda()).logits
    model.set_attn_implementation("flash_attention_2")
    torch.testing.assert_close(model(ids(60).cuda()).logits, expected, rtol=0.1, atol=0.3)


def test_the_whole_way(tmp_path):
    """Converted, calibrated, healed on the device, and then generating: each step brings the dense model nearer."""
    pytest.importorskip("accelerate", reason="healing is a training by transformers' Trainer")
    from finedeep.convert import convert_checkpoint
    from finedeep.convert.heal import heal

    dense = make_dense(tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    cut = {"num_expert_sublayers": 2, "num_experts_per_sublayer": 4, "progress": False}
    convert_checkpoint(dense, tmp_path / "cut", **cut)
    calibration = {"calibrate": str(text), "calibration_tokens": 4096, "calibration_steps": 20}
    convert_checkpoint(dense, tmp_path / "calibrated", **cut, **calibration)
    healing = {"data": str(text), "tokens": 8192, "context": 64, "steps": 10, "progress": False}
    heal(tmp_path / "calibrated", tmp_path / "healed", teacher=str(dense), **healing)
    given = byte_tokenizer()("the quick brown", return_tensors="pt").input_ids.cuda()
    logits = {}
    for name in ("dense", "cut", "calibrated", "healed"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name).cuda().eval()
        with torch.no_grad():
            logits[name] = model(given).logits
    far = {name: (logits[name] - logits["dense"]).norm().item() for name in logits}
    assert far["calibrated"] < far["cut"]
    assert model.generate(given, max_new_tokens=5, do_sample=False).shape == (1, given.shape[1] + 5)
