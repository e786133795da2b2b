"""Generation: with M = 1 a Finedeep model writes what its dense Llama writes, by every strategy."""

import copy
import gc

import pytest
import torch
from conftest import CACHE, TINY
from finedeep import FinedeepConfig, FinedeepForCausalLM
from finedeep import operators_finedeep as operators
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM

SHAPE = {**TINY, "intermediate_size": 48, "tie_word_embeddings": False}
NEW = 12
STRATEGIES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.3},
    "beam search": {"num_beams": 4},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "several sequences": {"num_beams": 4, "num_return_sequences": 3},
    "static cache": {"cache_implementation": "static"},
    "dynamic cache": {"cache_implementation": "dynamic"},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "repetition penalty": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "minimum length": {"min_new_tokens": 10},
}
ONE_AT_A_TIME = ("prompt lookup",)  # transformers speculates for one sequence only


def randomised(model, std=0.3):
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.02 if "norm" in name else std)
        if "norm" in name:
            parameter.data += 1
    return model.eval()


@pytest.fixture(scope="module")
def pair():
    """A dense Llama and its exact Finedeep form, K = 4, whose gates are all 1."""
    dense = randomised(LlamaForCausalLM(LlamaConfig(**SHAPE)))
    model = FinedeepForCausalLM(FinedeepConfig(**SHAPE, num_expert_sublayers=1, num_experts_per_sublayer=4)).eval()
    state = dense.state_dict()
    for name, parameter in model.state_dict().items():
        source = name.replace("sublayers.0.norm", "post_attention_layernorm").replace("sublayers.0.", "mlp.")
        parameter.copy_(state[source] if source in state else torch.zeros_like(parameter))
    return dense, model


@pytest.fixture
def prompts():
    """Two prompts of 45 and 40 tokens, the second padded on the left."""
    ids = torch.randint(0, 200, (2, 45), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[1, :5], mask[1, :5] = TINY["pad_token_id"], 0
    return ids, mask


def written(model, ids, mask, **options):
    torch.manual_seed(0)
    settings = GenerationConfig(max_new_tokens=NEW, pad_token_id=TINY["pad_token_id"], eos_token_id=None, **options)
    return model.generate(ids, attention_mask=mask, generation_config=settings)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_writes_what_the_dense_model_writes(pair, prompts, strategy):
    ids, mask = prompts if strategy not in ONE_AT_A_TIME else (x[:1] for x in prompts)
    dense, model = (written(model, ids, mask, **STRATEGIES[strategy]) for model in pair)
    assert torch.equal(dense, model)


def test_assisted_decoding_changes_nothing(pair, prompts):
    """A smaller Finedeep model drafts, a Finedeep model with M = 2 decides: greedy text as without help."""
    draft = FinedeepForCausalLM(FinedeepConfig(**{**SHAPE, "num_hidden_layers": 1}))
    model = FinedeepForCausalLM(FinedeepConfig(**SHAPE))
    draft, model = randomised(draft), randomised(model)
    ids, mask = prompts[0][:1], prompts[1][:1]
    alone = written(model, ids, mask)
    torch.manual_seed(0)
    settings = GenerationConfig(max_new_tokens=NEW, pad_token_id=TINY["pad_token_id"], eos_token_id=None)
    helped = model.generate(ids, attention_mask=mask, generation_config=settings, assistant_model=draft)
    assert torch.equal(alone, helped)


@pytest.mark.parametrize("M", [1, 2])
def test_generation_from_embeddings(M, prompts):
    model = randomised(FinedeepForCausalLM(FinedeepConfig(**{**SHAPE, "num_expert_sublayers": M})))
    ids, mask = prompts
    settings = GenerationConfig(max_new_tokens=NEW, pad_token_id=TINY["pad_token_id"], eos_token_id=None)
    embeds = model.get_input_embeddings()(ids)
    found = model.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=settings)
    assert torch.equal(found[:, -NEW:], written(model, ids, mask)[:, -NEW:])


