"""What vLLM and SGLang ask of a custom model that they serve through their Transformers backends.

Each test states one condition and where it comes from. "vLLM" is `vllm/model_executor/models/transformers/` of vLLM's
main branch at about v0.26, with "Custom models" and "Writing custom models" in `docs/models/supported_models.md`;
"SGLang" is `python/sglang/srt/models/transformers.py` and `model_loader/utils.py` with `transformers_fallback.md`;
"transformers" is the page `transformers_as_backend`. The engines themselves are run by the last two tests, on a GPU.
"""

import inspect
import json
import re

import pytest
import torch
import transformers
from conftest import TINY, make_dense
from finedeep import FinedeepConfig, FinedeepForCausalLM, FinedeepModel
from finedeep.convert import convert_checkpoint
from finedeep.modeling_finedeep import FinedeepAttention, FinedeepSublayer
from isolated import run_isolated
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AttentionInterface, LlamaConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

LAYERS, M, K = 3, 2, 4

# More tokens than `FinedeepSublayer.definition_max_tokens`, fewer, and one: both forms of a sub-layer are met.
LENGTHS = (1, 40, 300)

VARIANTS = {
    "default": {},
    "softmax": {"routing_function": "softmax"},
    "hidden state": {"routing_input": "hidden_state"},
    "biases": {"mlp_bias": True, "attention_bias": True},
    "sandwich": {"sublayer_output_norm": True},
}


def converted_checkpoint(folder, **shape):
    """A converted model whose routers are no longer zero, so that gates differ from token to token."""
    dense = make_dense(folder / "dense", num_hidden_layers=LAYERS, max_position_embeddings=512, **shape)
    out = folder / "finedeep"
    convert_checkpoint(dense, out, num_expert_sublayers=M, num_experts_per_sublayer=K, progress=False)
    weights = load_file(out / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if name.endswith(".router"):
            weight.normal_(std=0.3, generator=generator)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return converted_checkpoint(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def config_json(folder):
    return json.loads((folder / "config.json").read_text())


def random_model(**changes):
    torch.manual_seed(0)
    shape = {"num_hidden_layers": LAYERS, "intermediate_size": 6 * M * K, "max_position_embeddings": 512}
    config = FinedeepConfig(**{**TINY, **shape, "num_expert_sublayers": M, "num_experts_per_sublayer": K, **changes})
    model = FinedeepForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def prompt(length):
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(length))


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- the engine's side, written from its description


class EngineLinear(nn.Module):
    """What stands where an `nn.Linear` stood: no `nn.Linear` itself, but it holds the weight and does the same."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class MissingLayer(nn.Identity):
    """What stands where a layer of another pipeline stage stood: it gives back what it was given first."""

    def forward(self, *args, **kwargs):
        return args[0] if args else next(iter(kwargs.values()))


class CacheOfOneLayer:
    """What the engine keeps for one layer's attention; here it only notes who asked."""

    def __init__(self):
        self.calls = []


def engine_attention(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    """Causal attention as an engine does it: its own masks, its own cache by `layer_idx`, tokens in a flat list."""
    attention_instances[module.layer_idx].calls.append((attention_mask, scaling))
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).flatten(2)[0], None


AttentionInterface.register("engine_of_these_tests", engine_attention)


def replace_linears(module):
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, EngineLinear(child.weight, child.bias))
        else:
            replace_linears(child)


def run_as_engine(base, instances=None, **inputs):
    """The call of vLLM's `Base.forward` and SGLang's `_run_hf_backbone`: one flat batch, no cache, a tuple back."""
    base.config._attn_implementation = "engine_of_these_tests"
    instances = instances or {i: CacheOfOneLayer() for i in range(base.config.num_hidden_layers)}
    length = next(iter(inputs.values())).shape[1]
    positions = torch.arange(length)[None]
    with torch.inference_mode():
        outputs = base(
            use_cache=False, position_ids=positions, attention_instances=instances, return_dict=False, **inputs
        )
    return outputs[0][0, ...]


# ---------------------------------------------------------------- the folder


