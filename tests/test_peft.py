"""LoRA as on a Llama: what was asked for is adapted and trained, and merging changes nothing."""

import copy

import pytest
import torch
from conftest import TINY, random_model
from finedeep.convert import convert_checkpoint
from transformers import AutoModelForCausalLM

peft = pytest.importorskip("peft")

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS, M = TINY["num_hidden_layers"], 2
# what is asked for, and how many adapters that makes in one decoder layer: four in attention, three in a sub-layer
REQUESTS = {
    "all-linear": ({"target_modules": "all-linear"}, 4 + 3 * M),
    "the seven names": ({"target_modules": SEVEN}, 4 + 3 * M),
    "down projections": ({"target_modules": ["down_proj"]}, M),
    "down projections, with dropout": ({"target_modules": ["down_proj"], "lora_dropout": 0.3}, M),
    "DoRA": ({"target_modules": SEVEN, "use_dora": True}, 4 + 3 * M),
    "rank-stabilised": ({"target_modules": SEVEN, "use_rslora": True}, 4 + 3 * M),
    "routers": ({"target_modules": ["q_proj"], "target_parameters": ["router"]}, 1 + M),
    "down weights as parameters": ({"target_modules": ["q_proj"], "target_parameters": ["down_proj.weight"]}, 1 + M),
}


def adapted(model, **request):
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **request))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def batches():
    """One that takes the per-expert form, and one that takes the one-GEMM form."""
    ids = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(0))
    return ids[:1, :4], ids


@pytest.mark.parametrize("name", REQUESTS)
def test_every_adapter_asked_for_is_there_and_trains(batches, name):
    request, in_a_layer = REQUESTS[name]
    model = adapted(random_model(), **request).train()
    adapters = {name: p for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name}
    assert len(adapters) == 2 * LAYERS * in_a_layer
    for ids in batches:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in adapters.values())
    assert all(p.grad is None for name, p in model.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("M", [1, 2])
def test_dora_trains_where_experts_are_filled_up(tmp_path, dense, batches, M):
    """44 neurons in experts of 48: rows of zeros have no direction, and DoRA divided by their norm."""
    convert_checkpoint(dense, tmp_path / "out", num_expert_sublayers=M, num_experts_per_sublayer=8, progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=SEVEN, use_dora=True)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=batches[1], labels=batches[1]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("name", REQUESTS)
def test_merging_changes_nothing(batches, name):
    base = random_model().eval()
    plain = [base(ids).logits for ids in batches]
    model = adapted(base, **REQUESTS[name][0]).eval()
    in_training = [model(input_ids=ids).logits.detach() for ids in batches]
    with torch.no_grad():
        before = [model(input_ids=ids).logits for ids in batches]
        merged = model.merge_and_unload()
        after = [merged(ids).logits for ids in batches]
    for p, t, b, a in zip(plain, in_training, before, after, strict=True):
        assert (b - p).abs().max() > 0.01
        torch.testing.assert_close(t, a, rtol=1e-4, atol=2e-4)
        torch.testing.assert_close(b, a, rtol=1e-4, atol=2e-4)


def test_gradients_of_an_adapter_are_those_of_the_merged_weight(batches):
    """d loss / d B, by the chain rule from the plain model's d loss / d W_down at the merged weight."""
    model = adapted(random_model(), target_modules=["down_proj"]).eval()
    merged = copy.deepcopy(model).merge_and_unload()
    merged.requires_grad_(True)
    ids = batches[1]
    model(input_ids=ids, labels=ids).loss.backward()
    merged(input_ids=ids, labels=ids).loss.backward()
    for layer in range(LAYERS):
        for m in range(M):
            lora = model.base_model.model.model.layers[layer].sublayers[m].down_proj
            A, scale = lora.lora_A["default"].weight, lora.scaling["default"]
            dW = merged.model.layers[layer].sublayers[m].down_proj.weight.grad
            torch.testing.assert_close(lora.lora_B["default"].weight.grad, scale * dW @ A.T, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_with_adapters(batches, reentrant):
    ids = batches[1]

    def gradients(model):
        model.train().zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model = adapted(random_model(), target_modules=SEVEN)
    expected = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model)
    assert found.keys() >= expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


def test_adapter_is_saved_and_loaded(tmp_path, batches):
    model = adapted(random_model(), target_modules=SEVEN).eval()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(random_model(), tmp_path).eval()
    with torch.no_grad():
        for ids in batches:
            torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=0)


def test_asking_for_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match="not found"):
        adapted(random_model(), target_modules=["w_down"])


