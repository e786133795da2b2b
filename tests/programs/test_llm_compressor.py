"""llm-compressor, with which models are quantised for vLLM: every recipe costs M=1 what it costs the dense model."""

import sys
from pathlib import Path

import pytest
import torch
from three_models import load, loss_of, same, token_ids

pytest_plugins = "three_models"
pytest.importorskip("llmcompressor")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from llm_compressor import ON_ACCELERATORS, RECIPES, compressed, smoothed  # noqa: E402


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_costs_what_it_costs_the_dense_model_and_loads_again(folders, recipe, tmp_path):
    if recipe in ON_ACCELERATORS and not torch.accelerator.is_available():
        pytest.skip("llm-compressor runs this on accelerators only")
    losses, again = {}, {}
    for name, folder in folders.items():
        losses[name] = loss_of(compressed(folder, RECIPES[recipe], token_ids(rows=16), tmp_path / name))
        model = load(tmp_path / name)
        again[name] = loss_of(model)
        new = model.generate(token_ids(rows=1), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=258)
        assert new.shape[1] == token_ids(rows=1).shape[1] + 4
    print(recipe, losses, again)
    assert losses["dense"] != loss_of(load(folders["dense"]))  # it did something
    same(losses, 1e-4)
    assert again == pytest.approx(losses, rel=1e-3)


def test_smoothing_alone_changes_no_logit(folders):
    """What is moved out of a norm arrives in the layers that read it, scores included."""
    for folder in folders.values():
        model = compressed(folder, lambda config: [smoothed(config)], token_ids(rows=16))
        plain = load(folder)
        norms = [name for name, module in plain.named_modules() if name.endswith(("layernorm", ".norm"))]
        norms = [name for name in norms if name != "model.norm"]
        moved = [not torch.equal(model.get_submodule(name).weight, plain.get_submodule(name).weight) for name in norms]
        assert all(moved), (norms, moved)
        assert loss_of(model) == pytest.approx(loss_of(plain), rel=1e-5)