ABOUT_THE_FOLDER = """
import inspect, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.dynamic_module_utils import get_class_from_dynamic_module
folder = sys.argv[1]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
dynamic = {name: get_class_from_dynamic_module(value, folder) for name, value in sorted(config.auto_map.items())}
with torch.device("meta"):
    on_meta = AutoModel.from_config(config, trust_remote_code=True)
    classifier = AutoModelForSequenceClassification.from_config(config, trust_remote_code=True)
with torch.device("meta"):
    half = AutoModel.from_config(config, dtype=torch.bfloat16, trust_remote_code=True)
base, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
full = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
materialised = all(
    torch.empty_like(p.data, dtype=torch.float16, device="cpu").shape == p.shape for p in on_meta.parameters()
)
ids = torch.arange(40)[None]
with torch.no_grad():
    hidden = base.eval()(ids).last_hidden_state
    logits = full.eval()(ids).logits
answer = {
    "dynamic": {name: cls.__name__ for name, cls in dynamic.items()},
    "base": type(base).__name__,
    "missing": sorted(info["missing_keys"]),
    "backend compatible": [dynamic["AutoModel"].is_backend_compatible(), base._supports_attention_backend],
    "one config": config.get_text_config() is config,
    "decoder": type(on_meta.get_decoder()).__name__,
    "forward": list(inspect.signature(type(base).forward).parameters),
    "meta devices": sorted({p.device.type for p in on_meta.parameters()}),
    "half dtypes": sorted({str(p.dtype) for p in half.parameters()}),
    "materialised": materialised,
    "classifier": [name for name in ("classifier", "score") if hasattr(classifier, name)],
    "base parameters": {name: list(p.shape) for name, p in on_meta.named_parameters()},
    "beside base": sorted(name for name, _ in full.named_parameters() if not name.startswith("model.")),
    "head of base": (full.lm_head(hidden) - logits).abs().max().item(),
    "causal": sorted({m.is_causal for m in base.modules() if hasattr(m, "is_causal")}),
    "with is_causal": sum(hasattr(m, "is_causal") for m in base.modules()),
}
"""


@pytest.fixture(scope="module")
def facts(folder):
    """What a process that cannot import the project finds when it loads the folder as the engines do."""
    return run_isolated(ABOUT_THE_FOLDER, folder)


def test_config_names_the_base_model_and_every_class_it_names_loads(facts, config_json):
    """vLLM, "Custom models": `auto_map.AutoModel` in config.json. SGLang imports every entry of `auto_map`."""
    assert "AutoModel" in config_json["auto_map"]
    assert set(facts["dynamic"]) == set(config_json["auto_map"])
    assert facts["dynamic"]["AutoModel"] == facts["base"] == "FinedeepModel"
    assert facts["missing"] == []


def test_architecture_is_taken_for_no_other_model(facts, config_json):
    """vLLM and SGLang look `architectures` up in transformers first; SGLang also looks for parts of the name."""
    (architecture,) = config_json["architectures"]
    assert getattr(transformers, architecture, None) is None
    assert not re.search("moe|mixtral|sequenceclassification|rewardmodel", architecture.lower())
    assert facts["one config"], "a text config that differs from the config makes a model multimodal"


def test_attention_backend_is_supported(facts):
    """vLLM, SGLang and transformers: `_supports_attention_backend = True`, asked for by `is_backend_compatible()`."""
    assert facts["backend compatible"] == [True, True]


def test_everything_but_the_head_is_in_the_base_model(facts):
    """vLLM, "Custom models": customisation in the base model. The engines put their own head on it."""
    assert facts["beside base"] == ["lm_head.weight"]
    assert facts["head of base"] == 0.0


def test_attention_calls_the_interface_in_a_source_of_its_own():
    """vLLM from 0.30 reads the source of the attention class's `forward` for the call of the attention functions."""
    assert "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(FinedeepAttention.forward)
    assert "super()" not in inspect.getsource(FinedeepAttention.forward)


