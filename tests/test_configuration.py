import itertools
import json
import math
import re

import pytest
import torch
from conftest import TINY
from finedeep import FinedeepConfig, FinedeepForCausalLM
from transformers import AutoConfig

BAD = [
    ({"num_expert_sublayers": 0}, ["num_expert_sublayers=0", "1"]),
    ({"num_expert_sublayers": 1.5}, ["num_expert_sublayers=1.5"]),
    ({"num_expert_sublayers": True}, ["num_expert_sublayers=True"]),
    ({"num_experts_per_sublayer": -3}, ["num_experts_per_sublayer=-3", "1"]),
    ({"intermediate_size": 172}, ["intermediate_size=172", "2 * 8 = 16", "160 or 176"]),
    ({"intermediate_size": 7}, ["intermediate_size=7", "16"]),
    ({"intermediate_size": 0}, ["intermediate_size=0", "16"]),
    ({"routing_input": "token"}, ["routing_input='token'", "'expert_output', 'hidden_state'"]),
    ({"routing_function": "topk"}, ["routing_function='topk'", "'sigmoid', 'softmax'"]),
    ({"routed_scaling_factor": 0.0}, ["routed_scaling_factor=0.0", "2.0"]),
    ({"routed_scaling_factor": -1}, ["routed_scaling_factor=-1", "2.0"]),
    ({"routed_scaling_factor": math.nan}, ["routed_scaling_factor=nan"]),
    ({"routed_scaling_factor": math.inf}, ["routed_scaling_factor=inf"]),
    ({"routed_scaling_factor": "2"}, ["routed_scaling_factor='2'"]),
    ({"router_initializer_range": -0.5}, ["router_initializer_range=-0.5", "0.0"]),
    ({"router_initializer_range": math.nan}, ["router_initializer_range=nan", "0.0"]),
    ({"sublayer_output_norm": "yes"}, ["sublayer_output_norm='yes'", "True, False"]),
]


@pytest.mark.parametrize(("fields", "words"), BAD, ids=lambda value: str(value)[:50])
def test_what_cannot_work_is_refused_with_what_would(fields, words):
    with pytest.raises(ValueError, match="=") as error:
        FinedeepConfig(**fields)
    for word in words:
        assert word in str(error.value)


def test_the_nearest_widths_named_do_work():
    for M, K, width in itertools.product((1, 2, 5), (3, 8), (1, 17, 100)):
        fields = {"num_expert_sublayers": M, "num_experts_per_sublayer": K}
        if width % (M * K) == 0:
            continue
        with pytest.raises(ValueError, match="nearest") as error:
            FinedeepConfig(intermediate_size=width, **fields)
        named = str(error.value).rsplit(":", 1)[1].strip(" .")
        for size in named.split(" or "):
            assert FinedeepConfig(intermediate_size=int(size), **fields).expert_intermediate_size == int(size) // (
                M * K
            )


@pytest.mark.parametrize(
    ("field", "value"), [("routing_function", "sofmax"), ("routing_input", "hidden"), ("routing_function", [])]
)
def test_a_routing_that_there_is_not_is_refused_whenever_it_is_set(tmp_path, field, value):
    """from_pretrained sets fields of a configuration that has been made; any other name would be another model."""
    FinedeepConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{field}={value!r} is not known; values that work: ")):
        FinedeepConfig.from_pretrained(tmp_path, **{field: value})


