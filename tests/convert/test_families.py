"""Each family's smallest model, with random weights, against its conversion with M = 1: the same logits."""

import json

import pytest
import torch
from conftest import CACHE, TINY, byte_tokenizer
from finedeep.convert import ConversionError, convert_checkpoint
from finedeep.convert.families import FAMILIES, REFUSED
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

LAYERS = {**TINY, "num_hidden_layers": 4}


def scaled(kind, **more):
    return {"rope_scaling": {"rope_type": kind, "factor": 4.0, **more}}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
BIASES = {"attention_bias": True, "mlp_bias": True}
WINDOWS = {"use_sliding_window": True, "sliding_window": 16}
SCALES = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.05,
    "logits_scaling": 8.0,
}
# name -> (model_type, what differs from LAYERS)
CASES = {
    "llama 1": ("llama", {"num_key_value_heads": 4}),
    "llama 2, grouped queries": ("llama", {}),
    "llama 3, scaled RoPE": ("llama", scaled("llama3", **LLAMA3)),
    "llama, linear RoPE": ("llama", scaled("linear")),
    "llama, dynamic RoPE": ("llama", {**scaled("dynamic"), "max_position_embeddings": 32}),
    "llama, yarn RoPE": ("llama", scaled("yarn", original_max_position_embeddings=32)),
    "llama, biases everywhere, tied": ("llama", {**BIASES, "tie_word_embeddings": True}),
    "mistral, sliding window": ("mistral", {"sliding_window": 16}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, windows in upper layers": ("qwen2", {**WINDOWS, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3, biases": ("qwen3", {"head_dim": 8, "attention_bias": True}),
    "smollm3": ("smollm3", {}),
    "smollm3, windows": ("smollm3", {**WINDOWS, "no_rope_layer_interval": 2}),
    "phi3": ("phi3", {"sliding_window": 16}),
    "phi3, long RoPE": (
        "phi3",
        {"rope_scaling": {"type": "longrope", **LONG}, "original_max_position_embeddings": 32},
    ),
    "granite": (
        "granite",
        SCALES,
    ),
    "granite, biases": ("granite", {**BIASES, "residual_multiplier": 0.5}),
    "seed_oss": ("seed_oss", {"head_dim": 16, "attention_dropout": 0.0, "residual_dropout": 0.0}),
}  # fmt: skip


def make_family(folder, model_type, changes, dtype=torch.float32):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**LAYERS, **changes})
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model.eval()


@torch.no_grad()
def token_by_token(model, ids):
    cache, steps = None, []
    for t in range(ids.shape[1]):
        out = model(ids[:, t : t + 1], **{CACHE: cache}, use_cache=True)
        cache = out[CACHE]
        steps.append(out.logits)
    return torch.cat(steps, dim=1)


def close(found, expected):
    assert expected.std() > 0.1  # a model whose logits are all alike would prove nothing
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_one_sublayer_gives_the_familys_logits(tmp_path, case):
    """Uncached, left-padded, cached and generated, over three windows' length."""
    model_type, changes = CASES[case]
    dense = make_family(tmp_path / "dense", model_type, changes)
    convert_checkpoint(
        tmp_path / "dense", tmp_path / "out", num_expert_sublayers=1, num_experts_per_sublayer=8, progress=False
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    ids[1, :7] = TINY["pad_token_id"]
    close(model(ids[:1]).logits, dense(ids[:1]).logits)
    real = mask.bool()
    close(model(ids, attention_mask=mask).logits[real], dense(ids, attention_mask=mask).logits[real])
    close(token_by_token(model, ids[:1]), token_by_token(dense, ids[:1]))
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), dense.generate(ids, **options))


STRAY = {
    "llama": {"sliding_window": 16, "no_rope_layers": [0] * 4, "qk_norm": True, "sublayer_output_norm": True, **SCALES},
    "mistral": {"attention_bias": True, "mlp_bias": True, "layer_types": ["full_attention"] * 4, **SCALES},
    "qwen2": {"attention_bias": False, "mlp_bias": True, "no_rope_layers": [0] * 4},
    "phi3": {"attention_bias": True, "mlp_bias": True, "num_expert_sublayers": 4},
    "granite": {"sliding_window": 16, "qk_norm": True},
}


@pytest.mark.parametrize("model_type", STRAY)
@torch.no_grad()
def test_fields_that_a_family_does_not_read_are_not_read(tmp_path, model_type):
    """Checkpoints carry fields of other families, which their own models ignore."""
    dense = make_family(tmp_path / "dense", model_type, next(c for f, c in CASES.values() if f == model_type))
    path = tmp_path / "dense/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **STRAY[model_type]}))
    convert_checkpoint(tmp_path / "dense", tmp_path / "out", num_expert_sublayers=1, progress=False)
    ids = torch.arange(50)[None]
    close(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(ids).logits, dense(ids).logits)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_family_has_a_case(model_type):
    assert model_type in {family for family, _ in CASES.values()}


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("options", [{"num_expert_sublayers": 2}, {"num_expert_sublayers": 3, "mode": "grow"}], ids=str)
def test_every_family_is_cut_and_grown(tmp_path, model_type, options):
    dense = make_family(tmp_path / "dense", model_type, next(c for f, c in CASES.values() if f == model_type))
    done = convert_checkpoint(
        tmp_path / "dense", tmp_path / "out", num_experts_per_sublayer=4, progress=False, **options
    )
    ids = torch.arange(40)[None]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(ids).logits
    if done.exact:
        close(found, dense(ids).logits)
    else:
        assert (found - dense(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("model_type", [*REFUSED, "nobody"])
def test_other_families_are_refused_with_the_reason(tmp_path, model_type):
    make_family(tmp_path / "dense", "llama", {})
    path = tmp_path / "dense/config.json"
    path.write_text(path.read_text().replace('"llama"', f'"{model_type}"'))
    with pytest.raises(ConversionError, match=REFUSED.get(model_type, "not known here").replace("+", r"\+")):
        convert_checkpoint(tmp_path / "dense", tmp_path / "out", progress=False)


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_families_exist(model_type):
    assert model_type in CONFIG_MAPPING


def test_partial_rotation_is_refused(tmp_path):
    make_family(tmp_path / "dense", "phi3", {"partial_rotary_factor": 0.5})
    with pytest.raises(ConversionError, match=r"partial_rotary_factor 0\.5"):
        convert_checkpoint(tmp_path / "dense", tmp_path / "out", progress=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision_families_stay_near(tmp_path, dtype):
    """The logits of a converted half-precision Granite are as near to the exact ones as Granite's own are."""
    dense = make_family(tmp_path / "dense", *CASES["granite"], dtype)
    convert_checkpoint(tmp_path / "dense", tmp_path / "out", num_expert_sublayers=1, progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).eval()
    ids = torch.arange(50)[None]
    low, found = dense(ids).logits, model(ids).logits
    exact = dense.float()(ids).logits
    assert (found - exact).abs().mean() < 1.5 * (low - exact).abs().mean()