def test_attention_is_causal(facts):
    """vLLM (`_get_attn_cls`) and SGLang take any module with `is_causal` False for an encoder's."""
    assert facts["causal"] == [True]
    assert facts["with is_causal"] == LAYERS


def test_decoder_is_the_base_model_and_names_its_inputs(facts):
    """vLLM decorates the class of `get_decoder()` for torch.compile, and marks these arguments of `forward`."""
    assert facts["decoder"] == "FinedeepModel"
    assert {"input_ids", "inputs_embeds", "position_ids"} <= set(facts["forward"])
    assert "kwargs" in facts["forward"]


def test_model_is_built_on_the_meta_device_and_given_memory_afterwards(facts):
    """vLLM (`_get_decoder_cls`, `init_parameters`) and SGLang (`_init_parameters`)."""
    assert facts["meta devices"] == ["meta"]
    assert facts["half dtypes"] == ["torch.bfloat16"]
    assert facts["materialised"]


def test_classifier_is_found_by_name(facts):
    """vLLM's `SequenceClassificationMixin`: a `classifier` or a `score` on the sequence-classification class."""
    assert facts["classifier"] == ["score"]


PARAMETERS_ONLY_ON_META = """
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel
folder = sys.argv[1]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
with init_empty_weights(include_buffers=False):
    model = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=True)
answer = {"buffers": sorted({b.device.type for b in model.buffers()}),
          "parameters": sorted({p.device.type for p in model.parameters()})}
for module in model.modules():
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, torch.nn.Parameter(torch.empty_like(parameter.data, device="cpu")))
weights = load_file(folder + "/model.safetensors")
for name, parameter in model.named_parameters():
    parameter.data.copy_(weights["model." + name])
ids = torch.arange(40)[None]
with torch.no_grad():
    expected = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()(ids).last_hidden_state
    answer["difference"] = (model.eval()(ids).last_hidden_state - expected).abs().max().item()
"""


def test_buffers_stay_off_the_meta_device(folder):
    """vLLM's and SGLang's `init_on_device_without_buffers`, which is accelerate's: buffers must come out right."""
    pytest.importorskip("accelerate")
    built = run_isolated(PARAMETERS_ONLY_ON_META, folder)
    assert built["parameters"] == ["meta"]
    assert built["buffers"] in ([], ["cpu"])
    assert built["difference"] == 0.0