@pytest.mark.parametrize("routing", [{}, {"routing_input": "hidden_state", "routing_function": "softmax"}], ids=str)
def test_cached_and_padded_logits_are_those_of_the_whole_text(prompts, routing):
    """Token by token over a cache (the per-expert form) and at once (one GEMM), alone and beside a longer text."""
    model = randomised(FinedeepForCausalLM(FinedeepConfig(**SHAPE, sublayer_output_norm=True, **routing)))
    ids, mask = prompts
    alone = ids[1:, 5:]
    with torch.no_grad():
        whole = model(alone).logits
        padded = model(ids, attention_mask=mask).logits[1:, 5:]
        cache, steps = None, []
        for t in range(alone.shape[1]):
            out = model(alone[:, t : t + 1], **{CACHE: cache}, use_cache=True)
            cache = out[CACHE]
            steps.append(out.logits)
    torch.testing.assert_close(padded, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_compiled_generation_with_a_static_cache(prompts):
    model = randomised(FinedeepForCausalLM(FinedeepConfig(**SHAPE)))
    ids, mask = prompts
    expected = written(model, ids, mask)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert torch.equal(written(model, ids, mask, cache_implementation="static"), expected)


@pytest.fixture
def alive():
    """A model whose gates differ by token."""
    config = FinedeepConfig(**SHAPE, num_expert_sublayers=2, num_experts_per_sublayer=4)
    return randomised(FinedeepForCausalLM(config))


@pytest.fixture
def made(monkeypatch):
    """The weights of which score vectors were made, a call each."""
    calls, original = [], operators.score_vectors
    monkeypatch.setattr(operators, "score_vectors", lambda W, w: calls.append(W) or original(W, w))
    return calls


def test_score_vectors_are_made_once_for_a_generation(alive, prompts, made):
    """Or W_down would be read twice for each token; and they go with the cache that they were made for."""
    ids, mask = prompts
    before = len(operators.VECTORS)
    found = written(alive, ids[:1], mask[:1])
    assert len(made) == alive.config.num_hidden_layers * 2
    gc.collect()
    assert len(operators.VECTORS) == before
    made.clear()
    assert torch.equal(found, written(alive, ids[:1], mask[:1], use_cache=False))
    assert torch.equal(found, written(alive, ids[:1], mask[:1], cache_implementation="static"))


@pytest.mark.parametrize("way", ["optimiser", "assignment", "another", "router", "down_proj", "load_state_dict"])
def test_score_vectors_follow_weights_that_change_under_a_cache(alive, prompts, way):
    """The gates of a further token are those that the definition gives with the weights as they are then."""
    ids, sublayer = prompts[0][:1], alive.model.layers[0].sublayers[0]
    sublayer.down_proj.weight = torch.nn.Parameter(sublayer.down_proj.weight.data)  # nothing has written to it yet
    with torch.no_grad():
        cache = alive(ids, use_cache=True)[CACHE]
        h = torch.randn(1, 1, SHAPE["hidden_size"])
        sublayer(h, cache)
    if way == "optimiser":
        sublayer(h)[0].sum().backward()
        torch.optim.SGD(sublayer.parameters(), lr=1.0).step()
    elif way == "assignment":
        sublayer.down_proj.weight = torch.nn.Parameter(torch.randn_like(sublayer.down_proj.weight))
    elif way == "another":  # at the address of the one before, whose version it has, too
        address = sublayer.down_proj.weight.data_ptr()
        sublayer.down_proj.weight = torch.nn.Parameter(sublayer.down_proj.weight.data)
        sublayer.down_proj.weight.data.neg_()
        assert sublayer.down_proj.weight.data_ptr() == address
    elif way == "router":
        torch.nn.init.normal_(sublayer.router)
    elif way == "down_proj":
        torch.nn.init.normal_(sublayer.down_proj.weight)
    else:
        sublayer.load_state_dict({name: tensor * 2 for name, tensor in sublayer.state_dict().items()})
    with torch.no_grad():
        (found, gates), (expected, wanted) = sublayer(h, cache), sublayer(h)
    torch.testing.assert_close(gates, wanted)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["static cache", "gradients", "inference tensors"])
def test_score_vectors_are_not_kept_where_they_could_be_stale(alive, prompts, made, case):
    ids, layers = prompts[0][:1], alive.config.num_hidden_layers * 2
    if case == "static cache":
        generate = {"cache_implementation": "static", "disable_compile": True}
        written(alive, torch.randint(0, 200, (1, 45)), torch.ones(1, 45), **generate)
        assert len(made) == layers  # of the prompt; further tokens go by the definition
    elif case == "gradients":
        cache = alive(ids, use_cache=True)[CACHE]
        alive(torch.randint(0, 200, (1, 45)), **{CACHE: cache})
        assert len(made) == 2 * layers
    else:
        with torch.inference_mode():
            model = copy.deepcopy(alive)
            cache = model(ids, use_cache=True)[CACHE]
            model(ids[:, :1], **{CACHE: cache})
        assert len(made) == 2 * layers


@torch.no_grad()
def test_score_vectors_that_autocast_has_rounded_are_for_autocast(alive, prompts):
    sublayer, h = alive.model.layers[0].sublayers[0], torch.randn(1, 1, SHAPE["hidden_size"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = alive(prompts[0][:1], use_cache=True)[CACHE]
    assert torch.equal(sublayer(h, cache)[1], sublayer(h, DynamicCache())[1])


def test_a_functional_transform_has_score_vectors_of_its_own(alive):
    """As when an ensemble's weights are stacked: none of them may be kept for another."""
    sublayer, cache, h = alive.model.layers[0].sublayers[0], DynamicCache(), torch.randn(1, 1, SHAPE["hidden_size"])
    stacked = {name: torch.stack([p, p * 1.5]) for name, p in sublayer.state_dict().items()}
    with torch.no_grad():
        found = torch.func.vmap(lambda some: torch.func.functional_call(sublayer, some, (h, cache))[0])(stacked)
        for i in range(2):
            alone = {name: tensor[i] for name, tensor in stacked.items()}
            expected = torch.func.functional_call(sublayer, alone, (h,))[0]
            torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-4)
