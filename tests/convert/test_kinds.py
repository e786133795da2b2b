"""What is no dense causal language model, and what its config says that is nothing to a conversion: plain words."""

import json
import shutil

import pytest
import torch
from finedeep.convert import ConversionError, convert_checkpoint
from finedeep_cli import main
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, LlamaModel


def changed(dense, place, change):
    """A copy whose tensors `change` has changed in place."""
    folder = shutil.copytree(dense, place)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_adapter_is_named_as_such(tmp_path, dense, capsys):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(dense), LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    assert main(["convert", str(tmp_path / "adapter"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "holds a PEFT adapter, not a model. Merge it into its base first" in said
    assert str(dense) in said


def test_a_base_model_without_its_prefix(tmp_path, dense):
    LlamaModel.from_pretrained(dense).save_pretrained(tmp_path / "base")
    with pytest.raises(ConversionError, match=r"without the prefix 'model\.' \(embed_tokens\.weight\)"):
        convert_checkpoint(tmp_path / "base", tmp_path / "out", progress=False)


def test_a_classifier(tmp_path, dense):
    LlamaForSequenceClassification.from_pretrained(dense).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ConversionError, match=r"holds score\.weight: it is a classifier or a reward model"):
        convert_checkpoint(tmp_path / "classifier", tmp_path / "out", progress=False)


def test_a_value_head(tmp_path, dense):
    folder = changed(dense, tmp_path / "policy", lambda t: t.update({"v_head.summary.weight": torch.zeros(1, 32)}))
    with pytest.raises(ConversionError, match=r"v_head\.summary\.weight: it is a policy with a value head") as error:
        convert_checkpoint(folder, tmp_path / "out", progress=False)
    assert "biases" not in str(error.value)


@pytest.mark.parametrize(("name", "biases"), [("model.layers.0.self_attn.q_proj.bias", True), ("extra.weight", False)])
def test_only_of_biases_it_is_said_that_they_may_be_such(tmp_path, dense, name, biases):
    folder = changed(dense, tmp_path / "odd", lambda t: t.update({name: torch.zeros(32)}))
    with pytest.raises(ConversionError, match=f"holds {name}") as error:
        convert_checkpoint(folder, tmp_path / "out", progress=False)
    assert ("attention_bias or mlp_bias is missing" in str(error.value)) == biases


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
def test_an_attention_that_is_not_installed_here_is_no_matter(tmp_path, dense, field):
    folder = shutil.copytree(dense, tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text()) | {field: "flash_attention_2"}
    (folder / "config.json").write_text(json.dumps(config))
    quick = {"calibration_tokens": 1024, "calibration_steps": 0}
    convert_checkpoint(folder, tmp_path / "out", progress=False, calibrate="self", **quick)
    assert field not in json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_expert_sublayers": 0}, "num_expert_sublayers=0 is not a whole number of at least 1"),
        ({"num_experts_per_sublayer": 0}, "num_experts_per_sublayer=0 is not a whole number of at least 1"),
        ({"num_expert_sublayers": 1.5}, r"num_expert_sublayers=1\.5 is not a whole number"),
        ({"seed": 2**64}, f"seed={2**64} is not a whole number from 0 to {2**64 - 1}"),
        ({"seed": 0.5}, r"seed=0\.5 is not a whole number"),
        ({"seed": -1}, "seed=-1 is not a whole number"),
    ],
)
def test_numbers_that_cannot_be(tmp_path, dense, options, said):
    with pytest.raises(ConversionError, match=said):
        convert_checkpoint(dense, tmp_path / "out", progress=False, **options)


def test_the_largest_seed(tmp_path, dense):
    convert_checkpoint(dense, tmp_path / "out", progress=False, assignment="random", seed=2**64 - 1)


def test_a_folder_has_no_revision(tmp_path, dense, capsys):
    assert main(["convert", str(dense), str(tmp_path / "out"), "--revision", "v2"]) == 2
    assert "has no revisions; leave --revision v2 out" in capsys.readouterr().err