def test_qlora_trains_on_four_bits(tmp_path, batches):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    random_model().save_pretrained(tmp_path)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=four_bits, dtype=torch.float32)
    assert type(model.model.layers[0].sublayers[0].down_proj).__name__ == "Linear4bit"
    model = peft.prepare_model_for_kbit_training(model)
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(input_ids=batches[1], labels=batches[1]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    adapters = [p for name, p in model.named_parameters() if "down_proj.lora_" in name]
    assert len(adapters) == 2 * LAYERS * M
    assert all(p.grad.abs().max() > 0 for p in adapters)
    assert losses[-1] < losses[0] - 0.5


def test_adapters_that_differ_by_row_of_a_batch():
    """`adapter_names` names one for each row, as on a Llama; a batch of exactly K rows is no exception."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(random_model(), config, adapter_name="one")
    model.add_adapter("two", config)
    model.eval()
    names = ["one", "two", "__base__", "one"]
    for length in (4, 40):
        ids = torch.randint(0, 256, (4, length), generator=torch.Generator().manual_seed(length))
        expected = []
        for row, name in zip(ids, names, strict=True):
            if name == "__base__":
                with model.disable_adapter():
                    expected.append(model(row[None]).logits)
            else:
                model.set_adapter(name)
                expected.append(model(row[None]).logits)
        assert (expected[0] - expected[3])[0, 0].abs().max() > 1e-3
        for rows, grad in ((4, True), (3, False)):
            with torch.set_grad_enabled(grad):
                found = model(ids[:rows], adapter_names=names[:rows]).logits
            torch.testing.assert_close(found, torch.cat(expected[:rows]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("M", [2, 4])
def test_a_checkpoint_runs_attention_once_more_and_not_more_often(batches, M):
    """Scores that autograd reads within a forward must not make a checkpoint run its layer for each of them."""
    model = adapted(random_model(num_expert_sublayers=M), target_modules=SEVEN).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    calls = []
    for layer in model.base_model.model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    model(input_ids=batches[1], labels=batches[1], use_cache=False).loss.backward()
    assert len(calls) == 2 * LAYERS


# Other kinds of adapters, with what makes them small and, where they begin as nothing, random.
KINDS = {
    "LoHaConfig": {"r": 4, "init_weights": False},
    "LoKrConfig": {"r": 4, "init_weights": False},
    "OFTConfig": {"oft_block_size": 4, "r": 0},
    "BOFTConfig": {"boft_block_size": 4},
    "IA3Config": {"feedforward_modules": ["down_proj"], "init_ia3_weights": False},
    "VeraConfig": {"r": 4},
    "HRAConfig": {"r": 4, "init_weights": False},
    "FourierFTConfig": {"n_frequency": 20, "init_weights": True},
    "MissConfig": {"r": 4},
    "RandLoraConfig": {"r": 4},
    "C3AConfig": {"block_size": 8, "init_weights": True},
    "VBLoRAConfig": {"r": 4, "num_vectors": 16, "vector_length": 8, "topk": 2},
    "ShiraConfig": {"r": 4},
    "AdaLoraConfig": {"init_r": 4, "total_step": 10},
    "AdamssConfig": {"r": 4},
    "DeftConfig": {"r": 4},
    "DeloraConfig": {"r": 4},
    "FrodConfig": {},
    "GloraConfig": {"r": 4},
    "GraloraConfig": {"r": 4},
    "HiraConfig": {"r": 4},
    "LNTuningConfig": {"target_modules": ["input_layernorm", "norm"]},
    "OSFConfig": {},
    "PeanutConfig": {"r": 4},
    "PsoftConfig": {"r": 4},
    "PveraConfig": {"r": 4},
    "SupertuningConfig": {},
    "TinyLoraConfig": {"r": 4},
    "UniLoraConfig": {"r": 4},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_every_kind_of_adapter_is_the_function_that_its_merging_gives(batches, kind):
    if not hasattr(peft, kind):
        pytest.skip(f"this version of peft has no {kind}")
    torch.manual_seed(1)
    where = {"target_modules": ["gate_proj", "up_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    config = getattr(peft, kind)(**where | KINDS[kind])
    tolerance = 5e-3 if kind == "C3AConfig" else 1e-3  # whose merging is by another Fourier transform, on a Llama too
    base = random_model()
    with torch.no_grad():
        plain = [base(ids).logits for ids in batches]
    model = peft.get_peft_model(base, config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    found = [model(input_ids=ids).logits.detach() for ids in batches]
    with torch.no_grad():
        without = [model(input_ids=ids).logits for ids in batches]
        merged = model.merge_and_unload()
        expected = [merged(ids).logits for ids in batches]
    for p, f, w, e in zip(plain, found, without, expected, strict=True):
        assert (e - p).abs().max() > 1e-3
        torch.testing.assert_close(f, e, rtol=0, atol=tolerance)
        torch.testing.assert_close(w, e, rtol=0, atol=tolerance)


@torch.no_grad()
def test_activated_lora_begins_at_its_invocation(recwarn):
    """aLoRA tells tokens apart: before the invocation every token has the dense weights, scores of experts included."""
    ids, invocation = torch.arange(40)[None], [20, 21]
    base = random_model()
    plain = base(ids).logits
    where = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, alora_invocation_tokens=invocation, **where)).eval()
    change = (model(ids).logits - plain).abs().amax(-1)[0]
    assert change[:20].max() < 1e-4 < 1e-2 < change[20:].min()
    with torch.enable_grad():
        torch.testing.assert_close(model(ids).logits, model(ids).logits.detach())
    written = model.generate(input_ids=ids[:, :24], max_new_tokens=2, do_sample=False, eos_token_id=None)
    expected = [int(model(written[:, :length]).logits[0, -1].argmax()) for length in (24, 25)]
    assert written[0, 24:].tolist() == expected


def test_dora_on_rows_of_zeros_is_refused():
    """A grown model's new sub-layers start with a zero W_down, by whose rows' norms DoRA would divide: NaN."""
    model = random_model()
    model.model.layers[0].sublayers[1].down_proj.weight.data.zero_()
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["down_proj"], use_dora=True))
    with pytest.raises(ValueError, match="down_proj"):
        model(input_ids=torch.arange(4)[None])