@pytest.mark.parametrize("tied", [False, True], ids=["head of its own", "tied head"])
def test_weights_are_the_base_model_s_by_name_and_shape(tmp_path, folder, facts, tied):
    """vLLM's and SGLang's weight mappers: `model.` before a name of the base model, `lm_head` outside, and no more."""
    if tied:
        folder = converted_checkpoint(tmp_path, tie_word_embeddings=True)
    saved = {name: list(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    head = saved.pop("lm_head.weight", None)
    assert head in ([TINY["vocab_size"], TINY["hidden_size"]], None)
    assert (head is None) == tied
    assert saved == {f"model.{name}": shape for name, shape in facts["base parameters"].items()}


# What loaders rewrite, drop or take for something else when it is part of a weight's name:
# transformers: gamma, beta, weight_g, weight_v; SGLang's `skip_substrs`; vLLM's `LegacyMixin`; experts of a top-k MoE.
REWRITTEN = r"gamma|beta|weight_g|weight_v|\.attn\.bias|masked_bias|position_ids|score\.bias|experts\.|shared_expert"


def test_no_weight_s_name_is_rewritten(folder, facts):
    """vLLM applies transformers' own renamings (`_create_hf_to_vllm_mapper`) and then its patterns."""
    names = list(load_file(folder / "model.safetensors"))
    assert [name for name in names if re.search(REWRITTEN, name)] == []
    children = {name.split(".")[0] for name in facts["base parameters"]}
    assert not any(re.match("|".join(children), name) for name in names)  # they would get a second `model.`
    conversion = pytest.importorskip("transformers.conversion_mapping", reason="renamings came with transformers 5")
    model = FinedeepModel(FinedeepConfig.from_pretrained(folder))
    for mapping in conversion.get_model_conversion_mapping(model):
        assert [name for name in names if mapping.rename_source_key(name)[0] != name] == []


# ---------------------------------------------------------------- the configuration


# vLLM: `ModelArchConfigConvertorBase.get_num_experts` and `..._per_token`. SGLang: `_is_moe_model`, `MoEMixin`.
TOP_K_MOE = """num_experts moe_num_experts n_routed_experts num_local_experts block_configs num_experts_per_tok
    num_experts_per_token top_k_experts moe_topk moe_top_k moe_intermediate_size n_shared_experts
    moe_num_shared_experts""".split()
# vLLM and SGLang change what is computed, or which weights are loaded, where they find one of these.
CHANGES_THE_MODEL = """final_logit_softcapping attn_logit_softcapping embed_scale embedding_size
    kv_lora_rank sliding_window num_nextn_predict_layers mtp_num_hidden_layers n_predict
    hidden_size_per_head n_head_kv num_kv_heads multi_query_group_num num_attention_groups""".split()


@pytest.mark.parametrize("name", TOP_K_MOE)
def test_config_does_not_look_like_a_top_k_moe(folder, name):
    """One such name and vLLM and SGLang take the class for mixtures of experts, which looks for `experts`."""
    assert not hasattr(FinedeepConfig.from_pretrained(folder), name)


def test_layers_are_of_one_type_where_there_is_no_window(folder):
    """vLLM gives each layer the window that its entry in `layer_types` says; one kind changes nothing."""
    assert set(FinedeepConfig.from_pretrained(folder).layer_types) == {"full_attention"}


@pytest.mark.parametrize("name", CHANGES_THE_MODEL)
def test_config_has_nothing_that_changes_the_model_in_an_engine(folder, name):
    config = FinedeepConfig.from_pretrained(folder)
    assert getattr(config, name, None) is None


def test_config_gives_the_sizes_of_attention(folder):
    """vLLM's and SGLang's `create_attention_instances` size the cache from these, and nothing in the model is asked."""
    config = FinedeepConfig.from_pretrained(folder)
    attention = FinedeepModel(config).layers[0].self_attn
    assert config.head_dim == attention.head_dim == config.hidden_size // config.num_attention_heads
    assert attention.q_proj.out_features == config.num_attention_heads * config.head_dim
    assert attention.k_proj.out_features == config.num_key_value_heads * config.head_dim


def test_rope_type_is_where_engines_read_it(folder):
    """vLLM's and SGLang's `can_enable_torch_compile` read the `rope_type`."""
    config = FinedeepConfig.from_pretrained(folder)
    rope = getattr(config, "rope_parameters", None)
    if rope is None:  # transformers 4
        assert config.rope_scaling is None
    else:
        assert rope["rope_type"] == "default"


def test_no_submodule_is_called_experts(folder):
    """vLLM's and SGLang's `MoEMixin` replace a submodule of this name by their own layer."""
    model = FinedeepModel(FinedeepConfig.from_pretrained(folder))
    assert [name for name, _ in model.named_modules() if name.split(".")[-1] == "experts"] == []


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_is_the_engine_s(variant, length):
    """vLLM, "Writing custom models": kwargs from the model down to attention, which asks ALL_ATTENTION_FUNCTIONS."""
    model = random_model(**VARIANTS[variant])
    with torch.no_grad():
        expected = model.model(prompt(length)).last_hidden_state[0]
    instances = {i: CacheOfOneLayer() for i in range(LAYERS)}
    found = run_as_engine(model.model, instances, input_ids=prompt(length))
    assert_same(found, expected)
    # Each layer's attention met its own instance, once, with no mask, which is the engine's business, and with a scale.
    assert [len(instance.calls) for instance in instances.values()] == [1] * LAYERS
    assert {call for instance in instances.values() for call in instance.calls} == {(None, 8**-0.5)}


def test_positions_are_taken_as_given():
    """The engines pass `position_ids` of sequences laid end to end, so that the positions are no plain range."""
    model = random_model().model
    model.config._attn_implementation = "engine_of_these_tests"
    instances = {i: CacheOfOneLayer() for i in range(LAYERS)}
    ids = prompt(8)

    def run(positions):
        with torch.inference_mode():
            return model(
                input_ids=ids,
                use_cache=False,
                position_ids=positions[None],
                attention_instances=instances,
                return_dict=False,
            )[0]

    plain = run(torch.arange(8))
    assert_same(run(torch.arange(8) + 5), plain)  # RoPE is relative
    assert (run(torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])) - plain).abs().max() > 1e-3


