"""Back to the dense model: equal tensors, or a refusal."""

import json

import pytest
import torch
from conftest import make_dense, random_model
from finedeep import FinedeepForSequenceClassification, FinedeepModel
from finedeep.convert import ConversionError, convert_checkpoint, export_checkpoint
from finedeep.convert.families import FAMILIES
from finedeep.convert.receipt import NEURONS, RECEIPT
from finedeep_cli import main
from forked import run_command
from hub_server import running_hub
from safetensors.torch import load_file, save_file
from test_families import CASES, make_family
from transformers import AutoModelForCausalLM, AutoTokenizer


def there_and_back(dense, tmp_path, keep_receipt=True, **options):
    options = {"num_expert_sublayers": 1, "num_experts_per_sublayer": 8, "progress": False, **options}
    convert_checkpoint(dense, tmp_path / "there", **options)
    if not keep_receipt:
        (tmp_path / "there" / RECEIPT).unlink()
    return export_checkpoint(tmp_path / "there", tmp_path / "back", progress=False)


def tensors(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_equal_tensors(folder, expected):
    found, expected = tensors(folder), tensors(expected)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def assert_same_function(folder, expected):
    models = [AutoModelForCausalLM.from_pretrained(place).eval() for place in (folder, expected)]
    ids = torch.arange(40)[None]
    with torch.no_grad():
        found, wanted = (model(ids).logits for model in models)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert type(models[0]) is type(models[1])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_comes_back(tmp_path, model_type):
    make_family(tmp_path / "dense", model_type, next(c for f, c in CASES.values() if f == model_type))
    assert_equal_tensors(there_and_back(tmp_path / "dense", tmp_path), tmp_path / "dense")
    assert_same_function(tmp_path / "back", tmp_path / "dense")
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["model_type"] == model_type
    assert AutoTokenizer.from_pretrained(tmp_path / "back")("as ever")["input_ids"]
    assert not list((tmp_path / "back").glob("*.py"))


@pytest.mark.parametrize("assignment", ["strided", "random", "clusters"])
def test_neurons_go_back_to_where_they_were(tmp_path, dense, assignment):
    assert_equal_tensors(there_and_back(dense, tmp_path, assignment=assignment, seed=3), dense)


def test_shards_biases_and_half_precision(tmp_path):
    dense = make_dense(tmp_path / "dense", dtype=torch.bfloat16, attention_bias=True, mlp_bias=True)
    there_and_back(dense, tmp_path, num_experts_per_sublayer=4)  # a power of two: the shared bias is exact
    assert_equal_tensors(tmp_path / "back", dense)
    export_checkpoint(tmp_path / "there", tmp_path / "shards", max_shard_size="20KB", progress=False)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert_equal_tensors(tmp_path / "shards", dense)


def test_without_a_receipt_a_llama_of_the_same_function(tmp_path, dense):
    there_and_back(dense, tmp_path, keep_receipt=False, assignment="random")
    assert_same_function(tmp_path / "back", dense)


def change_padding(folder, *names):
    """As an adapter does that is merged into the folder: of the four padding neurons of a layer, all get weights."""
    found = tensors(folder)
    for i in range(2):
        silent = ~found[f"model.layers.{i}.sublayers.0.down_proj.weight"].any(0)
        assert silent.sum() == 4
        for name in names:
            weight = found[f"model.layers.{i}.sublayers.0.{name}.weight"]
            weight = weight.T if name == "down_proj" else weight
            weight[silent] = torch.randn(4, 32, generator=torch.Generator().manual_seed(i))
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changed", "width"), [(["gate_proj", "up_proj"], 44), (["down_proj"], 48), (["up_proj", "down_proj"], 48)], ids=str
)
@pytest.mark.parametrize("assignment", ["contiguous", "clusters"])
@pytest.mark.filterwarnings("ignore:.*padding neurons have learnt")
def test_padding_that_has_learnt_something_stays(tmp_path, dense, assignment, changed, width):
    options = {"num_expert_sublayers": 1, "num_experts_per_sublayer": 8, "assignment": assignment, "progress": False}
    convert_checkpoint(dense, tmp_path / "there", **options)
    change_padding(tmp_path / "there", *changed)
    export_checkpoint(tmp_path / "there", tmp_path / "back", progress=False)
    ids = torch.arange(40)[None]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("there", "back")]
    assert models[1].config.intermediate_size == width
    with torch.no_grad():
        torch.testing.assert_close(models[1](ids).logits, models[0](ids).logits, rtol=0, atol=1e-4)
    gates = (tensors(folder)["model.layers.1.mlp.gate_proj.weight"][:44] for folder in (tmp_path / "back", dense))
    assert torch.equal(*gates)  # where they were


