"""The recipes of CONTRIBUTING.md, carried out."""

import json
import re
import sys

import pytest
import torch
from conftest import TINY, byte_tokenizer
from finedeep import configuration_finedeep
from finedeep.convert import convert_checkpoint
from finedeep.convert.families import FAMILIES, Family
from finedeep.eval.inspect import inspection, recorder
from finedeep_cli import main
from finedeep_files import conversion_options
from safetensors.torch import load_file
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

IDS = torch.arange(40)[None]


class OwnConfig(LlamaConfig):
    """A Llama that always has biases in attention and calls the epsilon of its norms otherwise."""

    model_type = "own"

    def __init__(self, norm_epsilon=1e-6, **kwargs):
        super().__init__(**{**kwargs, "attention_bias": True, "rms_norm_eps": norm_epsilon})
        self.norm_epsilon = norm_epsilon


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


@pytest.fixture
def own_family(tmp_path, monkeypatch):
    """A family that transformers knows and this project does not: its model, saved in `tmp_path / "own"`."""
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", dict(CONFIG_MAPPING._extra_content))
    monkeypatch.setattr(MODEL_FOR_CAUSAL_LM_MAPPING, "_extra_content", dict(MODEL_FOR_CAUSAL_LM_MAPPING._extra_content))
    AutoConfig.register("own", OwnConfig)
    AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM)
    torch.manual_seed(0)
    model = OwnForCausalLM(OwnConfig(norm_epsilon=0.1, **TINY)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "own")
    return model


@torch.no_grad()
def test_a_family_is_an_entry(tmp_path, monkeypatch, own_family):
    own = Family("Own", renamed={"rms_norm_eps": "norm_epsilon"}, always={"attention_bias": True})
    monkeypatch.setitem(FAMILIES, "own", own)
    convert_checkpoint(tmp_path / "own", tmp_path / "out", num_expert_sublayers=1, progress=False)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (made.config.rms_norm_eps, made.config.attention_bias) == (0.1, True)
    torch.testing.assert_close(made(IDS).logits, own_family(IDS).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_routing_function_is_two_entries(tmp_path, monkeypatch, dense):
    entry = configuration_finedeep.RoutingFunction(lambda s: torch.exp(s.clamp(max=2)), lambda K: 1.0)
    monkeypatch.setitem(configuration_finedeep.ROUTING_FUNCTIONS, "exp", entry)
    monkeypatch.setitem(conversion_options.ROUTING_FUNCTIONS, "exp", "an exponential")
    out = str(tmp_path / "out")
    assert main(["convert", str(dense), out, "--sublayers", "1", "--routing-function", "exp", "--quiet"]) == 0
    made = AutoModelForCausalLM.from_pretrained(out)
    before = AutoModelForCausalLM.from_pretrained(dense)(IDS).logits
    torch.testing.assert_close(made(IDS).logits, before, atol=1e-4, rtol=1e-4)
    torch.nn.init.normal_(made.model.layers[0].sublayers[0].router)
    assert (made(IDS).logits - before).abs().max() > 1e-2


def test_the_two_tables_of_routing_functions_agree():
    assert list(configuration_finedeep.ROUTING_FUNCTIONS) == list(conversion_options.ROUTING_FUNCTIONS)


@pytest.fixture
def own_assignment(tmp_path, monkeypatch):
    """A module in the current folder, as of a user who calls `finedeep` there."""
    place = tmp_path / "here"
    place.mkdir()
    order = "def by_norm(layer):\n    return layer.gate().norm(dim=1).argsort(descending=True)\n"
    (place / "own_assignment.py").write_text(f"{order}kind = 'no function'\n")
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("own_assignment", None)


def test_an_assignment_is_a_function(tmp_path, dense, own_assignment):
    arguments = ["convert", str(dense), str(tmp_path / "out"), "--sublayers", "1", "--experts", "4", "--quiet"]
    assert main([*arguments, "--assignment", "own_assignment:by_norm"]) == 0
    name = "model.layers.0.{}gate_proj.weight"
    before = load_file(dense / "model.safetensors")[name.format("mlp.")]
    after = load_file(tmp_path / "out/model.safetensors")[name.format("sublayers.0.")]
    assert torch.equal(after, before[before.norm(dim=1).argsort(descending=True)])
    assert json.loads((tmp_path / "out/finedeep_conversion.json").read_text())["options"]["assignment"] == (
        "own_assignment:by_norm"
    )
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "back"), "--quiet"]) == 0
    assert torch.equal(load_file(tmp_path / "back/model.safetensors")[name.format("mlp.")], before)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_assignment:kind", "'own_assignment:kind' is a str; name a function"),
        ("own_assignment:no_such", "cannot be imported .*no_such"),
        ("no_such_module:f", "cannot be imported .*no_such_module"),
    ],
)
def test_an_assignment_that_is_none_is_refused(tmp_path, dense, own_assignment, capsys, name, said):
    assert main(["convert", str(dense), str(tmp_path / "out"), "--assignment", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line)
    assert not (tmp_path / "out").exists()


def test_a_statistic_is_three_entries(tmp_path, monkeypatch, dense, converted):
    monkeypatch.setitem(recorder.OF_ACTIVATIONS, "negative", lambda a: (a < 0).sum())
    monkeypatch.setitem(recorder.FIGURES, "negative", lambda place: float(place.sums["negative"]) / place.values)
    row = (lambda places: sum(place["negative"] for place in places) / len(places), ".1%")
    monkeypatch.setitem(inspection.OF_PLACES, "negative activations", row)
    (tmp_path / "text.txt").write_text("Some words to read. " * 20)
    found = {
        name: inspection.inspect(model, tmp_path / "text.txt", progress=False)
        for name, model in {"dense": dense, "finedeep": converted}.items()
    }
    shares = [place["negative"] for place in found["dense"]["places"]]
    assert all(0 < share < 1 for share in shares)
    (line,) = [line for line in inspection.table_of(found).splitlines() if "negative activations" in line]
    assert f"{sum(shares) / len(shares):.1%}" in line


def test_a_kind_of_local_task_is_two_entries(tmp_path, monkeypatch, dense):
    from finedeep.eval import evaluate
    from finedeep.eval.compare.scores import scores_of
    from finedeep.eval.scoring import local_tasks

    monkeypatch.setitem(local_tasks.FIELDS, "translation", ("source", "translation"))
    monkeypatch.setitem(
        local_tasks.KINDS,
        "translation",
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{source}} =",
            "doc_to_target": "translation",
            "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
        },
    )
    questions = tmp_path / "questions"
    questions.mkdir()
    lines = [{"source": "chat", "translation": "cat"}, {"source": "chien", "translation": "dog"}]
    (questions / "french.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = local_tasks.write_local_tasks(questions, tmp_path / "tasks", byte_tokenizer())
    assert names == ["local_french"]
    scores = scores_of(evaluate(dense, names, include_path=tmp_path / "tasks", batch_size=1, device="cpu"))
    assert {place.metric for place in scores} == {"acc", "perplexity"}
