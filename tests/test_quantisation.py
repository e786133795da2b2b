"""Quantised loading: the FFN's down projections take part, size and loss behave as Llama's under the same recipe."""

import math
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import TINY
from finedeep import FinedeepConfig, FinedeepForCausalLM
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import quantisation

# Wide enough for norms and routers to weigh little, as in real models: they stay in full precision.
SHAPE = {**TINY, "hidden_size": 256, "intermediate_size": 1024, "tie_word_embeddings": False}
LIBRARY = {
    "torchao int8 weight-only": "torchao",
    "bitsandbytes int8": "bitsandbytes",
    "bitsandbytes nf4": "bitsandbytes",
}
QUANTISED = {
    "torchao int8 weight-only": lambda down: hasattr(down.weight, "__tensor_flatten__"),
    "bitsandbytes int8": lambda down: type(down).__name__ == "Linear8bitLt",
    "bitsandbytes nf4": lambda down: type(down).__name__ == "Linear4bit",
    "torch dynamic int8": lambda down: isinstance(down, torch.ao.nn.quantized.dynamic.Linear),
}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Llama, and a Finedeep with the same FFN sizes and routers that are not zero."""
    root = tmp_path_factory.mktemp("quantisation")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(root / "llama")
    finedeep = FinedeepForCausalLM(FinedeepConfig(**SHAPE, num_expert_sublayers=2, num_experts_per_sublayer=4))
    for layer in finedeep.model.layers:
        for sublayer in layer.sublayers:
            torch.nn.init.normal_(sublayer.router, std=0.3)
    finedeep.save_pretrained(root / "finedeep")
    return root


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 256, (4, 60), generator=torch.Generator().manual_seed(0))


def load(recipe, folder):
    pytest.importorskip(LIBRARY.get(recipe, "torch"))
    return quantisation.RECIPES[recipe](str(folder))


@pytest.mark.parametrize("recipe", QUANTISED)
def test_down_projections_are_quantised_and_sizes_follow_llama(folders, recipe):
    sizes = {}
    for name in ("llama", "finedeep"):
        whole = quantisation.model_bytes(quantisation.full_precision(str(folders / name)))
        model = load(recipe, folders / name)
        sizes[name] = quantisation.model_bytes(model) / whole
    for layer in model.model.layers:
        assert all(QUANTISED[recipe](sublayer.down_proj) for sublayer in layer.sublayers)
    assert sizes["finedeep"] == pytest.approx(sizes["llama"], rel=0.03)


@pytest.mark.parametrize("recipe", QUANTISED)
@torch.no_grad()
def test_it_computes_what_the_dequantised_weights_compute(folders, ids, recipe):
    """Each linear layer's matrix, had by calling it, put into the full-precision model: scores included."""
    model = load(recipe, folders / "finedeep")
    plain = quantisation.full_precision(str(folders / "finedeep"))
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            stored = model.get_submodule(name)
            module.weight.copy_(stored(torch.eye(module.in_features)).T)
    if recipe == "torch dynamic int8":
        plain.lm_head.weight.copy_(model.lm_head(torch.eye(SHAPE["hidden_size"])).T)
    rounds_activations = recipe in ("bitsandbytes int8", "torch dynamic int8")
    for x in (ids[:1, :4], ids):
        expected = plain(x).logits
        difference = (model(x).logits - expected).abs().max() / expected.abs().max()
        assert difference < (0.1 if rounds_activations else 2e-2)


@pytest.mark.parametrize("recipe", [name for name in QUANTISED if name in LIBRARY])
@torch.no_grad()
def test_a_quantised_model_is_saved_and_loaded(tmp_path, folders, ids, recipe):
    if recipe.startswith("torchao") and transformers.__version__ < "5":
        pytest.skip("transformers 4 saves torchao's tensors by pickle only")
    model = load(recipe, folders / "finedeep").eval()
    before = model(ids, labels=ids).loss.item()
    assert math.isfinite(before)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert QUANTISED[recipe](again.model.layers[0].sublayers[1].down_proj)
    assert again(ids, labels=ids).loss.item() == pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("recipe", QUANTISED)
def test_the_real_checkpoint_loses_what_the_dense_one_loses(stories260k, data, tmp_path, recipe):
    """M=1 is the same function with the same weights, so that rounding costs it the same: within 0.01 nats."""
    from finedeep.convert import convert_checkpoint
    from measure import mean_loss, text_windows

    windows = text_windows(stories260k, data / "text" / "tinystories.txt")[:4]
    out = convert_checkpoint(stories260k, tmp_path / "out", num_expert_sublayers=1, num_experts_per_sublayer=4).folder
    losses = [mean_loss(load(recipe, folder), windows) for folder in (stories260k, out)]
    assert losses[1] == pytest.approx(losses[0], abs=0.01)