def test_every_field_survives_a_round_trip(tmp_path):
    fields = {
        "num_expert_sublayers": 3,
        "num_experts_per_sublayer": 5,
        "routing_input": "hidden_state",
        "routing_function": "softmax",
        "routed_scaling_factor": 1.25,
        "router_initializer_range": 0.5,
        "sublayer_output_norm": True,
        "hidden_size": 64,
        "intermediate_size": 150,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "mlp_bias": True,
        "attention_bias": True,
        "hidden_act": "gelu",
        "vocab_size": 99,
        "pad_token_id": 7,
    }
    config = FinedeepConfig(**fields, rope_theta=12345.0, rope_scaling={"rope_type": "linear", "factor": 4.0})
    config.save_pretrained(tmp_path)
    for again in (FinedeepConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(again, FinedeepConfig), type(again).__module__
        for field, value in fields.items():
            assert getattr(again, field) == value, field
        ours, theirs = config.to_dict(), again.to_dict()
        for key in ("_name_or_path",):
            ours.pop(key, None), theirs.pop(key, None)
        assert ours == theirs
    assert again.expert_intermediate_size == 10
    assert "expert_intermediate_size" not in json.loads((tmp_path / "config.json").read_text())


def test_rope_of_either_spelling_is_read():
    new = FinedeepConfig(rope_parameters={"rope_theta": 7.0, "rope_type": "linear", "factor": 2.0})
    old = FinedeepConfig(rope_theta=7.0, rope_scaling={"type": "linear", "factor": 2.0})
    for config in (new, old):
        rope = getattr(config, "rope_parameters", None) or {**config.rope_scaling, "rope_theta": config.rope_theta}
        assert (rope["rope_theta"], rope["rope_type"], rope["factor"]) == (7.0, "linear", 2.0)


def test_a_field_changed_later_is_refused_when_a_model_is_made(tmp_path):
    FinedeepConfig(intermediate_size=64, num_hidden_layers=1).save_pretrained(tmp_path)
    config = FinedeepConfig.from_pretrained(tmp_path, num_expert_sublayers=3)
    with pytest.raises(ValueError, match="48 or 72"), torch.device("meta"):
        FinedeepForCausalLM(config)


def test_a_callers_dict_is_not_changed():
    rope = {"rope_theta": 7.0, "rope_type": "default"}
    FinedeepConfig(rope_parameters=rope)
    assert rope == {"rope_theta": 7.0, "rope_type": "default"}


def test_the_default_scale_makes_a_zero_router_neutral():
    assert FinedeepConfig().routed_scaling_factor == 2.0
    assert FinedeepConfig(routing_function="softmax", num_experts_per_sublayer=4).routed_scaling_factor == 4.0


def test_layers_may_be_taken_off_or_added(tmp_path):
    """As in a model that is read in part, or pruned: what each layer has follows."""
    model = FinedeepForCausalLM(FinedeepConfig(**{**TINY, "intermediate_size": 48}))
    model.save_pretrained(tmp_path / "model")
    for layers in (1, 4):
        part = FinedeepForCausalLM.from_pretrained(tmp_path / "model", num_hidden_layers=layers)
        part.save_pretrained(tmp_path / f"{layers}")
        assert len(FinedeepForCausalLM.from_pretrained(tmp_path / f"{layers}").model.layers) == layers
        assert part.config.layer_types == ["full_attention"] * layers
    types = ["sliding_attention", "full_attention", "full_attention"]
    config = FinedeepConfig(num_hidden_layers=3, sliding_window=4, layer_types=types)
    for layers in (1, 3):  # as `generate(assistant_early_exit=1)` does
        config.num_hidden_layers = layers
        assert config.layer_types == types


def test_rope_by_its_older_key_is_read():
    linear = {"type": "linear", "factor": 4.0, "rope_theta": 500.0}
    config = FinedeepConfig(rope_parameters=linear)
    assert config.rope_scaling["rope_type"] == "linear"
    assert config.rope_scaling["factor"] == 4.0


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "partial_rotary_factor": 0.5}}, "rotary_factor=0.5"),
        ({"rope_scaling": {"full_attention": {"rope_type": "linear", "factor": 2.0}}}, "full_attention"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    ],
    ids=str,
)
def test_rope_that_would_be_another_model_is_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        FinedeepConfig(**fields)


def test_a_routing_function_that_is_not_in_the_table_is_refused_wherever_it_is_set():
    with pytest.raises(ValueError, match="sofmax"):
        FinedeepConfig(routing_function="sofmax")
    config = FinedeepConfig(**TINY | {"intermediate_size": 32, "num_experts_per_sublayer": 2})
    with pytest.raises(ValueError, match="sofmax"):
        config.routing_function = "sofmax"
    sublayer = FinedeepForCausalLM(config).model.layers[0].sublayers[0]
    sublayer.routing_function = "sofmax"
    with pytest.raises(KeyError, match="sofmax"):
        sublayer(torch.zeros(1, 2, TINY["hidden_size"]))


def test_adding_a_routing_function_is_one_entry(monkeypatch):
    from finedeep import configuration_finedeep

    entry = configuration_finedeep.RoutingFunction(lambda s: s.relu() + 1, lambda K: 1.0)
    monkeypatch.setitem(configuration_finedeep.ROUTING_FUNCTIONS, "relu", entry)
    config = FinedeepConfig(**TINY | {"intermediate_size": 32, "num_experts_per_sublayer": 2}, routing_function="relu")
    assert config.routed_scaling_factor == 1.0
    sublayer = FinedeepForCausalLM(config).model.layers[0].sublayers[0]
    torch.nn.init.normal_(sublayer.router)
    for tokens in (2, 50):
        _, g = sublayer(torch.randn(1, tokens, TINY["hidden_size"]))
        assert g.min() >= 1
        assert g.max() > 1


def test_logits_are_scaled_for_vllm_too(tmp_path):
    """vLLM asks for the inverse by another name. Nothing of it is stored, and a value in a file is not believed."""
    FinedeepConfig(logits_scaling=8.0).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert "logit_scale" not in stored
    (tmp_path / "config.json").write_text(json.dumps({**stored, "logit_scale": 3.0}))
    assert FinedeepConfig.from_pretrained(tmp_path).logit_scale == 0.125
    assert FinedeepConfig().logit_scale == 1