def test_a_hub_id_comes_with_its_receipt(tmp_path, dense):
    """Over real HTTP: without the receipt the neurons would not be where they were."""
    convert_checkpoint(dense, tmp_path / "there", num_expert_sublayers=1, assignment="random", progress=False)
    with running_hub() as (hub, environment):
        hub.repositories["org/there"] = [{path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()}]
        environment["HF_HOME"] = str(tmp_path / "home")
        (done,) = run_command(["export", "org/there", tmp_path / "back", "--quiet"], environment)
        fetched = {path.rsplit("/", 1)[1] for _, path in hub.requests if "/resolve/" in path}
    assert done.returncode == 0, done.stderr
    assert not [name for name in fetched if name.endswith(".py")]
    assert_equal_tensors(tmp_path / "back", dense)


def resized(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(270)
    model.save_pretrained(folder)


def without_its_head(folder):
    FinedeepModel.from_pretrained(folder).save_pretrained(folder)


def as_a_classifier(folder):
    FinedeepForSequenceClassification.from_pretrained(folder).save_pretrained(folder)


def longer(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 20000.0, "rope_parameters": None}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (resized, "has vocab_size=270, and what the dense model of its finedeep_conversion.json was made into has 260"),
        (without_its_head, r"without the prefix 'model\.'.*saved from the base model"),
        (as_a_classifier, "holds score.weight"),
        (longer, r"has rope_\w+=.*20000.0.*Put it back, or remove finedeep_conversion.json"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_receipt_of_another_model(tmp_path, change, words):
    """What was changed since it was converted is not silently undone or lost."""
    dense = make_dense(tmp_path / "dense", tie_word_embeddings=True)
    convert_checkpoint(dense, tmp_path / "there", num_expert_sublayers=1, progress=False)
    change(tmp_path / "there")
    with pytest.raises(ConversionError, match=words):
        export_checkpoint(tmp_path / "there", tmp_path / "back", progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "there"}


def test_another_end_of_texts_comes_along(tmp_path, dense):
    convert_checkpoint(dense, tmp_path / "there", num_expert_sublayers=1, progress=False)
    path = tmp_path / "there/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [257, 7]}))
    export_checkpoint(tmp_path / "there", tmp_path / "back", progress=False)
    found, before = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "back", dense))
    assert found == {**before, "eos_token_id": [257, 7]}


@pytest.mark.parametrize("layers", [[], [[[[0, 0, 1]]]], "none", [[1, 2], [3]]], ids=str)
def test_a_neuron_table_that_is_none(tmp_path, dense, layers):
    convert_checkpoint(dense, tmp_path / "there", num_expert_sublayers=1, assignment="clusters", progress=False)
    (tmp_path / "there" / NEURONS).write_text(json.dumps({"layers": layers}))
    with pytest.raises(ConversionError, match="does not have each of 44 neurons once in each"):
        export_checkpoint(tmp_path / "there", tmp_path / "back", progress=False)


def saved(tmp_path, **changes):
    model = random_model(num_expert_sublayers=1, **changes)
    for layer in model.model.layers:
        layer.sublayers[0].router.data.zero_()
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def moved_router(tmp_path):
    folder = saved(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[1].sublayers[0].router.data[2, 3] = 1e-6
    model.save_pretrained(folder)
    return folder


REFUSED = {
    "two sub-layers": (lambda place: save_two(place), "num_expert_sublayers=2"),
    "routers that moved": (moved_router, "model.layers.1.sublayers.0.router"),
    "gates of another size": (lambda place: saved(place, routed_scaling_factor=1.0), "routed_scaling_factor=1.0"),
    "a norm on the output": (lambda place: saved(place, sublayer_output_norm=True), "sublayer_output_norm=True"),
    "attention that no Llama has": (lambda place: saved(place, qk_norm=True), "qk_norm=True"),
    "biases as in Qwen2": (
        lambda place: saved(place, attention_bias=True, attention_output_bias=False),
        "biases on queries",
    ),
}


def save_two(tmp_path):
    random_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_dense_model_is_refused(tmp_path, capsys, case):
    make, words = REFUSED[case]
    folder = make(tmp_path)
    assert main(["export", str(folder), str(tmp_path / "out"), "--quiet"]) == 2
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_plain_models_are_written_without_a_receipt(tmp_path):
    folder = saved(tmp_path)
    export_checkpoint(folder, tmp_path / "out", progress=False)
    ids = torch.arange(40)[None]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(ids).logits
    torch.testing.assert_close(
        found, AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits, atol=1e-4, rtol=0
    )


def test_a_dense_folder_is_refused(tmp_path, dense):
    with pytest.raises(ConversionError, match="a Finedeep checkpoint is needed"):
        export_checkpoint(dense, tmp_path / "out", progress=False)


def test_a_receipt_that_says_too_little_is_refused(tmp_path, dense):
    convert_checkpoint(dense, tmp_path / "there", num_expert_sublayers=1, progress=False)
    (tmp_path / "there" / RECEIPT).write_text("{}")
    with pytest.raises(ConversionError, match="lacks 'options'"):
        export_checkpoint(tmp_path / "there", tmp_path / "out", progress=False)