def test_embeddings_may_be_given_in_place_of_tokens():
    """vLLM's `Base.forward` and SGLang's `_run_hf_backbone`: `inputs_embeds`, with `input_ids` None."""
    model = random_model().model
    expected = run_as_engine(model, input_ids=prompt(40))
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(prompt(40))
    assert_same(run_as_engine(model, inputs_embeds=embeddings, input_ids=None), expected)


def test_input_embeddings_may_be_replaced():
    """vLLM and SGLang put a vocabulary-parallel embedding in: `set_input_embeddings`, no attribute but the output."""
    model = random_model().model
    expected = run_as_engine(model, input_ids=prompt(40))
    weight = model.get_input_embeddings().weight.detach().clone()

    class Embedding(nn.Module):
        def forward(self, ids):
            return weight[ids]

    model.set_input_embeddings(Embedding())
    assert_same(run_as_engine(model, input_ids=prompt(40)), expected)


# ---------------------------------------------------------------- layers that are replaced


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_linear_may_be_replaced(variant, length):
    """vLLM's and SGLang's `recursive_replace` put modules of their own where an `nn.Linear` stood."""
    model = random_model(**VARIANTS[variant])
    expected = run_as_engine(model.model, input_ids=prompt(length))
    replace_linears(model.model)
    assert not any(isinstance(module, nn.Linear) for module in model.model.modules())
    assert_same(run_as_engine(model.model, input_ids=prompt(length)), expected)


@pytest.mark.parametrize("sandwich", [False, True])
def test_every_norm_may_be_replaced(sandwich):
    """vLLM's `RMSNormFuser` and SGLang's `replace_rms_norm_class` know a norm by its one input, `weight` and eps."""
    model = random_model(sublayer_output_norm=sandwich).model
    expected = run_as_engine(model, input_ids=prompt(40))

    class EngineNorm(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.weight, self.eps = norm.weight, norm.variance_epsilon

        def forward(self, x):
            return nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)

    norms = [name for name, module in model.named_modules() if hasattr(module, "variance_epsilon")]
    assert len(norms) == 1 + LAYERS * (1 + M * (1 + sandwich))
    for name in norms:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, EngineNorm(model.get_submodule(name)))
    assert_same(run_as_engine(model, input_ids=prompt(40)), expected)


def test_gate_and_up_are_not_made_one_by_rewriting():
    """vLLM's `GLUFuser` rewrites a `forward` that has act(gate_proj(x)) * up_proj(x); the gates need both apart."""
    source = inspect.getsource(FinedeepSublayer.forward)
    assert "act_fn" not in source


@pytest.mark.parametrize("first", LENGTHS[1:])
def test_one_graph_without_guards_serves_every_length(first):
    """vLLM's `TorchCompileWithNoGuardsWrapper`: one graph, traced at one length, its guards dropped, run at all others.

    Which form of a sub-layer the trace has chosen is then used at every length. Both are the same function.
    """
    model = random_model().model
    expected = {length: run_as_engine(model, input_ids=prompt(length)) for length in LENGTHS}
    replace_linears(model)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def no_guards(guards):
        return [False] * len(guards)

    instances = {i: CacheOfOneLayer() for i in range(LAYERS)}
    torch._dynamo.reset()
    forward = torch.compile(
        model.forward, fullgraph=True, dynamic=False, backend=backend, options={"guard_filter_fn": no_guards}
    )

    def run(length):
        ids, positions = prompt(length), torch.arange(length)[None]
        if not graphs:
            torch._dynamo.mark_dynamic(ids, 1)
            torch._dynamo.mark_dynamic(positions, 1)
        with torch.no_grad():
            return forward(
                input_ids=ids,
                use_cache=False,
                position_ids=positions,
                attention_instances=instances,
                return_dict=False,
            )[0][0]

    for length in sorted(LENGTHS, key=lambda length: length != first):
        assert_same(run(length), expected[length])
    assert len(graphs) == 1


