"""llm-compressor, with which models are quantised for vLLM: every recipe costs M=1 what it costs the dense model."""

import pytest
import torch
from three_models import load, loss_of, same, token_ids

pytest_plugins = "three_models"
llmcompressor = pytest.importorskip("llmcompressor")

from datasets import Dataset  # noqa: E402
from finedeep.convert.quantiser_mappings import mappings_of  # noqa: E402
from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: E402
from llmcompressor.modifiers.pruning import SparseGPTModifier  # noqa: E402
from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: E402
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier  # noqa: E402
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier  # noqa: E402
from transformers import AutoConfig  # noqa: E402

ALL = {"targets": "Linear", "ignore": ["lm_head"]}
W4A16 = {"config_groups": {"group": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 64}}}}


def smoothed(config):
    """SmoothQuant, by the mappings that it knows for Llama or that the package has for Finedeep."""
    if config.model_type == "llama":
        return SmoothQuantModifier(smoothing_strength=0.5)
    pairs = mappings_of(config, norms_only=True)
    return SmoothQuantModifier(smoothing_strength=0.5, mappings=[(balanced, layer) for layer, balanced in pairs])


def balanced(config):
    """AWQ, likewise."""
    if config.model_type == "llama":
        return AWQModifier()
    return AWQModifier(mappings=[AWQMapping(layer, readers) for layer, readers in mappings_of(config)])


RECIPES = {
    "round to nearest, int8": lambda config: [QuantizationModifier(**ALL, scheme="W8A8")],
    "FP8, dynamic activations": lambda config: [QuantizationModifier(**ALL, scheme="FP8_DYNAMIC")],
    "GPTQ W4A16": lambda config: [GPTQModifier(**W4A16, ignore=["lm_head"])],
    "SparseGPT 2:4": lambda config: [
        SparseGPTModifier(targets=[r"re:model\.layers\.\d+$"], sparsity=0.5, mask_structure="2:4")
    ],
    "SmoothQuant alone": lambda config: [smoothed(config)],
    "AWQ W4A16": lambda config: [balanced(config), QuantizationModifier(**W4A16, ignore=["lm_head"])],
    "SmoothQuant, int8": lambda config: [smoothed(config), QuantizationModifier(**ALL, scheme="W8A8")],
}
RELOADED = ("round to nearest, int8", "FP8, dynamic activations", "GPTQ W4A16")


def compressed(folder, recipe, output):
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in token_ids(rows=16)]
    calibrates = "round" not in recipe and "FP8" not in recipe
    return llmcompressor.oneshot(
        model=str(folder),
        trust_remote_code_model=True,
        recipe=RECIPES[recipe](AutoConfig.from_pretrained(folder, trust_remote_code=True)),
        output_dir=str(output) if output else None,
        **({"dataset": Dataset.from_list(rows), "num_calibration_samples": 16} if calibrates else {}),
    ).eval()


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "SmoothQuant alone"])
def test_a_recipe_costs_what_it_costs_the_dense_model(folders, recipe, tmp_path):
    keep = recipe in RELOADED
    losses, again = {}, {}
    for name, folder in folders.items():
        losses[name] = loss_of(compressed(folder, recipe, tmp_path / name if keep else None))
        if keep:
            model = load(tmp_path / name)
            again[name] = loss_of(model)
            new = model.generate(token_ids(rows=1), max_new_tokens=4, do_sample=False, pad_token_id=258)
            assert new.shape[1] == token_ids(rows=1).shape[1] + 4
    whole = {name: loss_of(load(folder)) for name, folder in folders.items()}
    print(recipe, {name: (round(whole[name], 4), round(losses[name], 4)) for name in folders}, again)
    assert losses["dense"] != whole["dense"]  # it did something
    same(losses, 1e-4)
    if keep:
        assert again == pytest.approx(losses, rel=1e-3)


def test_smoothing_alone_changes_no_logit(folders):
    """What is moved out of a norm arrives in the layers that read it, scores included."""
    for folder in folders.values():
        model, plain = compressed(folder, "SmoothQuant alone", None), load(folder)
        norms = [name for name, module in plain.named_modules() if name.endswith(("layernorm", "sublayers.0.norm"))]
        moved = [not torch.equal(model.get_submodule(name).weight, plain.get_submodule(name).weight) for name in norms]
        assert all(moved), (norms, moved)
        assert loss_of(model) == pytest.approx(loss_of(plain), rel=1e-5)