# ---------------------------------------------------------------- parallelism


# SGLang's `_normalize_tp_style` raises for any other style, on one GPU too; vLLM silently replicates.
STYLES = {"colwise", "colwise_rep", "rowwise", "rowwise_rep", "replicate"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_rule_of_the_tensor_parallel_plan_matches_and_is_understood(variant):
    """vLLM and transformers: `base_model_tp_plan`, patterns of names to "colwise" or "rowwise".

    The engines act on `nn.Linear` modules alone, by `re.match` of the first pattern that matches.
    """
    model = random_model(**VARIANTS[variant]).model
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    plan = model.config.base_model_tp_plan
    assert [rule for rule in plan if not any(re.match(rule, name) for name in names)] == []
    assert set(plan.values()) <= STYLES
    attention = {rule: style for rule, style in plan.items() if ".self_attn." in rule}
    llama = {rule: style for rule, style in LlamaConfig().base_model_tp_plan.items() if ".self_attn." in rule}
    assert attention == llama


class Sharded(EngineLinear):
    """Rank 0's part of a linear layer of which two processes hold a half each, without the reduction."""

    def __init__(self, linear, dim):
        super().__init__(
            linear.weight.chunk(2, dim)[0], None if dim or linear.bias is None else linear.bias.chunk(2)[0]
        )


@pytest.mark.parametrize("down", ["row-wise", "replicated"])
@pytest.mark.parametrize("experts", [2, 4], ids=lambda experts: f"K={experts}")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sublayer_cut_by_an_engine_refuses_to_run(variant, experts, down):
    """vLLM's `GLUFuser` cuts gate and up over the processes whether a plan asks for it or not; routers it leaves whole.

    The experts that are left then have more routers than experts, which must not go unnoticed: refusing is right.
    """
    model = random_model(num_experts_per_sublayer=experts, **VARIANTS[variant])
    sublayer = model.model.layers[0].sublayers[0]
    sublayer.gate_proj, sublayer.up_proj = Sharded(sublayer.gate_proj, 0), Sharded(sublayer.up_proj, 0)
    if down == "row-wise":
        sublayer.down_proj = Sharded(sublayer.down_proj, 1)
    else:
        sublayer.down_proj = EngineLinear(sublayer.down_proj.weight)
    for length in LENGTHS:
        with torch.inference_mode(), pytest.raises((NotImplementedError, RuntimeError)):
            sublayer(torch.randn(1, length, TINY["hidden_size"]))


def test_pipeline_plan_names_the_parts_in_order_around_one_list():
    """vLLM's and SGLang's `pipeline_parallel`: direct children by name, among them one ModuleList of all layers."""
    model = random_model().model
    plan = model.config.base_model_pp_plan
    children = dict(model.named_children())
    assert list(plan) == [name for name, child in children.items() if next(child.parameters(), None) is not None]
    lists = [name for name, child in children.items() if isinstance(child, nn.ModuleList)]
    assert lists == ["layers"]
    assert len(model.layers) == model.config.num_hidden_layers
    parameters = set(inspect.signature(FinedeepModel.forward).parameters)
    assert set(plan["embed_tokens"][0]) <= parameters


@pytest.mark.parametrize(("sublayers", "found"), [(2, ["layers"]), (3, ["layers", "sublayers"])])
def test_which_lists_are_as_long_as_the_model_is_deep(sublayers, found):
    """vLLM's `_recursive_replace` takes a ModuleList of `num_hidden_layers` entries for the list of layers.

    It reads the names of layers from it for EAGLE-3 draft models and nothing else. With as many sub-layers as layers
    (no model of real size) it would note sub-layers, so that EAGLE-3 alone would be wrong.
    """
    model = random_model(num_expert_sublayers=sublayers, intermediate_size=6 * sublayers * K).model
    lists = {
        name.split(".")[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == LAYERS
    }
    assert sorted(lists) == found


@pytest.mark.parametrize("split", [1, 2])
def test_two_stages_are_the_whole_model(split):
    """vLLM's and SGLang's pipeline stages: missing layers pass their input on, hidden states come as embeddings."""
    if "decoder_layer.attention_type" in inspect.getsource(Qwen3Model):
        pytest.skip("this version's Qwen3Model asks missing layers for their attention_type, dense or not")
    expected = run_as_engine(random_model().model, input_ids=prompt(40))
    first, last = random_model().model, random_model().model
    for i in range(LAYERS):
        (last if i < split else first).layers[i] = MissingLayer()
    first.norm, last.embed_tokens = MissingLayer(), MissingLayer()
    hidden = run_as_engine(first, input_ids=prompt(40))
    assert_same(run_as_engine(last, inputs_embeds=hidden[None], input_ids=None), expected)


# ---------------------------------------------------------------- the engines themselves


NO_GPU = "engines on a GPU; none is here (tests/serving has vLLM on a CPU)"
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)

TRANSFORMERS_TOKENS = """
import torch
from transformers import AutoModelForCausalLM
folder, prompts, device = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).to(device).eval()
answer = []
for ids in prompts:
    out = model.generate(torch.tensor([ids], device=device), max_new_tokens=16, do_sample=False, eos_token_id=None,
                         return_dict_in_generate=True, output_logits=True)
    best = torch.cat(out.logits).topk(2).values
    answer.append([out.sequences[0, len(ids):].tolist(), (best[:, 0] - best[:, 1]).tolist()])
"""

VLLM_TOKENS = """
import vllm
folder, prompts, eager = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] == "eager"
engine = vllm.LLM(model=folder, model_impl="transformers", trust_remote_code=True, dtype="float32", max_model_len=256,
                  enforce_eager=eager, gpu_memory_utilization=0.3)
sampling = vllm.SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
answer = [list(output.outputs[0].token_ids) for output in outputs]
del engine
"""

SGLANG_TOKENS = """
import sglang
folder, prompts, eager = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] == "eager"
engine = sglang.Engine(model_path=folder, model_impl="transformers", trust_remote_code=True, dtype="float32",
                       context_length=256, disable_cuda_graph=eager, mem_fraction_static=0.3,
                       attention_backend="triton")
sampling = {"temperature": 0.0, "max_new_tokens": 16, "ignore_eos": True}
answer = [output["output_ids"] for output in engine.generate(input_ids=prompts, sampling_params=sampling)]
engine.shutdown()
"""

PROMPTS = json.dumps([prompt(length)[0].tolist() for length in (1, 2, 3, 5, 8, 40, 100, 200)])


def sure(expected, margin=0.02):
    """Tokens up to the first of which another kernel's rounding might make another one."""
    return [tokens[: next((i for i, gap in enumerate(gaps) if gap < margin), len(gaps))] for tokens, gaps in expected]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A model with heads of 64, which every attention kernel knows, and the tokens that transformers gives for it."""
    shape = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512}
    folder = converted_checkpoint(tmp_path_factory.mktemp("served"), **shape)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return folder, sure(run_isolated(TRANSFORMERS_TOKENS, folder, PROMPTS, device))


@pytest.mark.slow
def test_what_engines_are_compared_with_is_worth_comparing(served):
    _, expected = served
    assert sum(map(len, expected)) > 20
    assert len({tuple(tokens) for tokens in expected}) == len(expected)


@NEEDS_GPU
@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_engine_gives_the_tokens_that_transformers_gives(request, engine, mode):
    pytest.importorskip(engine)
    folder, expected = request.getfixturevalue("served")
    script = {"vllm": VLLM_TOKENS, "sglang": SGLANG_TOKENS}[engine]
    found = run_isolated(script, folder, PROMPTS, mode, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert [tokens[: len(sure)] for tokens, sure in zip(found, expected, strict=True)] == expected
